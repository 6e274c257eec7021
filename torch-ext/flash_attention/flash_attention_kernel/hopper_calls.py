"""From a problem to a call of the Hopper forward: whether it can serve, descriptors, schedule."""

import functools
from typing import Optional

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .calls import Launch, counts_of, mods_of, operand, spec_of
from .config import HOPPER_DIMS, HopperConfig, choose_hopper, hopper_dim, multiprocessors
from .hopper.forward import ROWS, hopper_forward_kernel
from .seqlen import Lengths, num_tiles

L2_BYTES = 40 << 20  # of a device's 50 MB and more: K and V of the heads whose tiles alternate


def serves(problem) -> bool:
    """Whether the copy engine can read the tensors, and the kernel has all that is asked for."""
    p = problem
    if p.dropout_p > 0.0 or p.attn_bias is not None or p.q.dtype == torch.float32:
        return False
    if p.block_table is not None or p.cache_batch_idx is not None:
        return False
    if p.q.shape[-1] != p.v.shape[-1] or p.q.shape[-1] > HOPPER_DIMS[-1]:
        return False
    return all(map(_is_aligned, (p.q, p.k, p.v)))


def _is_aligned(tensor) -> bool:
    """16 bytes: what a tensor map asks of base and strides."""
    *strides, last = tensor.stride()
    return (
        last == 1
        and tensor.numel() > 0
        and tensor.data_ptr() % 16 == 0
        and all(stride * tensor.element_size() % 16 == 0 and stride > 0 for stride in strides)
    )


@functools.lru_cache(maxsize=None)
def _layout(dtype, rows, block_d):
    """Of a descriptor's block in shared memory."""
    element = gl.float16 if dtype == torch.float16 else gl.bfloat16
    return gl.NVMMASharedLayout.get_default_for([1, rows, 1, block_d], element)


def _descriptor(tensor, rows, block_d) -> TensorDescriptor:
    """[batch, seqlen, heads, head_dim] with blocks of `rows` rows of one head; packed: batch 1."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    if len(shape) == 3:
        shape, strides = [1, *shape], [shape[0] * strides[0], *strides]
    layout = _layout(tensor.dtype, rows, block_d)
    return TensorDescriptor(tensor, shape, strides, [1, rows, 1, block_d], layout)


def tile_for(problem) -> HopperConfig:
    """The table's config."""
    p = problem
    masked = p.causal or p.window_left >= 0 or p.window_right >= 0
    return choose_hopper(p.q.shape[-1], masked)


def schedule_of(problem, block_m) -> tuple:
    """-> per_head, heads, total, group; see Schedule."""
    p = problem
    packed = p.cu_seqlens_q is not None
    rows_q, rows_k, batch = counts_of(p)
    nheads, nheads_k = p.q.shape[-2], p.k.shape[-2]
    per_head = num_tiles(
        Lengths(p.cu_seqlens_q, None, None, rows_q, batch if packed else 1), block_m
    )
    heads = nheads if packed else nheads * batch
    bytes_of_head = 2 * rows_k * p.k.shape[-1] * p.k.element_size() * nheads_k // nheads
    groups = -(-heads // max(L2_BYTES // max(bytes_of_head, 1), 1))
    return per_head, heads, per_head * heads, -(-heads // max(groups, 1))


def forward_launch(problem, out, lse, counters, tile: Optional[HopperConfig] = None) -> Launch:
    """The call that fills `out` and `lse`. counters: [2] int32 zeros, which it leaves so."""
    p, tile = problem, tile or tile_for(problem)
    block_d = hopper_dim(p.q.shape[-1])
    schedule = schedule_of(p, tile.block_m)
    counts = (*counts_of(p), p.q.shape[-2], p.q.shape[-2] // p.k.shape[-2], *schedule)
    options = {
        "SPEC": spec_of(p, True),
        "SCRUB": p.cu_seqlens_q is not None or p.seqused_k is not None or p.leftpad_k is not None,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "STAGES": tile.stages,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    operands = (
        _descriptor(p.q, ROWS.value, block_d), _descriptor(p.k, tile.block_n, block_d),
        _descriptor(p.v, tile.block_n, block_d), operand(out),
    )  # fmt: skip
    programs = min(multiprocessors(p.q.device), schedule[2])
    return Launch(
        hopper_forward_kernel, programs, operands, (lse, counters), p.lengths(), counts,
        (mods_of(p),), options,
    )  # fmt: skip

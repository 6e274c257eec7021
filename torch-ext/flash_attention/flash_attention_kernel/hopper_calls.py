"""From a problem to a call of the Hopper forward: whether it can serve, descriptors, schedule."""

import functools
from typing import Optional

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .calls import Launch, counts_of, mods_of, operand, spec_of
from .config import (
    HOPPER_DIMS,
    HopperConfig,
    choose_hopper,
    choose_hopper_backward,
    hopper_dim,
    multiprocessors,
)
from .hopper.backward import hopper_backward_kernel
from .hopper.forward import ROWS, hopper_forward_kernel
from .hopper.stats import finish_kernel, prepare_kernel
from .seqlen import Lengths, num_tiles

ELEMENTS = {torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32}
FLAT_ROWS = gl.NVMMASharedLayout(0, 32, 2)  # float32 in a row
L2_BYTES = 40 << 20  # of a device's 50 MB and more: K and V of the heads whose tiles alternate


def serves(problem) -> bool:
    """Whether the copy engine can read the tensors, and the kernel has all that is asked for."""
    p = problem
    if p.dropout_p > 0.0 or p.attn_bias is not None or p.q.dtype == torch.float32:
        return False
    if p.block_table is not None or p.cache_batch_idx is not None:
        return False
    if max(p.q.shape[-1], p.v.shape[-1]) > HOPPER_DIMS[-1]:
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
def _layout(dtype, *block):
    """Of a descriptor's block in shared memory."""
    return gl.NVMMASharedLayout.get_default_for(list(block), ELEMENTS[dtype])


def _descriptor(tensor, rows, block_d) -> TensorDescriptor:
    """[batch, seqlen, heads, head_dim] with blocks of `rows` rows of one head; packed: batch 1."""
    shape, strides = list(tensor.shape), list(tensor.stride())
    if len(shape) == 3:
        shape, strides = [1, *shape], [shape[0] * strides[0], *strides]
    block = [1, rows, 1, block_d]
    return TensorDescriptor(tensor, shape, strides, block, _layout(tensor.dtype, *block))


def _scrubs(problem) -> bool:
    """Whether what the copy engine reads past a sequence may be another's."""
    p = problem
    packed = p.cu_seqlens_q is not None
    return packed or any(t is not None for t in (p.seqused_q, p.seqused_k, p.leftpad_k))


def forward_tile(problem) -> HopperConfig:
    """The table's config."""
    p = problem
    masked = p.causal or p.window_left >= 0 or p.window_right >= 0
    return choose_hopper(p.q.shape[-1], p.v.shape[-1], masked)


def schedule_of(problem, block, over_keys=False) -> tuple:
    """-> per_head, heads, total, group of Schedule, for blocks of queries, or, over_keys, of keys
    of the KV heads."""
    p = problem
    packed = p.cu_seqlens_q is not None
    rows_q, rows_k, batch = counts_of(p)
    nheads, nheads_k = p.q.shape[-2], p.k.shape[-2]
    if over_keys:
        lengths, heads, bytes_of_head = (p.cu_seqlens_k, rows_k), nheads_k, rows_q * nheads
    else:
        lengths, heads, bytes_of_head = (p.cu_seqlens_q, rows_q), nheads, rows_k * nheads_k
    bytes_of_head = 2 * bytes_of_head * p.k.shape[-1] * p.k.element_size() // heads
    lengths = Lengths(lengths[0], None, None, lengths[1], batch if packed else 1)
    per_head = num_tiles(lengths, block)
    heads = heads if packed else heads * batch
    groups = -(-heads // max(L2_BYTES // max(bytes_of_head, 1), 1))
    return per_head, heads, per_head * heads, -(-heads // max(groups, 1))


def forward_launch(problem, out, lse, counters, tile: Optional[HopperConfig] = None) -> Launch:
    """The call that fills `out` and `lse`. counters: [2] int32 zeros, which it leaves so."""
    p, tile = problem, tile or forward_tile(problem)
    block_d, block_dv = hopper_dim(p.q.shape[-1]), hopper_dim(p.v.shape[-1])
    schedule = schedule_of(p, tile.block_m)
    counts = (*counts_of(p), p.q.shape[-2], p.q.shape[-2] // p.k.shape[-2], *schedule)
    options = {
        "SPEC": spec_of(p, True),
        "SCRUB": _scrubs(p),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "STAGES": tile.stages,
        "Q_TILES": tile.q_tiles,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    operands = (
        _descriptor(p.q, ROWS.value, block_d), _descriptor(p.k, tile.block_n, block_d),
        _descriptor(p.v, tile.block_n, block_dv), operand(out),
    )  # fmt: skip
    programs = min(multiprocessors(p.q.device), schedule[2])
    return Launch(
        hopper_forward_kernel, programs, operands, (lse, counters), p.lengths(), counts,
        (mods_of(p),), options,
    )  # fmt: skip


def serves_backward(problem, dout) -> bool:
    """Of the calls that `serves` accepts, those of one head_dim to 128; to 64, only plain ones:
    window, softcap and ALiBi spill up to 700 bytes there, and with 300 to 540 plain attention took
    1.2 to 1.5 times as long as in the portable kernels."""
    p, head_dim = problem, problem.q.shape[-1]
    if head_dim != p.v.shape[-1] or head_dim > 128 or not _is_aligned(dout):
        return False
    windowed = p.window_left >= 0 or p.window_right >= 0
    return head_dim > 64 or not (windowed or p.softcap > 0.0 or p.alibi_slopes is not None)


def backward_tile(problem) -> HopperConfig:
    """The table's config."""
    return choose_hopper_backward(problem.q.shape[-1])


def tiles_of_rows(problem, block_m) -> int:
    """The blocks of query rows of one head, of all sequences."""
    rows_q, _, batch = counts_of(problem)
    return num_tiles(Lengths(problem.cu_seqlens_q, None, None, rows_q, batch), block_m)


def workspace(problem, tile: HopperConfig) -> tuple:
    """-> (stats, sums), float32, uninitialised: per head and block of query rows 2 * BLOCK_M and
    BLOCK_M * BLOCK_D numbers."""
    p = problem
    rows = tiles_of_rows(p, tile.block_m) * p.q.shape[-2] * tile.block_m
    new = {"dtype": torch.float32, "device": p.q.device}
    return torch.empty(2 * rows, **new), torch.empty(rows * hopper_dim(p.q.shape[-1]), **new)


def _rows_launch(problem, kernel, operands, pointers, others, tile: HopperConfig) -> Launch:
    """A call over the blocks of query rows of every head."""
    p = problem
    rows_q, _, batch = counts_of(p)
    tiles = tiles_of_rows(p, tile.block_m)
    options = {
        "BLOCK_M": tile.block_m, "BLOCK_D": hopper_dim(p.q.shape[-1]), "DIM": p.q.shape[-1],
        "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(
        kernel, tiles * p.q.shape[-2], tuple(map(operand, operands)), pointers,
        (p.cu_seqlens_q, p.seqused_q), (rows_q, batch, tiles), others, options,
    )  # fmt: skip


def prepare_launch(problem, out, dout, lse, dlse, delta, stats, sums, tile) -> Launch:
    """The call that fills `stats`, and `delta` unless it is None, and zeros `sums`."""
    pointers = (lse, dlse, delta, stats, sums)
    return _rows_launch(problem, prepare_kernel, (out, dout), pointers, (), tile)


def finish_launch(problem, sums, dq, tile) -> Launch:
    """The call that fills `dq`."""
    scale = (mods_of(problem).scale_log2,)
    return _rows_launch(problem, finish_kernel, (dq,), (sums,), scale, tile)


def backward_launch(problem, dout, stats, sums, dk, dv, counters, tile: HopperConfig) -> Launch:
    """The call that adds dQ, over the scale, to `sums` and fills dk and dv."""
    p = problem
    block_d = hopper_dim(p.q.shape[-1])
    schedule = schedule_of(p, tile.block_n, True)
    group = p.q.shape[-2] // p.k.shape[-2]
    flat, rows = [2 * tile.block_m], [tile.block_m * block_d // 256, 256]
    operands = (
        _descriptor(p.q, tile.block_m, block_d), _descriptor(p.k, tile.block_n, block_d),
        _descriptor(p.v, tile.block_n, block_d), _descriptor(dout, tile.block_m, block_d),
        TensorDescriptor(sums, [sums.numel() // 256, 256], [256, 1], rows, FLAT_ROWS),
        TensorDescriptor(stats, [stats.numel()], [1], flat, _layout(stats.dtype, *flat)),
        operand(dk), operand(dv),
    )  # fmt: skip
    counts = (*counts_of(p), p.k.shape[-2], group, *schedule, tiles_of_rows(p, tile.block_m))
    options = {
        "SPEC": spec_of(p), "SCRUB": _scrubs(p), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d, "STAGES": tile.stages, "Q_TILES": tile.q_tiles, "num_warps": 8,
        "enable_fp_fusion": True,
    }  # fmt: skip
    programs = min(multiprocessors(p.q.device), schedule[2])
    return Launch(
        hopper_backward_kernel, programs, operands, (counters,), p.lengths(), counts,
        (mods_of(p),), options,
    )  # fmt: skip

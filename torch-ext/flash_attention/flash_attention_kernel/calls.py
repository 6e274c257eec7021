"""From a problem to a kernel call: config, grid, arguments.

Each `*_launch` builds a call from scratch; launch.py makes it, tools/aot.py compiles it offline.
"""

import functools
from typing import Any, NamedTuple, Optional

import torch
import triton

from .backward import dkdv_kernel, dq_kernel
from .common import LOG2E, TAIL_D, Mods, Operand, Spec
from .config import MAX_BLOCK_D, TileConfig, architecture, block_dim, choose
from .forward import forward_kernel
from .pages import Paging
from .rotary import rotary_kernel
from .score_tiles import dbias_kernel, probs_kernel
from .seqlen import Lengths, num_tiles

UNBOUNDED = 2**31 - 1


class Launch(NamedTuple):
    """One kernel call; its arguments are operands, pointers, lengths, counts, then the others."""

    kernel: Any
    programs: int
    operands: tuple  # tensors with their strides, or their tensor descriptors
    pointers: tuple  # tensors whose layout the kernel knows
    lengths: tuple  # AttentionProblem.lengths()
    counts: tuple  # integers
    others: tuple  # Paging's fields, if the kernel takes them, and mods
    options: dict  # the kernel's constexpr parameters, in their order, and how to compile it

    @property
    def args(self):
        return (*self.operands, *self.pointers, *self.lengths, *self.counts, *self.others)

    @property
    def grid(self):
        return (self.programs,)


@functools.lru_cache(maxsize=None)
def options_of(tile: TileConfig, spec: Spec, **more):
    """The compile-time half of a call; the kernels' constexpr parameters first, in their order."""
    tail = TAIL_D.value if spec.head_dim > MAX_BLOCK_D else 0
    return {
        "SPEC": spec,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_dim(max(spec.head_dim - tail, spec.head_dim_v)),
        **more,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def _has_ptx(device) -> bool:
    """Whether kernels are compiled for NVIDIA, as tools/aot.py may do for meta tensors too."""
    target = triton.runtime.driver.active.get_current_target() if device.type != "cpu" else None
    return target is not None and target.backend == "cuda"


def has_pdl(device) -> bool:
    """Whether a kernel may be launched under the end of the one before: NVIDIA, sm_90 on."""
    return _has_ptx(device) and triton.runtime.driver.active.get_current_target().arch >= 90


def spec_of(problem, defer_scale=False, block_n=1) -> Spec:
    """What the kernels are compiled for. defer_scale: products may be compared before they are
    scaled, which only a positive scale, and nothing added to the scores, allows."""
    p = problem
    bare = p.alibi_slopes is None and p.attn_bias is None
    page_size = p.k.shape[1] if p.block_table is not None else 0
    return Spec(
        head_dim=p.q.shape[-1],
        head_dim_v=p.v.shape[-1],
        causal=p.causal,
        left=p.window_left >= 0,
        right=p.window_right >= 0,
        top_left=p.top_left,
        softcap=p.softcap > 0.0,
        dropout=p.dropout_p > 0.0,
        precise=p.q.dtype == torch.float32,
        fast_tanh=p.softcap > 0.0 and p.q.dtype == torch.bfloat16 and _has_ptx(p.q.device),
        defer_scale=defer_scale and bare and (p.softcap > 0.0 or p.softmax_scale > 0),
        page_size=page_size,
        gathers=page_size > 0 and (page_size % block_n > 0 or p.leftpad_k is not None),
    )


def cache_spec(head_dim, head_dim_v, page_size) -> Spec:
    """What append_kernel is compiled for."""
    return Spec(head_dim, head_dim_v, *(False,) * 9, page_size)


def mods_of(problem) -> Mods:
    """The run-time values of a call."""
    p = problem
    scale_log2 = p.softmax_scale * LOG2E.value
    if not p.has_mods():
        return Mods(scale_log2)
    mods = Mods(
        scale_log2,
        window_left=max(p.window_left, 0),
        window_right=max(p.window_right, 0),
        sink_ptr=p.s_aux,
    )
    if p.softcap:
        mods = mods._replace(
            softcap_log2=p.softcap * LOG2E.value, tanh_log2=2.0 * scale_log2 / p.softcap
        )
    if p.dropout_p:
        mods = mods._replace(
            drop_below=min(round(p.dropout_p * 2**32), 2**32 - 1) - 2**31,
            keep_scale=1.0 / (1.0 - p.dropout_p),
            seed_ptr=p.rng_state,
        )
    if p.alibi_slopes is not None:
        slopes = p.alibi_slopes
        mods = mods._replace(
            alibi_ptr=slopes, alibi_batch=slopes.stride(0) if slopes.dim() == 2 else 0
        )
    if p.attn_bias is not None:
        bias = p.attn_bias
        batch, head, row, col = (
            0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride())
        )
        rows = UNBOUNDED if bias.shape[2] == 1 else bias.shape[2]
        mods = mods._replace(
            bias_ptr=bias,
            bias_batch=batch,
            bias_head=head,
            bias_row=row,
            bias_col=col,
            bias_rows=rows,
            bias_cols=bias.shape[3],
        )
    return mods


def paging_of(k, block_table, cache_batch_idx) -> Paging:
    """Where in a cache the sequences are."""
    columns = 0 if block_table is None else block_table.stride(0)
    return Paging(block_table, columns, cache_batch_idx, k.shape[0])


def operand(tensor) -> Operand:
    strides = tensor.stride()
    return Operand(tensor, *strides) if len(strides) == 4 else Operand(tensor, 0, *strides)


def tile_for(kernel: str, arch: str, problem) -> TileConfig:
    """The table's config for a kernel of this problem."""
    q, v = problem.q, problem.v
    dims = (q.shape[-1], v.shape[-1])
    return choose(kernel, arch, q.dtype, *dims, problem.is_masked(), problem.weight())


def _tile(kernel: str, problem) -> TileConfig:
    return tile_for(kernel, architecture(problem.q.device), problem)


def counts_of(problem):
    """-> rows_q, rows_k, batch as the kernels take them."""
    q = problem.q
    if problem.cu_seqlens_q is None:
        return q.shape[1], problem.rows_k(), q.shape[0]
    return q.shape[0], problem.rows_k(), problem.cu_seqlens_q.shape[0] - 1


def _launch(kernel, problem, tile, operands, pointers, over_keys=False) -> Launch:
    """A call over the tiles of the queries of every head, or of the keys of every KV head.

    operands: tensors whose strides a kernel takes; pointers: tensors like lse, which it knows.
    """
    nheads, nheads_k = problem.q.shape[-2], problem.k.shape[-2]
    rows_q, rows_k, batch = counts_of(problem)
    if over_keys:
        lengths, block, heads = (problem.cu_seqlens_k, rows_k), tile.block_n, nheads_k
    else:
        lengths, block, heads = (problem.cu_seqlens_q, rows_q), tile.block_m, nheads
    tiles = num_tiles(Lengths(lengths[0], None, None, lengths[1], batch), block)
    counts = (rows_q, rows_k, batch, tiles, nheads // nheads_k)
    others, defer_scale = (mods_of(problem),), False
    if kernel is forward_kernel:
        others, defer_scale = (*paging_of(problem.k, *problem.pages()), *others), True
    options = options_of(tile, spec_of(problem, defer_scale, tile.block_n))
    operands = tuple(map(operand, operands))
    return Launch(
        kernel, tiles * heads, operands, pointers, problem.lengths(), counts, others, options
    )


def forward_launch(problem, out, lse, tile: Optional[TileConfig] = None) -> Launch:
    """The call that fills `out` and `lse`."""
    tile = tile or _tile("forward", problem)
    return _launch(forward_kernel, problem, tile, (*problem[:3], out), (lse,))


def dq_launch(problem, dout, dlse, out, lse, dq, delta, dslope=None, tile=None) -> Launch:
    """The call that fills `dq`, `delta` and `dslope`; `dlse` None if lse has no gradient, `dslope`
    if alibi_slopes wants none."""
    operands = (*problem[:3], out, dout, dq)
    tile = tile or _tile("dq", problem)
    return _launch(dq_kernel, problem, tile, operands, (lse, dlse, delta, dslope))


def dkdv_launch(problem, dout, lse, delta, dk, dv, tile=None) -> Launch:
    """The call that fills `dk` and `dv` from the `delta` of dq_launch."""
    operands = (*problem[:3], dout, dk, dv)
    tile = tile or _tile("dkdv", problem)
    return _launch(dkdv_kernel, problem, tile, operands, (lse, delta), over_keys=True)


def dbias_launch(problem, dout, lse, delta, dbias, tile=None) -> Launch:
    """The call that fills `dbias`, of attn_bias's shape."""
    tile = tile or _tile("tiles", problem)
    rows_q, rows_k, batch = counts_of(problem)
    nheads, nheads_k = problem.q.shape[-2], problem.k.shape[-2]
    dbias_batch, dbias_heads, dbias_rows, cols = dbias.shape
    tiles = triton.cdiv(dbias_rows, tile.block_m) * triton.cdiv(cols, tile.block_n)
    counts = (
        rows_q, rows_k, batch, nheads, nheads // nheads_k, dbias_batch, dbias_heads, dbias_rows,
    )  # fmt: skip
    return Launch(
        dbias_kernel, tiles * dbias_batch * dbias_heads,
        tuple(map(operand, (*problem[:3], dout))), (lse, delta, dbias), problem.lengths(), counts,
        (mods_of(problem),), options_of(tile, spec_of(problem)),
    )  # fmt: skip


def probs_launch(problem, lse, probs, tile=None) -> Launch:
    """The call that fills `probs` [batch, nheads, rows, cols]."""
    tile = tile or _tile("tiles", problem)
    rows_q, rows_k, batch = counts_of(problem)
    nheads, nheads_k = problem.q.shape[-2], problem.k.shape[-2]
    rows, cols = probs.shape[2:]
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_n)
    counts = (rows_q, rows_k, batch, nheads, nheads // nheads_k, rows, cols)
    return Launch(
        probs_kernel, tiles * batch * nheads, tuple(map(operand, problem[:2])), (lse, probs),
        problem.lengths(), counts, (mods_of(problem),), options_of(tile, spec_of(problem)),
    )  # fmt: skip


def rotary_launch(x, out, cos, sin, cu_seqlens, offsets, offset, interleaved, conjugate) -> Launch:
    """The call that turns x by its positions' angles into `out`; see rotary.py."""
    rotary_dim = 2 * cos.shape[-1]
    if cu_seqlens is None:
        batch, rows = x.shape[:2]
    else:
        batch, rows = cu_seqlens.shape[0] - 1, x.shape[0]
    block_d = max(block_dim(rotary_dim), 2)
    block_m = max(2048 // block_d, 1)  # 8 elements a thread
    tiles = num_tiles(Lengths(cu_seqlens, None, None, rows, batch), block_m)
    options = {
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": interleaved,
        "CONJUGATE": conjugate,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "enable_fp_fusion": True,
    }
    pointers, lengths = (cos, sin), (cu_seqlens, offsets)
    counts = (offset, cos.shape[0], rows, batch, tiles)
    operands = (operand(x), operand(out))
    programs = tiles * x.shape[-2]
    return Launch(rotary_kernel, programs, operands, pointers, lengths, counts, (), options)

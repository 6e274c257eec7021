"""From a problem to calls of the Hopper kernels: whether they serve, descriptors, schedules."""

import functools
from typing import NamedTuple, Optional

import torch
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from .calls import Launch, counts_of, has_pdl, mods_of, operand, paging_of, spec_of
from .config import (
    HOPPER_DIMS,
    HopperConfig,
    choose_hopper,
    choose_hopper_backward,
    hopper_dim,
    hopper_parts,
    multiprocessors,
)
from .hopper.backward import hopper_backward_kernel
from .hopper.forward import hopper_forward_kernel
from .hopper.pipeline import ROWS
from .hopper.stats import finish_kernel, prepare_kernel, sum_parts_kernel
from .hopper.values import transpose_values_kernel
from .hopper.wide import hopper_wide_backward_kernel
from .seqlen import Lengths, num_tiles

ELEMENTS = {
    torch.float16: gl.float16, torch.bfloat16: gl.bfloat16, torch.float32: gl.float32,
    torch.float8_e4m3fn: gl.float8e4nv,
}  # fmt: skip
FLAT_ROWS = gl.NVMMASharedLayout(0, 32, 2)  # float32 in a row
# Rows of sequences too short for tiles of 192, full and causal: masked they have two blocks of keys
# at the diagonal for one of 128's. D 64 on an H200, TFLOP/s with 192 and 128, random data: full 380
# and 384 at 512, 454 and 432 at 768; causal 407 and 415 at 2,048, 460 and 450 at 3,072.
SHORT = (640, 3072)
L2_BYTES = 40 << 20  # of a device's 50 MB and more: K and V of the heads whose tiles alternate


def serves(problem) -> bool:
    """Whether the copy engine can read the tensors, and the kernel has all that is asked for."""
    p = problem
    if p.dropout_p > 0.0 or p.attn_bias is not None or p.q.dtype == torch.float32:
        return False
    eight = p.is_float8()
    if max(p.q.shape[-1], p.v.shape[-1]) > (128 if eight else HOPPER_DIMS[-1]):
        return False
    if p.block_table is not None and (
        p.k.shape[1] % forward_tile(p).block_n > 0 or p.leftpad_k is not None
    ):
        return False  # a block of keys must lie in one page
    return all(map(_is_aligned, (p.q, p.k) if eight else (p.q, p.k, p.v)))


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
    """The table's config. That for short sequences also with a window, and with softcap and ALiBi:
    tiles of 192 rows, of whose consumers a thread has 160 registers, spill."""
    p, masked = problem, problem.is_masked()
    rows, _, batch = counts_of(p)
    length = rows if p.cu_seqlens_q is None else rows // max(batch, 1)  # packed: the mean
    short = length < SHORT[masked] or (masked and p.window_left >= 0)
    short = short or (p.softcap > 0.0 and p.alibi_slopes is not None)
    kind = "float8" if p.is_float8() else "causal" if masked else "full"
    return choose_hopper(p.q.shape[-1], p.v.shape[-1], kind, short)


def _blocks(problem, cu_seqlens, rows, block, heads) -> tuple:
    """-> per_head, heads of Schedule, where a sequence has so many heads."""
    _, _, batch = counts_of(problem)
    packed = cu_seqlens is not None
    lengths = Lengths(cu_seqlens, None, None, rows, batch if packed else 1)
    return num_tiles(lengths, block), heads if packed else heads * batch


def _schedule(per_head, heads, group) -> tuple:
    """-> per_head, heads, total, group of Schedule, the groups alike, of at most so many heads."""
    groups = -(-heads // max(group, 1))
    return per_head, heads, per_head * heads, -(-heads // max(groups, 1))


def _heads_that_fill(problem, per_head) -> int:
    """The fewest heads, of so many blocks each, that have one for every multiprocessor."""
    return -(-multiprocessors(problem.q.device) // max(per_head, 1))


def forward_schedule(problem, block) -> tuple:
    """The tiles of heads whose K and V are in the L2 together, longest first. Where all are alike,
    of no more heads than fill the device: with all that fit D 128 full took 4 % more time at 1k, as
    they were read again and again (H200, on zeros; at 4k and 16k as much, causal 4k 2 % less)."""
    p = problem
    rows_q, rows_k, _ = counts_of(p)
    nheads, nheads_k = p.q.shape[-2], p.k.shape[-2]
    per_head, heads = _blocks(p, p.cu_seqlens_q, rows_q, block, nheads)
    if p.cu_seqlens_q is None and not p.is_masked():
        return _schedule(per_head, heads, _heads_that_fill(p, per_head))
    bytes_of_head = 2 * rows_k * nheads_k * p.k.shape[-1] * p.k.element_size() // nheads
    return _schedule(per_head, heads, L2_BYTES // max(bytes_of_head, 1))


def backward_schedule(problem, block, parts, ordered) -> tuple:
    """The blocks of keys of so many heads that the device is full, longest first. Fewer heads read
    the same Q, dO and dQ at a time; with fewer than eight, too long ones would be last. Ordered,
    the blocks of a head wait for each other: with 16 for 32 the anchor points took 7 % more time
    (geometric mean; 50 % at D 64 causal, 1k)."""
    p = problem
    per_head, heads = _blocks(p, p.cu_seqlens_k, p.rows_k(), block, p.k.shape[-2] * parts)
    fewest = 32 if ordered else 8
    return _schedule(per_head, heads, max(_heads_that_fill(p, per_head), fewest))


def parts_of_group(problem, tile: HopperConfig) -> int:
    """Into how many parts the query heads of a KV head are divided, each with a dK and dV of its
    own: 1, or, where else the device would have less than four blocks of keys for each of its
    programs, up to 8."""
    p, parts = problem, 1
    per_head, heads = _blocks(p, p.cu_seqlens_k, p.rows_k(), tile.block_n, p.k.shape[-2])
    group = p.q.shape[-2] // p.k.shape[-2]
    wanted = 4 * multiprocessors(p.q.device)
    while parts < 8 and group % (2 * parts) == 0 and per_head * heads * parts < wanted:
        parts *= 2
    return parts


def empty_values(problem):
    """Uninitialised transposed values of float8; see transpose_values_kernel."""
    p, block_n = problem, forward_tile(problem).block_n
    columns = tiles_of_keys(p, block_n) * block_n
    return p.v.new_empty((p.v.shape[-2], hopper_dim(p.v.shape[-1]), columns))


def tiles_of_keys(problem, block_n) -> int:
    """The blocks of keys of one head, of all sequences."""
    _, rows_k, batch = counts_of(problem)
    return num_tiles(Lengths(problem.cu_seqlens_k, None, None, rows_k, batch), block_n)


def values_launch(problem, values) -> Launch:
    """The call that fills `values`, like `empty_values`."""
    p, block_n = problem, forward_tile(problem).block_n
    _, rows_k, batch = counts_of(p)
    tiles = tiles_of_keys(p, block_n)
    options = {
        "BLOCK_N": block_n, "BLOCK_DV": hopper_dim(p.v.shape[-1]), "DIM": p.v.shape[-1],
        "num_warps": 4,
    }  # fmt: skip
    return Launch(
        transpose_values_kernel, tiles * p.v.shape[-2], (operand(p.v.view(torch.int8)),),
        (values.view(torch.int8),), (p.cu_seqlens_k, p.seqused_k, p.leftpad_k),
        (rows_k, batch, tiles), (), options,
    )  # fmt: skip


def forward_launch(
    problem, out, lse, counters, tile: Optional[HopperConfig] = None, values=None, gains=None
) -> Launch:
    """The call that fills `out` and `lse`. counters: [2] int32 zeros, which it leaves so. Of
    float8: values, as values_launch leaves them, and gains [2, batch, nheads] float32."""
    p, tile = problem, tile or forward_tile(problem)
    (block_d, more), (block_dv, more_v) = (hopper_parts(t.shape[-1]) for t in (p.q, p.v))
    scrubs = _scrubs(p) and values is None  # those are 0 past a sequence
    schedule = forward_schedule(p, tile.block_m)
    counts = (*counts_of(p), p.q.shape[-2], p.q.shape[-2] // p.k.shape[-2], *schedule)
    options = {
        "SPEC": spec_of(p, True, tile.block_n),
        "SCRUB": scrubs,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d,
        "BLOCK_DV": block_dv,
        "STAGES": tile.stages,
        "Q_TILES": tile.q_tiles,
        "num_warps": 4,
        "enable_fp_fusion": True,
    }
    out_tiles = None
    whole = block_dv == block_d and not more_v and values is None
    if not scrubs and tile.q_tiles > 1 and whole and _is_aligned(out):
        out_tiles = _descriptor(out, ROWS.value, block_dv)
    if values is None:
        v = _descriptor(p.v, tile.block_n, block_dv)
    else:
        block = [1, block_dv, tile.block_n]
        layout = _layout(values.dtype, *block)
        v = TensorDescriptor(values, list(values.shape), list(values.stride()), block, layout)
    operands = (
        _descriptor(p.q, ROWS.value, block_d), _descriptor(p.k, tile.block_n, block_d), v,
        _descriptor(p.q, ROWS.value, more) if more else None,
        _descriptor(p.k, tile.block_n, more) if more else None,
        _descriptor(p.v, tile.block_n, more_v) if more_v else None, operand(out), out_tiles,
    )  # fmt: skip
    programs = min(multiprocessors(p.q.device), schedule[2])
    return Launch(
        hopper_forward_kernel, programs, operands, (lse, counters, gains), p.lengths(), counts,
        (*paging_of(p.k, *p.pages()), mods_of(p)), options,
    )  # fmt: skip


def serves_backward(problem, dout, ordered) -> bool:
    """Of the calls that `serves` accepts, those of one head_dim to 128, and of wider heads those
    whose dQ may be added in any order."""
    head_dim, head_dim_v = problem.q.shape[-1], problem.v.shape[-1]
    served = not ordered if _is_wide(problem) else head_dim == head_dim_v
    return served and _is_aligned(dout)


def _is_wide(problem) -> bool:
    """Whether the backward is hopper/wide.py's."""
    return max(problem.q.shape[-1], problem.v.shape[-1]) > 128


def _overlaps(problem) -> bool:
    """Whether each kernel of the backward begins under the last programs of the one before."""
    return has_pdl(problem.q.device) and not _is_wide(problem)


def tiles_of_rows(problem, block_m) -> int:
    """The blocks of query rows of one head, of all sequences."""
    rows_q, _, batch = counts_of(problem)
    return num_tiles(Lengths(problem.cu_seqlens_q, None, None, rows_q, batch), block_m)


class BackwardPlan(NamedTuple):
    """What the calls of a backward have in common."""

    tile: HopperConfig
    parts: int  # see parts_of_group
    blocks: int  # of query rows, of all heads
    stats: int  # numbers: 2 * BLOCK_M a block
    sums: int  # BLOCK_M * BLOCK_D a block


def backward_plan(problem, tile: Optional[HopperConfig] = None) -> BackwardPlan:
    """By the table's config if no other is given."""
    p, head_dim = problem, problem.q.shape[-1]
    windowed = p.window_left >= 0 or p.window_right >= 0
    mods = windowed or p.softcap > 0.0 or p.alibi_slopes is not None
    tile = tile or choose_hopper_backward(max(head_dim, p.v.shape[-1]), mods)
    blocks = tiles_of_rows(p, tile.block_m) * p.q.shape[-2]
    rows = blocks * tile.block_m
    parts = parts_of_group(p, tile)
    return BackwardPlan(tile, parts, blocks, 2 * rows, rows * hopper_dim(head_dim))


def workspace(problem, plan: BackwardPlan) -> tuple:
    """-> (stats, sums), float32, and Sums' turns, int32 for each block, with as much again for its
    `done`, or None where sums are to be zeroed; uninitialised."""
    new = {"dtype": torch.float32, "device": problem.q.device}
    turns = None
    if not _is_wide(problem):
        turns = torch.empty(2 * plan.blocks, dtype=torch.int32, device=new["device"])
    return torch.empty(plan.stats, **new), torch.empty(plan.sums, **new), turns


def partial_grads(problem, parts) -> tuple:
    """-> (dk, dv), float32, of `parts` for each KV head: uninitialised, or 0 where no program may
    write."""
    written = problem.seqused_k is None and problem.leftpad_k is None
    new = torch.empty if written else torch.zeros
    shapes = ((*t.shape[:-2], parts * t.shape[-2], t.shape[-1]) for t in (problem.k, problem.v))
    return tuple(new(s, dtype=torch.float32, device=problem.k.device) for s in shapes)


def sum_parts_launch(grad, partial) -> Launch:
    """The call that fills dk or dv from one of `partial_grads`."""
    *_, seqlen, nheads, dim = grad.shape
    rows, block_d = grad.numel() // (nheads * dim), hopper_dim(dim)
    block = 2048 // block_d
    options = {
        "PARTS": partial.shape[-2] // nheads, "BLOCK": block, "BLOCK_D": block_d, "DIM": dim,
        "num_warps": 4,
    }  # fmt: skip
    programs = -(-rows * nheads // block)
    counts = (rows, seqlen, nheads)
    return Launch(sum_parts_kernel, programs, (operand(grad),), (partial,), (), counts, (), options)


def _rows_launch(problem, kernel, operands, pointers, counts, others, tile, dim, **more) -> Launch:
    """A call over the blocks of query rows, with so many columns, of every head."""
    p = problem
    rows_q, _, batch = counts_of(p)
    tiles = tiles_of_rows(p, tile.block_m)
    options = {
        "BLOCK_M": tile.block_m, "BLOCK_D": hopper_dim(dim), "DIM": dim, **more,
        "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
    return Launch(
        kernel, tiles * p.q.shape[-2], tuple(map(operand, operands)), pointers,
        (p.cu_seqlens_q, p.seqused_q), (rows_q, batch, tiles, *counts), others, options,
    )  # fmt: skip


def prepare_launch(problem, out, dout, lse, dlse, delta, stats, sums, turns, tile) -> Launch:
    """The call that fills `stats`, and `delta` unless it is None, and zeros `turns`, or `sums` if
    they are None."""
    pointers, rows = (lse, dlse, delta, stats, sums, turns), (out, dout)
    sums_d = hopper_dim(problem.q.shape[-1])
    dim_v = problem.v.shape[-1]
    more = {"SUMS_D": sums_d, "PDL": _overlaps(problem)}
    return _rows_launch(problem, prepare_kernel, rows, pointers, (), (), tile, dim_v, **more)


def finish_launch(problem, sums, turns, dq, tile) -> Launch:
    """The call that fills `dq`."""
    p = problem
    parts, scale = parts_of_group(p, tile), (mods_of(p).scale_log2,)
    works, _ = _blocks(p, p.cu_seqlens_k, p.rows_k(), tile.block_n, p.k.shape[-2])
    counts = (p.q.shape[-2] // (p.k.shape[-2] * parts), works)
    more = {"PDL": True, "launch_pdl": True} if _overlaps(p) else {"PDL": False}
    return _rows_launch(
        p, finish_kernel, (dq,), (sums, turns), counts, scale, tile, p.q.shape[-1], **more
    )


def backward_launch(
    problem, dout, stats, sums, dk, dv, counters, turns, tile: HopperConfig, ordered=False
) -> Launch:
    """The call that adds dQ, over the scale, to `sums`, if `ordered` in the order of the keys, and
    fills dk and dv, which have one or several heads for each of K's."""
    p, wide = problem, _is_wide(problem)
    block_d, block_dv = hopper_dim(p.q.shape[-1]), hopper_dim(p.v.shape[-1])
    nheads, nheads_k = p.q.shape[-2], dk.shape[-2]
    parts = nheads_k // p.k.shape[-2]
    schedule = backward_schedule(p, tile.block_n, parts, ordered)
    tiles_of_grads = (None, None)
    if not (wide or _scrubs(p)) and dk.dtype == p.k.dtype and all(map(_is_aligned, (dk, dv))):
        tiles_of_grads = tuple(_descriptor(t, ROWS.value, block_d) for t in (dk, dv))
    flat, piece = [2 * tile.block_m], [ROWS.value * ROWS.value // 256, 256]
    sums_tiles = TensorDescriptor(sums, [sums.numel() // 256, 256], [256, 1], piece, FLAT_ROWS)
    operands = (
        _descriptor(p.q, tile.block_m, block_d), _descriptor(p.k, ROWS.value, block_d),
        _descriptor(p.v, ROWS.value, block_dv), _descriptor(dout, tile.block_m, block_dv),
        (sums,) if wide else sums_tiles,
        TensorDescriptor(stats, [stats.numel()], [1], flat, _layout(stats.dtype, *flat)),
        operand(dk), operand(dv), *tiles_of_grads,
    )  # fmt: skip
    tiles_q = tiles_of_rows(p, tile.block_m)
    counts = (*counts_of(p), nheads_k, nheads // nheads_k, parts, *schedule, tiles_q)
    options = {
        "SPEC": spec_of(p), "SCRUB": _scrubs(p), "BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n,
        "BLOCK_D": block_d, "STAGES": tile.stages, "Q_TILES": tile.q_tiles,
        **({"BLOCK_DV": block_dv} if wide else {"DOWN": ordered, "launch_pdl": True}),
        "num_warps": 4, "enable_fp_fusion": True,
    }  # fmt: skip
    programs = min(multiprocessors(p.q.device), schedule[2])
    kernel = hopper_wide_backward_kernel if wide else hopper_backward_kernel
    return Launch(
        kernel, programs, operands, (counters, turns), p.lengths(), counts, (mods_of(p),), options
    )

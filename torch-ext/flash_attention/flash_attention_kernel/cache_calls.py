"""Calls over a cache: split-KV decoding, the merge of its parts, and the append of new keys."""

from typing import NamedTuple, Optional

from .append_kv import append_kernel
from .calls import (
    Launch,
    cache_spec,
    counts_of,
    has_pdl,
    mods_of,
    operand,
    options_of,
    paging_of,
    spec_of,
)
from .combine import Partial, combine_kernel
from .common import Operand
from .config import (
    DECODE_ROWS,
    MAX_BLOCK_D,
    TileConfig,
    architecture,
    block_dim,
    choose_decode,
    multiprocessors,
)
from .decode import decode_kernel
from .seqlen import Lengths, num_tiles

FIXED_SPLIT = 2048  # keys per split where the batch must not matter
MAX_SORTED = 128  # sequences that decode_kernel sorts by length, each program for itself
COMBINE_TILE = 8192  # partial results that combine_kernel reads at once: 64 a thread


class Splits(NamedTuple):
    """How a sequence's keys are divided: into `num` even shares, or by `keys` each."""

    num: int
    keys: int = 0


def decodes(problem) -> bool:
    """Whether decode_kernel computes this problem: it can, and there are few queries, or splitting
    the keys is asked for or fills the device."""
    p = problem
    if p.dropout_p > 0.0 or p.attn_bias is not None:
        return False
    packed = p.cu_seqlens_q is not None
    if p.q.shape[-1] > MAX_BLOCK_D or p.num_splits > 1 or p.invariant() and packed:
        return True
    rows = p.rows_per_kv_head()
    if rows is None:
        return False
    batch, nheads = counts_of(p)[2], p.q.shape[-2]
    programs = batch * nheads * -(-rows * p.k.shape[-2] // (nheads * 128))  # of forward_kernel
    scarce = programs * 4 <= multiprocessors(p.q.device) and p.rows_k() >= 1024
    return rows <= DECODE_ROWS[-1] or (scarce and not p.invariant())


def decode_tile(problem) -> TileConfig:
    """The table's config. Where the batch must not matter, nor must the longest sequence."""
    p = problem
    rows = p.rows_per_kv_head()
    if rows is None or p.invariant() and p.cu_seqlens_q is not None:
        rows = DECODE_ROWS[-1]
    page_size = p.k.shape[1] if p.block_table is not None else 0
    heads_k, device = p.k.shape[-2], p.q.device
    many = counts_of(p)[2] * heads_k > multiprocessors(device) and not p.invariant()
    dims = (p.q.shape[-1], p.v.shape[-1])
    return choose_decode(architecture(device), p.q.dtype, *dims, rows, page_size, many)


def splits_for(problem, tile: TileConfig) -> Splits:
    """By lengths that the host knows: those of the cache, not of the sequences. One program for a
    multiprocessor fills a device: twice as many read K and V no sooner, and leave more to merge."""
    p = problem
    rows_k = p.rows_k()
    blocks = max(-(-rows_k // tile.block_n), 1)
    if p.num_splits:
        return Splits(min(p.num_splits, blocks))
    if p.batch_invariant:
        return Splits(max(-(-rows_k // FIXED_SPLIT), 1), FIXED_SPLIT)
    rows = p.rows_per_kv_head() or tile.block_m
    tiles = counts_of(p)[2] * p.k.shape[-2] * -(-rows // tile.block_m)
    return Splits(max(min(multiprocessors(p.q.device) // max(tiles, 1), blocks // 2, 128), 1))


def _sorted(problem, tiles, programs) -> int:
    """decode_kernel's SORTED: if each sequence is one tile, and their order counts, how many
    there may be."""
    p = problem
    few = 1 < tiles <= MAX_SORTED and p.cu_seqlens_q is None and tiles == p.q.shape[0]
    if not few or p.seqused_k is None or programs <= multiprocessors(p.q.device):
        return 0
    return 1 << (tiles - 1).bit_length()


def decode_launch(problem, out, lse, splits: Splits, tile: Optional[TileConfig] = None) -> Launch:
    """The call that fills `out` and `lse`, which have a leading dimension of the splits if there
    is more than one."""
    tile = tile or decode_tile(problem)
    nheads_k = problem.k.shape[-2]
    group = problem.q.shape[-2] // nheads_k
    rows_q, rows_k, batch = counts_of(problem)
    tiles = num_tiles(Lengths(problem.cu_seqlens_q, None, None, rows_q, batch), tile.block_m, group)
    spec, partial = spec_of(problem, True, tile.block_n), splits.num > 1
    out_split, strides = (out.stride(0), out.stride()[1:]) if partial else (0, out.stride())
    operands = (*map(operand, problem[:3]), Operand(out, *(0,) * (4 - len(strides)), *strides))
    counts = (rows_q, rows_k, batch, tiles, group, splits.num, splits.keys, out_split)
    return Launch(
        decode_kernel, tiles * nheads_k * splits.num, operands, (lse,), problem.lengths(), counts,
        (*paging_of(problem.k, *problem.pages()), mods_of(problem)),
        options_of(
            tile, spec, PARTIAL=partial, PDL=has_pdl(out.device),
            SORTED=_sorted(problem, tiles, tiles * nheads_k * splits.num),
        ),
    )  # fmt: skip


def _partial(tensor, dims, packed, split) -> Partial:
    """A tensor as a kernel argument: [splits, batch, seqlen, heads, ...], where `split` says
    whether it has the first dimension and `packed` that it has not the second."""
    strides = list(tensor.stride()[:dims])
    if packed:
        strides.insert(len(strides) - 2, 0)
    return Partial(tensor, *(strides if split else (0, *strides)))


def merge_launch(out_partial, lse_partial, out, lse) -> Launch:
    """The call that merges what decode_launch left: lse [(splits, batch,) heads, seqlen]."""
    return combine_launch(out_partial, lse_partial.mT, out, lse.mT)


def combine_launch(out_partial, lse_partial, out, lse, no_keys=float("inf")) -> Launch:
    """The call that merges out_partial [splits, (batch,) seqlen, heads, d], whose last stride is 1,
    by lse_partial [splits, (batch,) seqlen, heads] into out and lse without the first dimension.
    no_keys: the lse of a row without keys."""
    *batch, rows, nheads = lse.shape
    head_dim = out.shape[-1]
    block_d = block_dim(head_dim)
    options = {
        "DIM": head_dim,
        "BLOCK_D": block_d,
        "BLOCK_S": min(COMBINE_TILE // block_d, 128),
        "NO_KEYS": no_keys,
        "PDL": has_pdl(out.device),
        "launch_pdl": has_pdl(out.device),
        "enable_fp_fusion": True,
    }
    if not options["PDL"]:  # other backends do not know it
        del options["launch_pdl"]
    packed, dims = not batch, lse.dim()
    operands = (
        _partial(out_partial, dims + 1, packed, True),
        _partial(lse_partial, dims + 1, packed, True),
        _partial(out, dims, packed, False),
        _partial(lse, dims, packed, False),
    )
    counts = (rows, nheads, out_partial.shape[0])
    return Launch(combine_kernel, lse.numel(), operands, (), (), counts, (), options)


def append_launch(
    q, k, v, k_cache, v_cache, cos, sin, cu_seqlens, cache_seqlens, block_table, batch_idx, q_out,
    seqused, interleaved, turn_each,
) -> Launch:  # fmt: skip
    """The call that writes k and v into the caches, `seqused` and, with cos and sin, q_out, which
    is else not touched."""
    rotary_dim = 0 if cos is None else 2 * cos.shape[-1]
    if cu_seqlens is None:
        batch, rows, rows_q = q.shape[0], k.shape[1], q.shape[1]
    else:
        batch, rows, rows_q = cu_seqlens.shape[0] - 1, k.shape[0], q.shape[0]
    block_d = block_dim(max(q.shape[-1], v.shape[-1]))
    longest = max(rows, rows_q)
    block_m = max(min(4096 // block_d, 1 << (longest - 1).bit_length()), 1)
    tiles, tiles_q = (
        num_tiles(Lengths(cu_seqlens, None, None, n, batch), block_m) for n in (rows, rows_q)
    )
    tiles_q = tiles_q if rotary_dim else 0
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    page_size = k_cache.shape[1] if block_table is not None else 0
    pages = block_table.shape[1] if block_table is not None else 1
    spec = cache_spec(q.shape[-1], v.shape[-1], page_size)
    options = {
        "SPEC": spec,
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": interleaved,
        "TURN_EACH": turn_each,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
        "BLOCK_R": max(block_dim(max(rotary_dim, 1)), 2),
        "enable_fp_fusion": True,
    }
    paging = paging_of(k_cache, block_table, batch_idx)
    counts = (
        rows, rows_q, batch, pages * k_cache.shape[1], 0 if cos is None else cos.shape[0],
        tiles, tiles_q, nheads_k,
    )  # fmt: skip
    operands = tuple(map(operand, (q, q_out, k, v, k_cache, v_cache)))
    return Launch(
        append_kernel, 2 * nheads_k * tiles + nheads * tiles_q, operands, (cos, sin),
        (cu_seqlens, cache_seqlens, seqused), counts, paging, options,
    )  # fmt: skip

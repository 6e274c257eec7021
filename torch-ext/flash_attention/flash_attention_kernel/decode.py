"""Attention of few queries to many keys: decoding, speculative decoding, short prefills.

The query heads of a group lie along the rows of a tile, so that K and V are read once per KV head,
and a sequence's keys may be split among programs, whose partial results combine.py merges
(Flash-Decoding, Dao et al. 2023).
"""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from .attend import attend
from .common import TAIL_D, UNSPECIALIZED, row_operand
from .masks import diagonal_shift, kv_block_range
from .pages import Paging, columns_from, find_keys
from .scores import exponent_scale, mods_at_head
from .seqlen import Lengths, find_block, partner_bounds, sequence_bounds
from .softmax import finalize, initial_state


@triton.jit
def packed_ptrs(operand, seq, heads, rows, COLS: tl.constexpr):
    """[BLOCK_M, COLS] pointers to `rows` of `heads`, both [BLOCK_M], of one sequence."""
    ptr = operand.ptr + tl.cast(seq, tl.int64) * operand.batch
    offs = rows.to(tl.int64) * operand.seq + heads.to(tl.int64) * operand.head
    return ptr + offs[:, None] + tl.arange(0, COLS)[None, :] * operand.dim


@triton.jit
def load_packed(operand, seq, heads, rows, inside, COLS: tl.constexpr, DIM: tl.constexpr):
    """[BLOCK_M, COLS]; 0 outside and past DIM."""
    mask = inside[:, None] & (tl.arange(0, COLS) < DIM)[None, :]
    return tl.load(packed_ptrs(operand, seq, heads, rows, COLS), mask=mask, other=0.0)


@triton.jit
def by_length(rank, lengths, batch, SIZE: tl.constexpr):
    """Which of `batch` sequences, SIZE at most, is number `rank` from the longest."""
    offs = tl.arange(0, SIZE)
    length = tl.load(lengths + offs, mask=offs < batch, other=-1)
    longer = length[None, :] > length[:, None]
    before = (length[None, :] == length[:, None]) & (offs[None, :] < offs[:, None])
    ranks = tl.sum((longer | before).to(tl.int32), 1)
    return tl.sum(tl.where(ranks == rank, offs, 0), 0)


@triton.jit
def split_bounds(begin, end, split, num_splits, split_keys, BLOCK_N: tl.constexpr):
    """-> the part of the keys [begin, end) that is this split's, in whole blocks from `begin` on:
    an even share, or, if split_keys > 0, `split_keys` counted from key 0."""
    end = tl.maximum(begin, end)
    if split_keys > 0:
        first = split * split_keys
        last = first + split_keys
    else:
        share = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), num_splits) * BLOCK_N
        first = begin + split * share
        last = first + share
    return tl.minimum(tl.maximum(first, begin), end), tl.maximum(tl.minimum(last, end), begin)


@triton.jit(do_not_specialize=(*UNSPECIALIZED, "num_splits", "split_keys"))
def decode_kernel(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
    rows_q, rows_k, batch, num_tiles, group_size, num_splits, split_keys, out_split,
    table, columns, batch_idx, entries, mods,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
    PARTIAL: tl.constexpr, PDL: tl.constexpr, SORTED: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tiles * nheads_k * num_splits,). Row r of a sequence's tiles is query
    r // group_size of query head r % group_size of the KV head's group.

    q, k, v, out are Operands, lse a pointer, table to entries a Paging's. PARTIAL: out and lse have
    a leading dimension of num_splits, of stride out_split for out, and a row without keys has lse
    -inf, not +inf. PDL: combine_kernel may be launched once every program has begun; it waits for
    the end. SORTED: a tile is a sequence, of which there are at most SORTED; the longest go first;
    0: as they come.
    """
    paging = Paging(table, columns, batch_idx, entries)
    if PARTIAL and PDL:
        gdc_launch_dependents()
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    nheads_k = tl.num_programs(0) // num_tiles // num_splits
    split = tl.program_id(0) % num_splits
    place = tl.program_id(0) // num_splits
    if SORTED > 0:  # all heads of the longest first
        head_k = place % nheads_k
        seq = by_length(place // nheads_k, seqused_k, batch, SORTED)
        block = 0
    else:
        head_k = place // num_tiles
        seq, block = find_block(place % num_tiles, q_lengths, BLOCK_M, group_size)
    q_first, seqlen_q = sequence_bounds(q_lengths, seq)
    k_first, seqlen_k = partner_bounds(k_lengths, seq, SPEC.page_size > 0)
    start_row = block * BLOCK_M
    if start_row < 0 or start_row >= seqlen_q * group_size:
        return

    row = start_row + tl.arange(0, BLOCK_M)
    q_pos = row // group_size
    heads = head_k * group_size + row % group_size
    inside = q_pos < seqlen_q
    q_rows = q_first + q_pos
    q_tile = load_packed(q, seq, heads, q_rows, inside, BLOCK_D, SPEC.head_dim)
    q_tail = q_tile
    if SPEC.head_dim > BLOCK_D:
        q_tail = load_packed(
            columns_from(q, BLOCK_D), seq, heads, q_rows, inside, TAIL_D, SPEC.head_dim - BLOCK_D
        )
    k, v, pages = find_keys(k, v, seq, batch, head_k, k_first, paging, SPEC)

    shift = diagonal_shift(seqlen_q, seqlen_k, SPEC)
    head_mods = mods_at_head(mods, seq, heads[:, None], seq < batch, shift, SPEC)
    scale = exponent_scale(mods, SPEC)
    owns_sink = (seq < batch) & (split == 0)
    acc, l_i, m_i = initial_state(mods, heads, owns_sink, scale, BLOCK_M, BLOCK_D)
    first_q = start_row // group_size
    span = (start_row + BLOCK_M - 1) // group_size - first_q + 1
    begin, full_begin, full_end, end = kv_block_range(
        first_q, span, shift, seqlen_k, mods, SPEC, BLOCK_N
    )
    first, last = split_bounds(begin, end, split, num_splits, split_keys, BLOCK_N)
    full_begin = tl.minimum(tl.maximum(full_begin, first), last)
    full_end = tl.maximum(tl.minimum(full_end, last), full_begin)
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q_tile, q_tail, q_pos, k, v, pages, first, full_begin, full_end, last,
        seqlen_k, mods, head_mods, SPEC, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q_tile, q_tail, q_pos, k, v, pages, full_begin, full_end, full_end,
        full_end, seqlen_k, mods, head_mods, SPEC, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    out_tile, lse_row = finalize(acc, l_i, m_i, scale)
    out_ptrs = packed_ptrs(out, seq, heads, q_rows, BLOCK_D)
    lse = row_operand(lse, nheads_k * group_size, q_lengths)
    lse_ptrs = lse.ptr + tl.cast(seq, tl.int64) * lse.batch + heads * lse.head + q_rows
    if PARTIAL:
        out_ptrs += tl.cast(split, tl.int64) * out_split
        sequences = batch
        if cu_seqlens_q is not None:
            sequences = 1
        lse_ptrs += split * (lse.head * nheads_k * group_size) * sequences
        lse_row = tl.where(lse_row == float("inf"), float("-inf"), lse_row)
    mask = inside[:, None] & (tl.arange(0, BLOCK_D) < SPEC.head_dim_v)[None, :]
    tl.store(out_ptrs, out_tile.to(out.ptr.dtype.element_ty), mask=mask)
    tl.store(lse_ptrs, lse_row, mask=inside)

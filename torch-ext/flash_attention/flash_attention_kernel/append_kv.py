"""New keys and values into a cache, rotated; and the queries of the same step, rotated."""

import triton
import triton.language as tl

from .common import at_head
from .pages import Paging, page_of
from .rotation import turn_rows
from .seqlen import Lengths, find_block, sequence_bounds

OVERFLOW: tl.constexpr = tl.constexpr(-(2**31))  # the length of a sequence that did not fit
UNSPECIALIZED = (
    "cu_seqlens", "cache_seqlens", "seqused", "rows", "rows_q", "batch", "capacity", "table_rows",
    "num_tiles", "num_tiles_q",
)  # fmt: skip


@triton.jit
def copy_rows(
    x_rows, x_dim, out_rows, out_dim, inside,
    FIRST: tl.constexpr, DIM: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Columns FIRST to DIM of the rows at pointers x_rows [BLOCK_M] into those at out_rows."""
    offs = tl.arange(0, BLOCK_D)[None, :]
    mask = inside[:, None] & (offs >= FIRST) & (offs < DIM)
    tile = tl.load(x_rows[:, None] + offs * x_dim, mask=mask, other=0.0)
    tl.store(out_rows[:, None] + offs * out_dim, tile.to(out_rows.dtype.element_ty), mask=mask)


@triton.jit
def turn_and_copy(
    x_rows, x_dim, out_rows, out_dim, inside, cos, sin, pos, table_rows,
    DIM: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, BLOCK_D: tl.constexpr,
    BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Rows of DIM columns, of which the first ROTARY_DIM are turned."""
    if ROTARY_DIM > 0:
        turn_rows(
            x_rows, x_dim, out_rows, out_dim, inside, cos, sin, pos, table_rows,
            ROTARY_DIM, INTERLEAVED, False, BLOCK_R,
        )  # fmt: skip
    if ROTARY_DIM < DIM:
        copy_rows(x_rows, x_dim, out_rows, out_dim, inside, ROTARY_DIM, DIM, BLOCK_D)


@triton.jit
def all_fit(length, new, seq, capacity, paging, SPEC: tl.constexpr, BLOCK_M: tl.constexpr):
    """Whether the cache has a place for the positions [length, length + new)."""
    missing = tl.where(length + new > capacity, 1, 0)
    if SPEC.page_size > 0:
        row = paging.table + tl.cast(seq, tl.int64) * paging.columns
        for start in tl.range(length, tl.minimum(length + new, capacity), BLOCK_M):
            pos = start + tl.arange(0, BLOCK_M)
            wanted = (pos >= 0) & (pos < length + new) & (pos < capacity)
            _, there = page_of(row, pos, wanted, paging.entries, SPEC)
            missing += tl.sum((wanted & ~there).to(tl.int32), 0)
    return missing == 0


@triton.jit
def cache_rows(cache, seq, head, pos, inside, capacity, paging, SPEC: tl.constexpr):
    """-> (pointers to the rows of the cache at positions `pos` [BLOCK_M], which of them exist)"""
    inside = inside & (pos >= 0) & (pos < capacity)
    if SPEC.page_size > 0:
        table_row = paging.table + tl.cast(seq, tl.int64) * paging.columns
        page, there = page_of(table_row, pos, inside, paging.entries, SPEC)
        offs = page * cache.batch + (pos % SPEC.page_size).to(tl.int64) * cache.seq
        return cache.ptr + tl.cast(head, tl.int64) * cache.head + offs, there
    else:
        entry = seq
        if paging.batch_idx is not None:
            entry = tl.load(paging.batch_idx + seq)
        there = inside & (entry >= 0) & (entry < paging.entries)
        cache = at_head(cache, entry, head, 0)
        return cache.ptr + pos.to(tl.int64) * cache.seq, there


@triton.jit(do_not_specialize=UNSPECIALIZED)
def append_kernel(
    q, q_out, k, v, k_cache, v_cache, cos, sin, cu_seqlens, cache_seqlens, seqused,
    rows, rows_q, batch, capacity, table_rows, num_tiles, num_tiles_q, nheads_k,
    table, columns, batch_idx, entries,
    SPEC: tl.constexpr, ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr,
    TURN_EACH: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """Grid: (2 * nheads_k * num_tiles + nheads * num_tiles_q,): tiles of BLOCK_M rows of one head
    of k, v and q. seqused[b] = cache_seqlens[b] + the new rows, or OVERFLOW if they did not fit.

    k's row i of a sequence goes to position cache_seqlens + i of its cache, turned by that
    position's angles; v's likewise, as it is; q_out's row i is q's, turned by those of
    cache_seqlens + i, or of cache_seqlens if not TURN_EACH. What lies past `capacity` or in no page
    is not written. q, q_out (not touched if nothing turns), k, v and the caches are Operands, table
    to entries a Paging's.
    """
    paging = Paging(table, columns, batch_idx, entries)
    program = tl.program_id(0)
    tiles_kv = 2 * nheads_k * num_tiles
    if program < tiles_kv:
        lengths = Lengths(cu_seqlens, None, None, rows, batch)
        head = program // num_tiles % nheads_k
        seq, block = find_block(program % num_tiles, lengths, BLOCK_M)
        first, seqlen = sequence_bounds(lengths, seq)
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        inside = row < seqlen
        if seq < batch and block >= 0:
            length = tl.load(cache_seqlens + seq)
            pos = length + row
            if program >= tiles_kv // 2:
                v_rows = at_head(v, seq, head, first).ptr + row.to(tl.int64) * v.seq
                out, there = cache_rows(v_cache, seq, head, pos, inside, capacity, paging, SPEC)
                copy_rows(v_rows, v.dim, out, v_cache.dim, there, 0, SPEC.head_dim_v, BLOCK_D)
            else:
                k_rows = at_head(k, seq, head, first).ptr + row.to(tl.int64) * k.seq
                out, there = cache_rows(k_cache, seq, head, pos, inside, capacity, paging, SPEC)
                turn_and_copy(
                    k_rows, k.dim, out, k_cache.dim, there, cos, sin, pos, table_rows,
                    SPEC.head_dim, ROTARY_DIM, INTERLEAVED, BLOCK_D, BLOCK_R,
                )  # fmt: skip
                if head == 0 and block == 0:
                    fits = all_fit(length, seqlen, seq, capacity, paging, SPEC, BLOCK_M)
                    tl.store(seqused + seq, tl.where(fits, length + seqlen, OVERFLOW))
    else:
        lengths = Lengths(cu_seqlens, None, None, rows_q, batch)
        tile = (program - tiles_kv) % num_tiles_q
        head = (program - tiles_kv) // num_tiles_q
        seq, block = find_block(tile, lengths, BLOCK_M)
        first, seqlen = sequence_bounds(lengths, seq)
        row = block * BLOCK_M + tl.arange(0, BLOCK_M)
        if ROTARY_DIM > 0:
            if block >= 0:
                pos = tl.load(cache_seqlens + seq, mask=seq < batch, other=-(2**30))
                pos = pos + tl.zeros_like(row)
                if TURN_EACH:
                    pos += row
                x_rows = at_head(q, seq, head, first).ptr + row.to(tl.int64) * q.seq
                out = at_head(q_out, seq, head, first).ptr + row.to(tl.int64) * q_out.seq
                turn_and_copy(
                    x_rows, q.dim, out, q_out.dim, row < seqlen, cos, sin, pos, table_rows,
                    SPEC.head_dim, ROTARY_DIM, INTERLEAVED, BLOCK_D, BLOCK_R,
                )  # fmt: skip

"""Where keys and values lie: dense, packed, in an entry of a cache, or in pages."""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from .common import Operand, at_head, load_tile


class Paging(NamedTuple):
    """How the sequences find their part of a cache. A kernel takes the fields one by one: of those
    of a tuple Triton would compile anew for each 1, and for multiples of 16.

    Paged: row b of `table` [batch, columns] int32 names the pages of sequence b, which are k[page]
    with SPEC.page_size rows each. Else sequence b is k[batch_idx[b]], or k[b] without `batch_idx`.
    """

    table: Any
    columns: int
    batch_idx: Any
    entries: int  # k.shape[0]: what lies outside is never touched


class Pages(NamedTuple):
    """Inside a kernel: the pages of one sequence; zeros where K is not paged."""

    row: Any  # pointer into the block table
    first: Any  # where in them its first key lies
    entries: Any


@triton.jit
def find_keys(k, v, seq, batch, head, first, paging, SPEC: tl.constexpr):
    """-> (k, v, pages): K and V of one head of one sequence, whose keys begin at row `first`."""
    if SPEC.page_size > 0:
        row = paging.table + tl.cast(seq, tl.int64) * paging.columns
        pages = Pages(row, first, paging.entries)
        return at_head(k, 0, head, 0), at_head(v, 0, head, 0), pages
    else:
        entry = seq
        if paging.batch_idx is not None:
            entry = tl.load(paging.batch_idx + seq, mask=seq < batch, other=0)
            entry = tl.maximum(tl.minimum(entry, paging.entries - 1), 0)
        return at_head(k, entry, head, first), at_head(v, entry, head, first), Pages(0, 0, 0)


@triton.jit
def page_of(table_row, row, inside, entries, SPEC: tl.constexpr):
    """-> (page as int64, whether there is one) of rows of a sequence, by its row of the table."""
    page = tl.load(table_row + row // SPEC.page_size, mask=inside, other=-1)
    return page.to(tl.int64), (page >= 0) & (page < entries)


@triton.jit
def tile_pages(pages, start, rows, ROWS: tl.constexpr, SPEC: tl.constexpr):
    """The pages of the keys [start, start + ROWS), int64, -1 where there is none: [ROWS], or the
    one that holds the whole tile; 0 if K is not paged. `attend` asks for them a step ahead, so that
    the loads of K and V wait for no other load, which would halve the stages of their pipeline."""
    if SPEC.page_size == 0:
        return 0
    else:
        pos = start
        if SPEC.gathers:
            pos += tl.arange(0, ROWS)
        page, there = page_of(pages.row, pages.first + pos, pos < rows, pages.entries, SPEC)
        return tl.where(there, page, -1)


@triton.jit
def load_keys(
    operand, pages, found, start, rows, ROWS: tl.constexpr, COLS: tl.constexpr,
    MASK_ROWS: tl.constexpr, DIM: tl.constexpr, SPEC: tl.constexpr,
):  # fmt: skip
    """`load_tile` of K or V wherever they lie; of a page that does not exist, 0. found: tile_pages
    of the same rows."""
    if SPEC.page_size == 0:
        return load_tile(operand, start, rows, ROWS, COLS, MASK_ROWS, DIM)
    else:
        if SPEC.gathers:
            row = (pages.first + start + tl.arange(0, ROWS)) % SPEC.page_size
            offs_d = tl.arange(0, COLS)
            offs = found * operand.batch + row.to(tl.int64) * operand.seq
            ptrs = operand.ptr + offs[:, None] + offs_d[None, :] * operand.dim
            mask = (found >= 0)[:, None] & (offs_d < DIM)[None, :]
            return tl.load(ptrs, mask=mask, other=0.0)
        else:
            in_page = at_head(operand, tl.maximum(found, 0), 0, start % SPEC.page_size)
            rows_left = tl.where(found >= 0, rows - start, 0)
            return load_tile(in_page, 0, rows_left, ROWS, COLS, True, DIM)


@triton.jit
def columns_from(operand, column):
    """The operand less its first columns."""
    return Operand(
        operand.ptr + column * operand.dim, operand.batch, operand.seq, operand.head, operand.dim
    )

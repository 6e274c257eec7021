"""Lengths and offsets: which sequence and which of its blocks a program works on."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Lengths(NamedTuple):
    """Where the sequences lie along the rows of a tensor.

    Dense: `rows` per sequence, `cu_seqlens` None. Packed: `rows` in all, sequence b in rows
    cu_seqlens[b] to cu_seqlens[b + 1]; rows past the last are sequence `batch`, a tail that the
    kernels give an empty partner, so that they fill it with zeros.
    """

    cu_seqlens: Any
    rows: int
    batch: int


@triton.jit
def sequence_bounds(lengths, seq):
    """-> (first row, number of rows) of sequence `seq`; the packed tail is seq == batch."""
    if lengths.cu_seqlens is None:
        return 0, lengths.rows
    else:
        # Clamped, so that a cu_seqlens that runs past the tensor never reads or writes outside it.
        first = tl.minimum(tl.load(lengths.cu_seqlens + seq), lengths.rows)
        last = lengths.rows
        if seq < lengths.batch:
            last = tl.minimum(tl.load(lengths.cu_seqlens + seq + 1), lengths.rows)
        return first, last - first


@triton.jit
def partner_bounds(lengths, seq):
    """-> (first row, number of rows) on the other side of the product; the tail sees nothing."""
    if lengths.cu_seqlens is None:
        return 0, lengths.rows
    else:
        first = 0
        length = 0
        if seq < lengths.batch:
            first = tl.minimum(tl.load(lengths.cu_seqlens + seq), lengths.rows)
            length = tl.minimum(tl.load(lengths.cu_seqlens + seq + 1), lengths.rows) - first
        return first, length


@triton.jit
def find_block(tile, lengths, BLOCK: tl.constexpr):
    """-> (sequence, block within it) of one of the `num_tiles` tiles of BLOCK rows.

    Packed: the tiles of sequence b begin at cu_seqlens[b] // BLOCK + b. That leaves each sequence
    room enough (ceil(n / B) <= floor((a + n) / B) - floor(a / B) + 1) and can be searched without
    a prefix sum, so neither max_seqlen nor a synchronisation is needed. Some tiles stay empty.
    """
    if lengths.cu_seqlens is None:
        blocks = tl.cdiv(lengths.rows, BLOCK)
        return tile // blocks, tile % blocks
    else:
        lo = 0
        hi = lengths.batch + 1
        while hi - lo > 1:  # invariant: first tile of `lo` <= tile < first tile of `hi`
            mid = (lo + hi) // 2
            if tl.load(lengths.cu_seqlens + mid) // BLOCK + mid <= tile:
                lo = mid
            else:
                hi = mid
        return lo, tile - (tl.load(lengths.cu_seqlens + lo) // BLOCK + lo)


def num_tiles(lengths: Lengths, block: int) -> int:
    """How many tiles of `block` rows `find_block` may be asked for."""
    if lengths.cu_seqlens is None:
        return lengths.batch * -(-lengths.rows // block)
    return lengths.rows // block + lengths.batch + 1

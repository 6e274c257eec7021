"""Lengths and offsets: which sequence and which of its blocks a program works on."""

from typing import Any, NamedTuple

import triton
import triton.language as tl


class Lengths(NamedTuple):
    """Where the sequences lie along the rows of a tensor.

    Dense: `rows` per sequence, `cu_seqlens` None. Packed: `rows` in all, sequence b in rows
    cu_seqlens[b] to cu_seqlens[b + 1]; rows past the last are sequence `batch`, a tail that the
    kernels give an empty partner, so that they fill it with zeros. Of a sequence's rows the first
    leftpad[b] are skipped and those from used[b] on do not count, where these are given.
    Paged: cu_seqlens, if given, are lengths alone, and `rows` is what a sequence's pages hold.
    """

    cu_seqlens: Any
    used: Any
    leftpad: Any
    rows: int
    batch: int


@triton.jit
def sequence_bounds(lengths, seq):
    """-> (first row, number of rows) of sequence `seq`; the packed tail is seq == batch."""
    first = 0
    length = lengths.rows
    if lengths.cu_seqlens is not None:
        # Clamped, so that a cu_seqlens that runs past the tensor never reads or writes outside it.
        first = tl.minimum(tl.load(lengths.cu_seqlens + seq), lengths.rows)
        last = lengths.rows
        if seq < lengths.batch:
            last = tl.minimum(tl.load(lengths.cu_seqlens + seq + 1), lengths.rows)
        length = last - first
    return used_part(lengths, seq, first, length, length)


@triton.jit
def partner_bounds(lengths, seq, PAGED: tl.constexpr = False):
    """-> (first row, number of rows) on the other side of the product; the tail sees nothing."""
    first = 0
    length = lengths.rows
    if lengths.cu_seqlens is not None:
        length = 0
        if seq < lengths.batch:
            if PAGED:
                length = tl.load(lengths.cu_seqlens + seq + 1) - tl.load(lengths.cu_seqlens + seq)
                length = tl.maximum(tl.minimum(length, lengths.rows), 0)
            else:
                first = tl.minimum(tl.load(lengths.cu_seqlens + seq), lengths.rows)
                length = tl.minimum(tl.load(lengths.cu_seqlens + seq + 1), lengths.rows) - first
    return used_part(lengths, seq, first, length, 0)


@triton.jit
def used_part(lengths, seq, first, length, tail):
    """What `used` and `leftpad` leave of the `length` rows from `first` on; the packed tail, which
    they do not describe, has `tail` rows."""
    if lengths.used is not None:
        used = tl.load(lengths.used + seq, mask=seq < lengths.batch, other=tail)
        length = tl.maximum(tl.minimum(length, used), 0)
    if lengths.leftpad is not None:
        leftpad = tl.load(lengths.leftpad + seq, mask=seq < lengths.batch, other=0)
        leftpad = tl.maximum(tl.minimum(leftpad, length), 0)
        first += leftpad
        length -= leftpad
    return first, length


@triton.jit
def find_block(tile, lengths, BLOCK: tl.constexpr, times=1):
    """-> (sequence, block within it) of one of the `num_tiles` tiles of BLOCK rows, where every row
    counts `times`.

    Packed: the tiles of sequence b begin at cu_seqlens[b] // BLOCK + b. That leaves each sequence
    room enough (ceil(n / B) <= floor((a + n) / B) - floor(a / B) + 1) and can be searched without
    a prefix sum, so neither max_seqlen nor a synchronisation is needed. Some tiles stay empty.
    """
    if lengths.cu_seqlens is None:
        blocks = tl.cdiv(lengths.rows * times, BLOCK)
        return tile // blocks, tile % blocks
    else:
        lo = 0
        hi = lengths.batch + 1
        while hi - lo > 1:  # invariant: first tile of `lo` <= tile < first tile of `hi`
            mid = (lo + hi) // 2
            if tl.load(lengths.cu_seqlens + mid) * times // BLOCK + mid <= tile:
                lo = mid
            else:
                hi = mid
        return lo, tile - (tl.load(lengths.cu_seqlens + lo) * times // BLOCK + lo)


@triton.jit
def first_tile(lengths, seq, BLOCK: tl.constexpr):
    """The tile that `find_block` finds to be a sequence's first."""
    if lengths.cu_seqlens is None:
        return seq * tl.cdiv(lengths.rows, BLOCK)
    else:
        return tl.load(lengths.cu_seqlens + seq) // BLOCK + seq


def num_tiles(lengths: Lengths, block: int, times: int = 1) -> int:
    """How many tiles of `block` rows `find_block` may be asked for."""
    if lengths.cu_seqlens is None:
        return lengths.batch * -(-lengths.rows * times // block)
    return lengths.rows * times // block + lengths.batch + 1

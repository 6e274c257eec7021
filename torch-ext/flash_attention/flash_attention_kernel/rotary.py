"""Rotary position embedding (Su et al. 2021): one program turns BLOCK_M rows of one head."""

import triton
import triton.language as tl

from .common import at_head, tile_mask, tile_ptrs
from .seqlen import Lengths, find_block, sequence_bounds

UNSPECIALIZED = ("cu_seqlens", "first_pos", "offset", "table_rows", "batch", "num_tiles")


@triton.jit
def load_angles(table, row_stride, pos, rows, identity, HALF: tl.constexpr, DIM: tl.constexpr):
    """[BLOCK_M, HALF] of cos or sin at the given positions; `identity` where the table ends."""
    offs = tl.arange(0, HALF)
    inside = ((pos >= 0) & (pos < rows))[:, None] & (offs < DIM)[None, :]
    ptrs = table + pos.to(tl.int64)[:, None] * row_stride + offs[None, :]
    return tl.load(ptrs, mask=inside, other=identity).to(tl.float32)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def rotary_kernel(
    x, out, cos, sin, cu_seqlens, first_pos, offset, table_rows, rows, batch, num_tiles,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tiles * nheads,). The first ROTARY_DIM columns of out = x turned by the angles of
    its position; rows past the tables as they are. In place if out is x.

    x, out are Operands; cos, sin [table_rows, ROTARY_DIM / 2] pointers; first_pos (batch,),
    or None, holds each sequence's first position, to which `offset` adds. CONJUGATE turns back.
    """
    lengths = Lengths(cu_seqlens, None, None, rows, batch)
    head = tl.program_id(0) // num_tiles
    seq, block = find_block(tl.program_id(0) % num_tiles, lengths, BLOCK_M)
    first, seqlen = sequence_bounds(lengths, seq)
    start_m = block * BLOCK_M
    if start_m < 0 or start_m >= seqlen:
        return
    x = at_head(x, seq, head, first)
    out = at_head(out, seq, head, first)
    pos = start_m + tl.arange(0, BLOCK_M) + offset
    if first_pos is not None:
        pos += tl.load(first_pos + seq, mask=seq < batch, other=0)
    pos = tl.where(seq < batch, pos, -1)  # the tail of a packed tensor has no position

    HALF: tl.constexpr = BLOCK_D // 2
    DIM: tl.constexpr = ROTARY_DIM // 2
    c = load_angles(cos, DIM, pos, table_rows, 1.0, HALF, DIM)
    s = load_angles(sin, DIM, pos, table_rows, 0.0, HALF, DIM)
    if CONJUGATE:
        s = -s
    if INTERLEAVED:  # pairs (2i, 2i + 1)
        mask = tile_mask(start_m, seqlen, BLOCK_M, BLOCK_D, True, ROTARY_DIM)
        tile = tl.load(tile_ptrs(x, start_m, BLOCK_M, BLOCK_D), mask=mask, other=0.0)
        x0, x1 = tl.split(tl.reshape(tile.to(tl.float32), [BLOCK_M, HALF, 2]))
        turned = tl.reshape(tl.join(x0 * c - x1 * s, x0 * s + x1 * c), [BLOCK_M, BLOCK_D])
        turned = turned.to(out.ptr.dtype.element_ty)
        tl.store(tile_ptrs(out, start_m, BLOCK_M, BLOCK_D), turned, mask=mask)
    else:  # pairs (i, i + ROTARY_DIM / 2)
        mask = tile_mask(start_m, seqlen, BLOCK_M, HALF, True, DIM)
        ptrs = tile_ptrs(x, start_m, BLOCK_M, HALF)
        x0 = tl.load(ptrs, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(ptrs + DIM * x.dim, mask=mask, other=0.0).to(tl.float32)
        ptrs = tile_ptrs(out, start_m, BLOCK_M, HALF)
        dtype = out.ptr.dtype.element_ty
        tl.store(ptrs, (x0 * c - x1 * s).to(dtype), mask=mask)
        tl.store(ptrs + DIM * out.dim, (x0 * s + x1 * c).to(dtype), mask=mask)

"""apply_rotary_emb: one program turns BLOCK_M rows of one head."""

import triton
import triton.language as tl

from .common import at_head
from .rotation import turn_rows
from .seqlen import Lengths, find_block, sequence_bounds

UNSPECIALIZED = ("cu_seqlens", "first_pos", "offset", "table_rows", "batch", "num_tiles")


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
    row = start_m + tl.arange(0, BLOCK_M)
    pos = row + offset
    if first_pos is not None:
        pos += tl.load(first_pos + seq, mask=seq < batch, other=0)
    pos = tl.where(seq < batch, pos, -1)  # the tail of a packed tensor has no position
    turn_rows(
        x.ptr + row.to(tl.int64) * x.seq, x.dim, out.ptr + row.to(tl.int64) * out.seq, out.dim,
        row < seqlen, cos, sin, pos, table_rows, ROTARY_DIM, INTERLEAVED, CONJUGATE, BLOCK_D,
    )  # fmt: skip

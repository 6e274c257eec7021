"""The end of a tile of the forward: its rows of the output and of lse."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from ..common import LN2, row_at_head, row_operand
from ..seqlen import Lengths
from .compat import async_store
from .pipeline import ROWS, at_head_late, opaque_zero, row_layout
from .products import rescaled


class Out(NamedTuple):
    """Where results go."""

    out: Any  # Operand
    tiles: Any  # its descriptor, or None: stored by rows
    lse: Any
    q_lengths: Any
    nheads: Any


@gluon.jit
def store_lse(out, l_i, m_i, q_pos, tile):
    """Write the tile's rows of lse, +inf where there was no key; m_i is in log2 units. -> by what
    its rows of out are to be multiplied yet"""
    empty = l_i == 0.0
    inverse = 1.0 / gl.where(empty, 1.0, l_i)
    natural = (m_i + gl.log2(l_i)) * LN2
    q, zero = out.q_lengths, opaque_zero()  # see at_head_late
    q_lengths = Lengths(q.cu_seqlens, q.used, q.leftpad, q.rows + zero, q.batch)
    rows = row_operand(out.lse, out.nheads + zero, q_lengths)
    lse = row_at_head(rows, tile.seq, tile.head, tile.q_first)
    gl.store(lse.ptr + q_pos, gl.where(empty, float("inf"), natural), mask=q_pos < tile.seqlen_q)
    return inverse


@gluon.jit
def store(out, acc, l_i, m_i, q_pos, tile, gain, WHICH: gl.constexpr, SPEC: gl.constexpr):
    """Write the tile's rows of out, whose columns lie in the parts of acc, times `gain`, and of lse
    that are this consumer's."""
    acc = rescaled(acc, store_lse(out, l_i, m_i, q_pos, tile) * gain)
    store_part(out, acc[0], tile, 0, WHICH, SPEC)
    if len(acc) == 2:
        store_part(out, acc[1], tile, acc[0].shape[1], WHICH, SPEC)


@gluon.jit
def store_part(out, acc, tile, FIRST: gl.constexpr, WHICH: gl.constexpr, SPEC: gl.constexpr):
    """Write rows of out, from column FIRST on."""
    ptr, stride = at_head_late(out.out, tile.seq, tile.head, tile.q_first, SPEC.head_dim_v)
    COLS: gl.constexpr = acc.shape[1]
    LAYOUT: gl.constexpr = row_layout(COLS)
    result = gl.convert_layout(acc.to(ptr.dtype.element_ty), LAYOUT)
    rows = tile.start_m + WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    cols = FIRST + gl.arange(0, COLS, layout=gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + rows.to(gl.int64)[:, None] * stride + cols[None, :]
    keep = (rows < tile.seqlen_q)[:, None] & (cols < SPEC.head_dim_v)[None, :]
    gl.store(ptrs, result, mask=keep)


@gluon.jit
def store_tile(out, q_tiles, acc, l_i, m_i, q_count, q_pos, tile, WHICH: gl.constexpr):
    """`store` by the copy engine, from where the tile's queries were."""
    part = rescaled(acc, store_lse(out, l_i, m_i, q_pos, tile))[0]
    q_tiles.tile(q_count, part.shape[0], part.shape[1]).store(part.to(q_tiles.tiles.dtype))
    fence_async_shared()
    place = q_tiles.tiles.index(q_count % q_tiles.STAGES)
    async_store(out.tiles, [tile.seq, tile.start_m + WHICH * ROWS, tile.head, 0], place)

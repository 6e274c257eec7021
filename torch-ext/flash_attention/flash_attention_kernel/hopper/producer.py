"""The forward's producer: the warp that draws tiles and has the copy engine load them."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .pipeline import ROWS
from .schedule import AHEAD, answer, ask, find_tile, leave, send_end


class Given(NamedTuple):
    """Descriptors of what is loaded, as in Rings."""

    q: Any
    k: Any
    q_more: Any
    k_more: Any
    v: Any
    v_more: Any


@gluon.jit
def coords_of_keys(entry, row, head, seq, paging, SPEC: gl.constexpr):
    """A block of keys, all of which a page holds, in K and V: entry or page, row in it, head."""
    if SPEC.page_size > 0:
        table = paging.table + seq.to(gl.int64) * paging.columns
        return gl.load(table + row // SPEC.page_size), row % SPEC.page_size, head, 0
    else:
        return entry, row, head, 0


@gluon.jit
def fill(channel, desc, more_desc, more, coords, count):
    """Have a tile copied, and the columns past its own, if there are any."""
    if more is None:
        channel.fill(desc, coords, count)
    else:
        past = [coords[0], coords[1], coords[2], desc.block_type.shape[3]]
        channel.fill_both(desc, coords, more_desc, past, more, count)


@gluon.jit
def of_values(coords, tile, desc):
    """Where V is: of e4m3 its transpose, of which tile.v_first is the sequence's first column; see
    transpose_values_kernel."""
    if desc.dtype == gl.float8e4nv:
        return coords[2], 0, coords[1] - tile.k_first + tile.v_first
    else:
        return coords


@gluon.jit
def load(
    rings, call, given, paging, group_size,
    SPEC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The producer: draws tiles; of each loads Q, and keys and values from the last block down, the
    keys a block ahead of the values, as they are read."""
    q_count = 0
    kv_count = 0
    tile_count = 0
    index = gl.program_id(0)
    while index < call.schedule.total:
        tile = find_tile(index, call, SPEC, BLOCK_M, BLOCK_N)
        rings.notes.send(tile, tile_count)
        tile_count += 1
        head_k = tile.head // group_size
        q_entry = 0
        k_entry = 0
        if call.q_lengths.cu_seqlens is None:
            q_entry = tile.seq
        if paging.batch_idx is not None:
            k_entry = gl.load(
                paging.batch_idx + tile.seq, mask=tile.seq < call.q_lengths.batch, other=0
            )
        elif call.k_lengths.cu_seqlens is None:
            k_entry = tile.seq
        row = tile.k_first + tile.last_n
        asked = ask(call.schedule.counters, 0, tile.blocks < AHEAD)
        if tile.blocks > 0:
            coords = coords_of_keys(k_entry, row, head_k, tile.seq, paging, SPEC)
            for i in range(tile.blocks):
                asked = ask(call.schedule.counters, asked, i == tile.blocks - AHEAD)
                if i == 0:
                    fill(rings.k, given.k, given.k_more, rings.k_more, coords, kv_count)
                    for part in gl.static_range(BLOCK_M // ROWS):
                        q_row = tile.q_first + tile.start_m + part * ROWS
                        q_coords = [q_entry, q_row, tile.head, 0]
                        fill(rings.q, given.q, given.q_more, rings.q_more, q_coords, q_count)
                        q_count += 1
                later = coords
                if i + 1 < tile.blocks:
                    row -= BLOCK_N
                    later = coords_of_keys(k_entry, row, head_k, tile.seq, paging, SPEC)
                    fill(rings.k, given.k, given.k_more, rings.k_more, later, kv_count + 1)
                at = of_values(coords, tile, given.v)
                fill(rings.v, given.v, given.v_more, rings.v_more, at, kv_count)
                coords = later
                kv_count += 1
        index = answer(asked) + gl.num_programs(0)
    send_end(rings.notes, tile_count)
    leave(call.schedule)

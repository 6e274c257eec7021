"""dQ: a warp group that multiplies it, and a warp that has the copy engine add it to its sums in
memory; if asked, in a fixed order, and so with the same bits. In wide.py, whose shared memory is
full, the warp group adds it, from its registers, which at head dims to 128 took 3 % more time.

It goes in pieces of ROWS x ROWS, of which two fit in shared memory, and of which one takes few
enough registers to leave the other warp groups theirs.

What a program then waits for was drawn before its own work, and is under way, or its program is at
its last steps before: see Schedule, and `load` in backward.py. With the waits on a warp of its own,
and not among the products, they cost 5 % where they had cost 21 (geometric mean of the anchor
points, H200).
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..masks import blocks_before, diagonal_shift
from .compat import async_add, async_store, reinterpreted
from .pipeline import ROWS, product_layout
from .schedule import answer, ask, first_block, next_block, received_work, value_of_note

STORED: gl.constexpr = gl.constexpr(1 << 30)  # more than can ask


class Sums(NamedTuple):
    """Where dQ is summed, in float32, piece after piece."""

    ptr: Any  # if the warp group adds it itself, else None
    tiles: Any  # a descriptor, if not
    turns: Any  # int32 of each block: how many have added to it, or, in any order, have asked to,
    # plus STORED when the first's is there; or None: sums were zeroed
    done: Any  # int32 of each KV head, packed of all sequences: blocks of keys that have added to
    # all that see them; or None
    ring: Any  # of pieces, on their way to `add`; or None


@gluon.constexpr_function
def piece_layout():
    """Of a piece in the ring and in memory: each thread's numbers by fours, so that a warp writes
    512 bytes in a row, and the copy engine adds all of them in a row; see finish_kernel."""
    rows = [[1 << bit, 0] for bit in range(6)]
    cols = [[0, 1 << bit] for bit in range(6)]
    return gl.SharedLinearLayout([cols[0], rows[3], *cols[1:3], *rows[:3], *rows[4:], *cols[3:]])


@gluon.constexpr_function
def pieces_of(HEAD_DIM, BLOCK_M):
    """Of a block of queries."""
    return BLOCK_M // ROWS * ((HEAD_DIM + ROWS - 1) // ROWS)


@gluon.jit
def multiply_piece(
    ds, k, count, kv_count, row: gl.constexpr, col: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """dS K, ROWS queries from `row` on by ROWS columns from `col` on, of all the work's keys. ds: a
    ring for every ROWS of these."""
    LAYOUT: gl.constexpr = product_layout(ROWS)
    part = gl.zeros([ROWS, ROWS], gl.float32, LAYOUT)
    for which in gl.static_range(len(ds)):
        ds_tile = ds[which].receive(count, ROWS, BLOCK_M).slice(row, ROWS, 1)
        k_tile = k.tile(kv_count + which, ROWS, BLOCK_D).slice(col, ROWS, 1)
        left = ds_tile.permute((1, 0))
        part = warpgroup_mma(left, k_tile, part, use_acc=which > 0, is_async=True)
    return warpgroup_mma_wait(0, deps=[part])


@gluon.jit
def hand_on(part, ring, passed):
    """Leave piece number `passed` to `add`."""
    LAYOUT: gl.constexpr = piece_layout()
    pieces = reinterpreted(ring.tiles, gl.float32, [2, ROWS, ROWS], LAYOUT)
    ring.claim(passed)
    pieces.index(passed % 2).store(part)
    ring.announce(passed)


@gluon.jit
def add_now(part, ptr):
    """Add a piece, to the one at `ptr`, which lies by piece_layout."""
    flat = part.reshape([4, 2, 8, 8, 4, 2]).permute((3, 0, 2, 4, 1, 5)).reshape([ROWS * ROWS])
    offs = gl.arange(0, ROWS * ROWS, layout=flat.type.layout)
    gl.atomic_add(ptr + offs, flat, sem="relaxed")


@gluon.jit
def multiply_queries(
    rings, call, sums, group_size, tiles_q, SPEC: gl.constexpr, DOWN: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """dQ of every block of queries, of the keys that are the program's at the time."""
    PIECES: gl.constexpr = pieces_of(SPEC.head_dim, BLOCK_M)
    HALVES: gl.constexpr = len(rings.ds)
    work_count = 0
    steps = value_of_note(rings.notes, work_count)
    while steps >= 0:
        work = received_work(rings.notes, steps, work_count, call, SPEC)
        rings.notes.release(work_count)
        for which in gl.static_range(HALVES):
            if steps > 0:
                rings.k.wait(work.kv_count + which)
        start_m = first_block(work, DOWN, BLOCK_M)
        head = work.head_k * group_size
        for count in range(work.count, work.count + steps):
            for piece in gl.static_range(PIECES):
                part = multiply_piece(
                    rings.ds, rings.k, count, work.kv_count, piece * ROWS // BLOCK_D * ROWS,
                    piece * ROWS % BLOCK_D, BLOCK_M, BLOCK_D,
                )  # fmt: skip
                if piece == PIECES - 1:
                    for which in gl.static_range(HALVES):
                        rings.ds[which].release(count)
                if sums.ring is not None:
                    hand_on(part, sums.ring, count * PIECES + piece)
                else:
                    tile = head * tiles_q + work.first_tile + start_m // BLOCK_M
                    place = tile.to(gl.int64) * (BLOCK_M * BLOCK_D) + piece * (ROWS * ROWS)
                    add_now(part, sums.ptr + place)
            start_m, head = next_block(start_m, head, work, group_size, DOWN, BLOCK_M)
        for which in gl.static_range(HALVES):
            if steps > 0:
                rings.k.release(work.kv_count + which)
        work_count += 1
        steps = value_of_note(rings.notes, work_count)


@gluon.jit
def await_turn(turn, number):
    """Wait until `turn`, in memory, is at least `number`."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred early; .reg .b32 seen;
        AGAIN: ld.acquire.gpu.global.b32 seen, [$1];
        setp.lt.s32 early, seen, $2;
        @early bra AGAIN;
        mov.b32 $0, 0;
        }""", "=r,l,r", [turn, number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def pass_turn(turn, number):
    """Wait until all that the copy engine was told is in memory, and add `number` to `turn`, for
    which others wait: one warp."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred other; .reg .b32 lane;
        cp.async.bulk.wait_group 0;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.ne.u32 other, lane, 0;
        @other bra DONE;
        red.release.gpu.global.add.u32 [$1], $2;
        DONE: mov.b32 $0, 0;
        }""", "=r,l,r", [turn, number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def copy_pieces(sums, block, count, is_first, PIECES: gl.constexpr):
    """Store or add the pieces of a block of queries, number `count` in the program's rings."""
    HEIGHT: gl.constexpr = sums.tiles.block_shape[0]
    for piece in gl.static_range(PIECES):
        passed = count * PIECES + piece
        sums.ring.wait(passed)
        place = sums.ring.tiles.index(passed % 2)
        row = (block * PIECES + piece) * HEIGHT
        if is_first:
            async_store(sums.tiles, [row, 0], place)
        else:
            async_add(sums.tiles, [row, 0], place)
        tma.store_wait(0)  # it has read it
        sums.ring.release(passed)


@gluon.jit
def add(
    rings, call, sums, group_size, tiles_q, SPEC: gl.constexpr, DOWN: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Add each dQ to `sums`, of which the first is stored: to zero them took 30 us at the anchor
    points. DOWN: in the order of the keys. Else in any, but after the first, who is the first to
    have asked.

    A turn is passed on, and the first's sum reported, when the next is due: meanwhile the sum is on
    its way. But before other work it is done at once: that may wait for who waits for this. No
    circle waits: a block's first has asked for it before who waits for him, and if he waits
    himself, it is for a block for which he has asked before."""
    PIECES: gl.constexpr = pieces_of(SPEC.head_dim, BLOCK_M)
    work_count = 0
    steps = value_of_note(rings.notes, work_count)
    while steps >= 0:
        work = received_work(rings.notes, steps, work_count, call, SPEC)
        start_m = first_block(work, DOWN, BLOCK_M)
        head = work.head_k * group_size
        tile = head * tiles_q + work.first_tile + start_m // BLOCK_M
        before = 0  # not `tile`: Triton 3.6 would see no change in `before = tile` below
        passes = False
        asked = 0
        if not DOWN:
            asked = ask(sums.turns + tile, 0, steps > 0)
        for step in range(0, steps):
            if DOWN:
                shift = diagonal_shift(work.seqlen_q, work.seqlen_k, SPEC)
                turn = blocks_before(
                    work.start_n, start_m, shift, work.seqlen_k, call.mods, SPEC, BLOCK_N
                )
                await_turn(sums.turns + tile, turn)
                if passes:
                    pass_turn(sums.turns + before, 1)
                is_first = turn == 0
                passes = True
            else:
                is_first = answer(asked) == 0
                if passes:
                    pass_turn(sums.turns + before, STORED)
                if not is_first:
                    await_turn(sums.turns + tile, STORED)
                passes = is_first
            before = tile
            start_m, head = next_block(start_m, head, work, group_size, DOWN, BLOCK_M)
            tile = head * tiles_q + work.first_tile + start_m // BLOCK_M
            if not DOWN:
                asked = ask(sums.turns + tile, 0, step + 1 < steps)
            copy_pieces(sums, before, work.count + step, is_first, PIECES)
        if passes:
            pass_turn(sums.turns + before, 1 if DOWN else STORED)
        head_k = work.head_k
        if call.k_lengths.cu_seqlens is None:
            head_k += work.seq * call.nheads
        pass_turn(sums.done + head_k, 1)
        rings.notes.release(work_count)
        work_count += 1
        steps = value_of_note(rings.notes, work_count)
    tma.store_wait(0)

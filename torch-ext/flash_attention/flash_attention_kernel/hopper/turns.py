"""The warp that has the copy engine add dQ to its sums in memory; if asked, in a fixed order, and
so with the same bits.

What a program then waits for was drawn before its own work, and is under way: see Schedule, and
`load` in backward.py. With the waits on a warp of its own, and not among the products, they cost
5 % where they had cost 21 (geometric mean of the anchor points, H200).
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from ..masks import blocks_before, diagonal_shift
from .compat import async_add
from .schedule import first_block, next_block, received_work, value_of_note


@gluon.jit
def await_turn(turn, number):
    """Wait until `turn`, in memory, is `number`."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred other; .reg .b32 seen;
        AGAIN: ld.acquire.gpu.global.b32 seen, [$1];
        setp.ne.b32 other, seen, $2;
        @other bra AGAIN;
        mov.b32 $0, 0;
        }""", "=r,l,r", [turn, number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def pass_turn(turn):
    """Wait until all that the copy engine was told is in memory, and let the next add: one warp."""
    gl.inline_asm_elementwise(
        """{
        .reg .pred other; .reg .b32 lane;
        cp.async.bulk.wait_group 0;
        bar.warp.sync 0xffffffff;
        mov.u32 lane, %laneid;
        setp.ne.u32 other, lane, 0;
        @other bra DONE;
        red.release.gpu.global.add.u32 [$1], 1;
        DONE: mov.b32 $0, 0;
        }""", "=r,l", [turn], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def add(
    rings, dq, call, sums, group_size, tiles_q,
    SPEC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Add each dQ of the consumer's to `sums`; with turns, in the order of the keys. A turn is
    passed on when the next has come: meanwhile this one's sum is on its way. But before other work
    it is passed on at once: that may wait for who waits for this."""
    ROWS: gl.constexpr = sums.tiles.block_shape[0]
    IN_TURN: gl.constexpr = sums.turns is not None
    work_count = 0
    steps = value_of_note(rings.notes, work_count)
    while steps >= 0:
        work = received_work(rings.notes, steps, work_count, call, SPEC)
        start_m = first_block(work, IN_TURN, BLOCK_M)
        head = work.head_k * group_size
        before = 0
        for step in range(0, steps):
            tile = head * tiles_q + work.first_tile + start_m // BLOCK_M
            if IN_TURN:
                shift = diagonal_shift(work.seqlen_q, work.seqlen_k, SPEC)
                turn = blocks_before(
                    work.start_n, start_m, shift, work.seqlen_k, call.mods, SPEC, BLOCK_N
                )
                await_turn(sums.turns + tile, turn)
                if step > 0:
                    pass_turn(sums.turns + before)
            mbarrier.wait(sums.ready, work.count + step & 1)
            async_add(sums.tiles, [tile * ROWS, 0], dq)
            tma.store_wait(0)  # it has read it
            mbarrier.arrive(sums.free, count=1)
            before = tile
            start_m, head = next_block(start_m, head, work, group_size, IN_TURN, BLOCK_M)
        if IN_TURN:
            if steps > 0:
                pass_turn(sums.turns + before)
        rings.notes.release(work_count)
        work_count += 1
        steps = value_of_note(rings.notes, work_count)
    tma.store_wait(0)

"""Sums in memory that the copy engine adds to in a fixed order, and so with the same bits."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..masks import kv_block_range


@gluon.jit
def turn_of(work, start_m, shift, mods, SPEC: gl.constexpr, BLOCK_N: gl.constexpr):
    """How many blocks of keys add to the dQ of a block of queries before this one: all that come
    before it, but for those to the left of the window. All of them have been drawn before."""
    first = 0
    if SPEC.left:
        first, _, _, _ = kv_block_range(start_m, 1, shift, work.seqlen_k, mods, SPEC, BLOCK_N)
    return (work.start_n - first) // BLOCK_N


@gluon.jit
def await_turn(turn, number):
    """Wait, before the copy engine is told to add, until `turn`, in memory, is `number`."""
    # The first warp, one of whose threads tells it.
    gl.inline_asm_elementwise(
        """{
        .reg .pred other; .reg .b32 thread, seen;
        mov.u32 thread, %tid.x;
        setp.ge.u32 other, thread, 32;
        @other bra DONE;
        AGAIN: ld.acquire.gpu.global.b32 seen, [$1];
        setp.ne.b32 other, seen, $2;
        @other bra AGAIN;
        DONE: mov.b32 $0, 0;
        }""", "=r,l,r", [turn, number], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def pass_turn(turns, tile, PENDING: gl.constexpr):
    """Wait until all but the last PENDING, 0 or 1, of what the copy engine was told is in memory,
    and let the next add to `tile`; nothing if that is negative."""
    WAIT: gl.constexpr = "cp.async.bulk.wait_group 1;" if PENDING else "cp.async.bulk.wait_group 0;"
    gl.inline_asm_elementwise(
        """{
        .reg .pred other; .reg .b32 thread;
        mov.u32 thread, %tid.x;
        setp.ge.u32 other, thread, 32;
        @other bra DONE;
        setp.lt.s32 other, $2, 0;
        @other bra DONE;
        """ + WAIT + """
        bar.warp.sync 0xffffffff;
        setp.ne.u32 other, thread, 0;
        @other bra DONE;
        red.release.gpu.global.add.u32 [$1], 1;
        DONE: mov.b32 $0, 0;
        }""", "=r,l,r", [turns + tile, tile], dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip

"""Sums in memory that the copy engine adds to in a fixed order, and so with the same bits.

What a program waits for was drawn before its own work, and is under way: see Schedule, and `load`
in backward.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl


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

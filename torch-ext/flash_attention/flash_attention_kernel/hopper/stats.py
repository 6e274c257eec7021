"""What surrounds hopper/backward.py: its rows' stats before; after it dQ from its float32 sums, and
dK and dV from those of a group's parts."""

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common import (
    LN2,
    LOG2E,
    at_head,
    load_row,
    load_tile,
    row_at_head,
    row_operand,
    store_row,
    store_tile,
)
from ..seqlen import Lengths, find_block, sequence_bounds


@triton.jit(do_not_specialize=("rows", "batch", "num_tiles"))
def prepare_kernel(
    out, dout, lse, dlse, delta, stats, sums, turns, cu_seqlens, seqused, rows, batch, num_tiles,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DIM: tl.constexpr, SUMS_D: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tiles * nheads,) over blocks of BLOCK_M query rows. Writes their stats [2,
    BLOCK_M], lse in log2 units and -delta = dlse - rowsum(dO * O) (dlse None: 0), zeros their
    number in `turns` and one of Sums.done behind it or, if `turns` is None, their BLOCK_M * SUMS_D
    sums, and writes `delta` by rows, like lse, unless that is None. A row that does not exist has
    lse +inf, and so no weights. PDL: hopper_backward_kernel begins under its last programs.

    out and dout are Operands, the others pointers; stats and sums float32, block after block.
    """
    if PDL:
        gdc_launch_dependents()
    lengths = Lengths(cu_seqlens, seqused, None, rows, batch)
    nheads = tl.num_programs(0) // num_tiles
    head = tl.program_id(0) // num_tiles
    seq, block = find_block(tl.program_id(0) % num_tiles, lengths, BLOCK_M)
    q_first, seqlen = sequence_bounds(lengths, seq)
    start_m = block * BLOCK_M
    block = tl.cast(tl.program_id(0), tl.int64)
    if turns is not None:
        tl.store(turns + block, 0)
        tl.store(turns + tl.num_programs(0) + block, 0)
    if start_m < 0 or start_m >= seqlen:
        return
    lse_head = row_at_head(row_operand(lse, nheads, lengths), seq, head, q_first)
    lse_row = load_row(lse_head, start_m, seqlen, float("inf"), BLOCK_M, True)
    dout_head = at_head(dout, seq, head, q_first)
    dout_tile = load_tile(dout_head, start_m, seqlen, BLOCK_M, BLOCK_D, True, DIM)
    out_head = at_head(out, seq, head, q_first)
    out_tile = load_tile(out_head, start_m, seqlen, BLOCK_M, BLOCK_D, True, DIM)
    delta_row = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        dlse_head = row_at_head(row_operand(dlse, nheads, lengths), seq, head, q_first)
        delta_row -= load_row(dlse_head, start_m, seqlen, 0.0, BLOCK_M, True)
    delta_row = tl.where(lse_row == float("inf"), 0.0, delta_row)  # no keys, no gradient
    if delta is not None:
        delta_head = row_at_head(row_operand(delta, nheads, lengths), seq, head, q_first)
        store_row(delta_head, start_m, seqlen, delta_row, BLOCK_M)
    row = tl.arange(0, BLOCK_M)
    place = row // 16 * 16 + row // 2 % 4 * 4 + row // 8 % 2 * 2 + row % 2  # by stats_layout
    offs = block * (2 * BLOCK_M) + place
    tl.store(stats + offs, lse_row * LOG2E)
    tl.store(stats + offs + BLOCK_M, -delta_row)
    if turns is None:
        SIZE: tl.constexpr = BLOCK_M * SUMS_D
        tl.store(sums + block * SIZE + tl.arange(0, SIZE), tl.zeros([SIZE], tl.float32))


@triton.jit
def in_rows(flat, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] from pieces of 64 x 64, each in the order of piece_layout, hopper/sums.py."""
    tile = tl.reshape(flat, [ROWS // 64, COLS // 8, 4, 8, 4, 2, 2])
    return tl.reshape(tl.permute(tile, (0, 2, 5, 3, 1, 4, 6)), [ROWS, COLS])


@triton.jit
def await_count(ptr, number):
    """Wait until the int32 at `ptr` is at least `number`; asks now and then."""
    tl.inline_asm_elementwise(
        """{
        .reg .pred early; .reg .b32 seen;
        ld.acquire.gpu.global.b32 seen, [$1];
        setp.lt.s32 early, seen, $2;
        @!early bra DONE;
        AGAIN: nanosleep.u32 500;
        ld.acquire.gpu.global.b32 seen, [$1];
        setp.lt.s32 early, seen, $2;
        @early bra AGAIN;
        DONE: mov.b32 $0, 0;
        }""", "=r,l,r", [ptr, number], dtype=tl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@triton.jit(do_not_specialize=("rows", "batch", "num_tiles", "group_size", "works"))
def finish_kernel(
    dq, sums, turns, cu_seqlens, seqused, rows, batch, num_tiles, group_size, works, scale_log2,
    BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr, DIM: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tiles * nheads,). dq, an Operand, = softmax_scale * sums; but 0 of a block to
    which nobody has added, whose number in `turns`, unless they are None, is 0.

    PDL: beside the last programs of hopper_backward_kernel, on multiprocessors for which it has no
    more work, and in its order; a head when all of its KV head's blocks of keys, so many `works`,
    are done, which Sums.done behind `turns` counts. On zeros the anchor points' backward is
    1.5 % faster so, of which prepare_kernel's end under that kernel's beginning is 0.2 (H200)."""
    lengths = Lengths(cu_seqlens, seqused, None, rows, batch)
    nheads = tl.num_programs(0) // num_tiles
    number = tl.program_id(0)
    if PDL:
        if number == tl.num_programs(0) - 1:
            gdc_wait()  # what follows this kernel is to follow that one, too
    if cu_seqlens is None:
        per_seq = num_tiles // batch
        seq, head = number // (per_seq * nheads), number // per_seq % nheads
        block = number % per_seq
        number = head * num_tiles + seq * per_seq + block
        head_k = (seq * nheads + head) // group_size
    else:
        head = number // num_tiles
        seq, block = find_block(number % num_tiles, lengths, BLOCK_M)
        head_k = head // group_size
    if PDL:
        await_count(turns + tl.num_programs(0) + head_k, works)
    q_first, seqlen = sequence_bounds(lengths, seq)
    start_m = block * BLOCK_M
    if start_m < 0 or start_m >= seqlen:
        return
    SIZE: tl.constexpr = BLOCK_M * BLOCK_D
    ptrs = sums + tl.cast(number, tl.int64) * SIZE + tl.arange(0, SIZE)
    if turns is not None:
        added = tl.load(turns + number) > 0
        flat = tl.load(ptrs, mask=added, other=0.0)
    else:
        flat = tl.load(ptrs)
    tile = in_rows(flat, BLOCK_M, BLOCK_D) * (scale_log2 * LN2)
    store_tile(at_head(dq, seq, head, q_first), start_m, seqlen, tile, BLOCK_M, BLOCK_D, DIM)


@triton.jit(do_not_specialize=("rows", "seqlen"))
def sum_parts_kernel(
    out, parts, rows, seqlen, nheads, PARTS: tl.constexpr, BLOCK: tl.constexpr,
    BLOCK_D: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Grid: over BLOCK of the heads of all rows. out, an Operand of sequences of `seqlen` rows, =
    the sums of the PARTS heads that parts [rows, nheads * PARTS, DIM], float32, has for each of
    its own."""
    number = tl.cast(tl.program_id(0), tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row, head = number // nheads, number % nheads
    cols = tl.arange(0, BLOCK_D)
    mask = (row < rows)[:, None] & (cols < DIM)[None, :]
    ptrs = parts + number[:, None] * (PARTS * DIM) + cols[None, :]
    total = tl.zeros([BLOCK, BLOCK_D], tl.float32)
    for part in tl.static_range(PARTS):
        total += tl.load(ptrs + part * DIM, mask=mask, other=0.0)
    ptr = out.ptr + row // seqlen * out.batch + row % seqlen * out.seq + head * out.head
    ptrs = ptr[:, None] + cols[None, :] * out.dim
    tl.store(ptrs, total.to(out.ptr.dtype.element_ty), mask)

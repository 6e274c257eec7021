"""Attention backward for sm_90 in one pass of five products: FlashAttention-2, algorithm 2.

Persistent: a program draws BLOCK_N keys of a KV head at a time; a warp loads them, and block by
block the Q and dO of every query head that sees them. Two warp groups have ROWS of the keys each:
Sᵀ = KQᵀ and dPᵀ = VdOᵀ come from shared memory; Pᵀ and dSᵀ stay in registers as left factors of
dV += PᵀdO and dK += dSᵀQ; dSᵀ goes to shared memory, too, for dQ = dS K, which a third warp group
multiplies (sums.py). The two wait for nothing but their tiles, so that the tensor cores work for
one and for dQ while the other is at its arithmetic: 5 % faster than with all eight warps in step,
dQ's product divided among them (geometric mean of the anchor points, H200).

A step takes an H200 3,400 cycles at head_dim 128 and 3,950 at 64, where its products take 2,560 and
shared memory, by the bytes, 2,900: left factors are read there again and again, and for wider tiles
there are no registers. dP's product starts when P is in half precision, two to a register; both in
float32 do not fit beside dK and dV. dS is computed from that P: dQ's error is 1.2 times what it is
from float32. Nothing is under way when a step ends, as ptxas waits for each product of a loop that
carries one in flight, or the next S beside left factors in registers.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from ..common import LN2
from ..masks import diagonal_shift, keep_mask_by_key, q_block_range
from ..scores import mods_at_head, probability, product_grad, score_grad
from ..seqlen import Lengths, partner_bounds
from .compat import reinterpreted
from .grads import Grads, store, store_grad
from .pipeline import (
    ROWS,
    columns,
    first_column,
    inner_product,
    make_channel,
    make_notes,
    make_ring,
    opaque_zero,
    packed,
    product_layout,
    row_layout,
    scrub,
    unpacked,
)
from .schedule import (
    AHEAD,
    UNSPECIALIZED,
    WORK_FIELDS,
    Call,
    Schedule,
    answer,
    ask,
    find_work,
    first_block,
    leave,
    next_block,
    received_keys,
    received_work,
    send_no_work,
    value_of_note,
)
from .sums import Sums, add, multiply_queries


class Rings(NamedTuple):
    """What passes between the warps. k and v: ROWS keys each, of both consumers by turns."""

    k: Any
    v: Any
    q: Any
    dout: Any
    stats: Any  # [STAGES, 2 * BLOCK_M]: of dout's rows lse in log2 units, then -delta
    stats_rows: Any  # [2 * STAGES, BLOCK_M]: the same
    ds: Any  # of either consumer: dSᵀ, [ROWS, BLOCK_M]
    notes: Any


@gluon.constexpr_function
def stats_layout(SIZE):
    """Of lse and delta: by fours that one thread reads, four threads' in a row; see
    prepare_kernel."""
    bits = [[1 << bit] for bit in range(SIZE.bit_length() - 1)]
    return gl.SharedLinearLayout([bits[0], bits[3], *bits[1:3], *bits[4:]])


@gluon.jit
def make_rings(
    q, k, v, dout, stats, HALVES: gl.constexpr, K_TILES: gl.constexpr, NOTED: gl.constexpr,
    STAGES: gl.constexpr, Q_TILES: gl.constexpr, BLOCK_M: gl.constexpr,
):  # fmt: skip
    """For descriptors. HALVES: a work's tiles of ROWS keys, with a ring of dS each; K has room for
    K_TILES. The notes are read by NOTED roles."""
    STATS: gl.constexpr = stats_layout(BLOCK_M)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], q.dtype)
    stats_tiles = gl.allocate_shared_memory(stats.dtype, [STAGES] + stats.block_shape, stats.layout)
    stats_rows = reinterpreted(stats_tiles, gl.float32, [2 * STAGES, BLOCK_M], STATS)
    k_tiles, v_tiles = make_channel(k, K_TILES, 2), make_channel(v, HALVES, 1)
    q_tiles, dout_tiles = make_channel(q, Q_TILES, 2), make_channel(dout, STAGES, 2)
    ds = (make_ring(q.dtype, ROWS, BLOCK_M, DS),)
    if HALVES == 2:
        ds = (ds[0], make_ring(q.dtype, ROWS, BLOCK_M, DS))
    notes = make_notes(WORK_FIELDS, NOTED)
    return Rings(k_tiles, v_tiles, q_tiles, dout_tiles, stats_tiles, stats_rows, ds, notes)


@gluon.jit
def load(
    rings, call, q, k, v, dout, stats, group_size, parts, tiles_q,
    SPEC: gl.constexpr, DOWN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The producer: draws work; loads its K and V, then Q, dO and their rows' stats, head by head.
    stats: [nheads, tiles_q, 2 * BLOCK_M], flat. DOWN: the last queries first."""
    HALVES: gl.constexpr = BLOCK_N // ROWS
    SPARE: gl.constexpr = rings.k.STAGES - HALVES  # tiles of K that the work before leaves free
    gdc_launch_dependents()  # finish_kernel's programs, where there is no more work
    count = 0
    kv_count, work_count = 0, 0
    index = gl.program_id(0)
    if DOWN:  # a program that does not run yet must have no work that others wait for
        index = answer(ask(call.schedule.counters, 0, True))
    while index < call.schedule.total:
        work = find_work(index, call, count, kv_count, group_size, SPEC, BLOCK_M, BLOCK_N)
        rings.notes.send(work, work_count)
        work_count += 1
        q_entry = 0
        k_entry = 0
        if call.q_lengths.cu_seqlens is None:
            q_entry = work.seq
        if call.k_lengths.cu_seqlens is None:
            k_entry = work.seq
        q_first, _ = partner_bounds(call.q_lengths, work.seq)
        head = work.head_k * group_size
        start_m = first_block(work, DOWN, BLOCK_M)
        k_row = work.k_first + work.start_n
        head_k = work.head_k // parts
        asked = ask(call.schedule.counters, 0, work.steps < AHEAD)
        for i in range(work.steps):
            asked = ask(call.schedule.counters, asked, i == work.steps - AHEAD)
            if i == 0:
                for which in gl.static_range(SPARE):
                    rings.k.fill(k, [k_entry, k_row + which * ROWS, head_k, 0], kv_count + which)
            rings.q.fill(q, [q_entry, q_first + start_m, head, 0], count)
            tile = head * tiles_q + work.first_tile + start_m // BLOCK_M
            rings.dout.fill_both(
                dout, [q_entry, q_first + start_m, head, 0],
                stats, [tile * (2 * BLOCK_M)], rings.stats, count,
            )  # fmt: skip
            if i == 0:  # what has its place only when the work before is done
                for which in gl.static_range(SPARE, HALVES):
                    rings.k.fill(k, [k_entry, k_row + which * ROWS, head_k, 0], kv_count + which)
                for which in gl.static_range(HALVES):
                    rings.v.fill(v, [k_entry, k_row + which * ROWS, head_k, 0], kv_count + which)
            count += 1
            start_m, head = next_block(start_m, head, work, group_size, DOWN, BLOCK_M)
        kv_count += HALVES * gl.minimum(work.steps, 1)
        index = answer(asked)
        if not DOWN:
            index += gl.num_programs(0)
    send_no_work(rings.notes, work_count)
    leave(call.schedule)


@gluon.jit
def clean(tiles, count, rows, SCRUB: gl.constexpr, HEIGHT: gl.constexpr, COLS: gl.constexpr):
    """Wait for a tile -> it; of which, if SCRUB, no more than `rows` rows are this sequence's."""
    tiles.wait(count)
    return cleaned(tiles, count, rows, SCRUB, HEIGHT, COLS)


@gluon.jit
def cleaned(tiles, count, rows, SCRUB: gl.constexpr, HEIGHT: gl.constexpr, COLS: gl.constexpr):
    """`clean`'s tile, for which `wait` has waited."""
    tile = tiles.tile(count, HEIGHT, COLS)
    if SCRUB:
        if rows < HEIGHT:
            scrub(tile, rows, HEIGHT, COLS)
    return tile


@gluon.jit
def over_dim(left, right, HEAD_DIM: gl.constexpr, cols=None):
    """left @ rightᵀ of two tiles of HEAD_DIM columns, padded, under way: [ROWS, rows of right];
    plus, unless that is None, a number for each column."""
    COLS: gl.constexpr = right.shape[0]
    LAYOUT: gl.constexpr = product_layout(COLS)
    acc = gl.zeros([ROWS, COLS], gl.float32, LAYOUT)
    if cols is not None:
        acc = gl.broadcast(acc, cols[None, :])[1]
    return inner_product(left, right, acc, HEAD_DIM, left.shape[1], cols is not None)


@gluon.jit
def not_carried(count, BLOCK_M: gl.constexpr):
    """count, of which no address is carried round the loop where that takes too many registers: D
    64 full loaded 9 numbers again at every step. D 128, which spills 32 bytes less so, outside the
    loop, took 0.5 to 3 % more time (H200, on zeros)."""
    if BLOCK_M > ROWS:
        return count + opaque_zero()
    else:
        return count


@gluon.jit
def stat_of(rings, count, WHICH: gl.constexpr):
    """Of the rows of dO number `count`, along a product's columns: lse in log2 units, or -delta."""
    COL: gl.constexpr = gl.SliceLayout(0, product_layout(rings.stats_rows.shape[1]))
    slot = not_carried(count, rings.stats_rows.shape[1]) % rings.dout.STAGES
    return rings.stats_rows.index(2 * slot + WHICH).load(COL)


@gluon.jit
def weights_of(qk, lse_log2, k_pos, start_m, work, rings, mods, head_mods, SPEC: gl.constexpr):
    """A block's Pᵀ, float32, from its products: of the keys k_pos by the queries from start_m on,
    with these lse."""
    COL: gl.constexpr = gl.SliceLayout(0, qk.type.layout)
    rows = k_pos[:, None]
    cols = (start_m + gl.arange(0, qk.shape[1], layout=COL))[None, :]
    p = probability(qk, lse_log2[None, :], cols, rows, mods, head_mods, SPEC)
    masked = start_m < work.full_begin
    if SPEC.left:
        masked = masked | (start_m >= work.full_end)
    if masked:
        # Counted from a thread's first query: else LLVM keeps all their numbers, and ptxas spills.
        first = first_column(start_m, k_pos)
        queries, keys = columns(qk.shape[1], gl.bfloat16)[None, :], (k_pos - first)[:, None]
        seqlen_k = (work.seqlen_k - first)[:, None]
        keep = keep_mask_by_key(queries, keys, head_mods.shift, seqlen_k, mods, SPEC)
        p = gl.where(keep, p, 0.0)
    return p


@gluon.jit
def step(
    dk_acc, dv_acc, k_pos, start_m, head, count, kv_count, work, rings, ds_ring, mods, shift,
    exists, WHICH: gl.constexpr, SPEC: gl.constexpr, SCRUB: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """A block of queries, for which the step before has waited: its P, its part of dV, its dS, also
    into the ring, and its part of dK. What passes between warps does so under the products, where
    it costs nothing. -> (dk_acc, dv_acc)"""
    DTYPE: gl.constexpr = rings.q.tiles.dtype
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, dk_acc.type.layout, 2)
    # With plain indices LLVM computes the descriptors before the loop, and ptxas spills.
    k_tile = rings.k.tiles.index(opaque_zero() + kv_count % rings.k.STAGES).reshape([ROWS, BLOCK_D])
    v_tile = rings.v.tiles.index(opaque_zero() + WHICH).reshape([ROWS, BLOCK_D])
    rows = work.seqlen_q - start_m
    q_tile = cleaned(rings.q, count, rows, SCRUB, BLOCK_M, BLOCK_D)
    qk = over_dim(k_tile, q_tile, SPEC.head_dim)
    rings.q.release(count - 1, count > work.count)
    rings.dout.release(count - 1, count > work.count)
    dout_tile = clean(rings.dout, count, rows, SCRUB, BLOCK_M, BLOCK_D)
    lse_log2 = stat_of(rings, count, 0)
    qk = warpgroup_mma_wait(0, deps=[qk])
    head_mods = mods_at_head(mods, work.seq, head, exists, shift, SPEC)
    p = weights_of(qk, lse_log2, k_pos, start_m, work, rings, mods, head_mods, SPEC)
    # In float32 it would take 16 registers more, at the fullest.
    weights = packed(p, DTYPE)
    slopes = packed(product_grad(p, qk, mods, SPEC), DTYPE) if SPEC.softcap else weights
    minus_delta = stat_of(rings, count, 1)  # where dP's product starts
    ds_ring.claim(count)  # a branch: ptxas moves what follows above P otherwise
    start_n = work.start_n + WHICH * ROWS
    if count == work.count:
        clean(rings.v, kv_count, work.seqlen_k - start_n, SCRUB, ROWS, BLOCK_D)
    dp = over_dim(v_tile, dout_tile, SPEC.head_dim, minus_delta)
    rings.q.wait(count + 1, count + 1 < work.count + work.steps)
    dp = warpgroup_mma_wait(0, deps=[dp])
    factor = gl.convert_layout(weights, FACTOR)
    dv_acc = warpgroup_mma(factor, dout_tile, dv_acc, is_async=True)
    ds = packed(score_grad(unpacked(slopes), dp, 0.0), DTYPE)
    factor = gl.convert_layout(ds, FACTOR)
    dk_acc = warpgroup_mma(factor, q_tile, dk_acc, is_async=True)
    ds_ring.tile(not_carried(count, BLOCK_M), ROWS, BLOCK_M).store(ds)
    ds_ring.announce(count)
    return warpgroup_mma_wait(0, deps=[dk_acc, dv_acc])


@gluon.jit
def pass_by(
    kv_count, work, rings, ds_ring, SCRUB: gl.constexpr, WHICH: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """`step` of the work's first block, where none of the queries sees a key of this consumer."""
    count = work.count
    ds_ring.claim(count)
    zeros = gl.zeros([ROWS, BLOCK_M], rings.q.tiles.dtype, product_layout(BLOCK_M))
    ds_ring.tile(count, ROWS, BLOCK_M).store(zeros)
    ds_ring.announce(count)
    rings.dout.wait(count)
    start_n = work.start_n + WHICH * ROWS
    clean(rings.v, kv_count, work.seqlen_k - start_n, SCRUB, ROWS, BLOCK_D)
    rings.q.wait(count + 1, work.steps > 1)


@gluon.jit
def attend(
    work, work_count, rings, ds_ring, call, grads, group_size, DOWN: gl.constexpr,
    WHICH: gl.constexpr, SPEC: gl.constexpr, SCRUB: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """All the queries that see this consumer's keys of `work`, of which there are some. Writes dK
    and dV, which are laid by rows in tiles that are free by then."""
    ACC_LAYOUT: gl.constexpr = product_layout(BLOCK_D)
    mods = call.mods
    kv_count = work.kv_count + WHICH
    start_n = work.start_n + WHICH * ROWS
    exists = work.seq < call.q_lengths.batch
    shift = diagonal_shift(work.seqlen_q, work.seqlen_k, SPEC)
    dk_acc = gl.zeros([ROWS, BLOCK_D], gl.float32, ACC_LAYOUT)
    dv_acc = gl.zeros([ROWS, BLOCK_D], gl.float32, ACC_LAYOUT)
    k_pos = start_n + gl.arange(0, ROWS, layout=gl.SliceLayout(1, product_layout(BLOCK_M)))
    start_m = first_block(work, DOWN, BLOCK_M)
    head = work.head_k * group_size
    clean(rings.k, kv_count, work.seqlen_k - start_n, SCRUB, ROWS, BLOCK_D)
    rings.q.wait(work.count)
    tma.store_wait(0)  # it has read dK, which lay in the ring of dS
    first = work.count
    if BLOCK_M == ROWS and WHICH > 0 and not DOWN and (SPEC.causal or SPEC.right):
        begin, _, _, _ = q_block_range(start_n, work.seqlen_q, shift, mods, SPEC, BLOCK_M, ROWS)
        if start_m < begin:  # at the diagonal; 1 % of D 128 causal's time (H200)
            pass_by(kv_count, work, rings, ds_ring, SCRUB, WHICH, BLOCK_M, BLOCK_D)
            start_m, head = next_block(start_m, head, work, group_size, DOWN, BLOCK_M)
            first += 1
    last = work.count + work.steps - 1
    for count in range(first, last + 1):
        dk_acc, dv_acc = step(
            dk_acc, dv_acc, k_pos, start_m, head, count, kv_count, work, rings, ds_ring, mods,
            shift, exists, WHICH, SPEC, SCRUB, BLOCK_M, BLOCK_D,
        )  # fmt: skip
        start_m, head = next_block(start_m, head, work, group_size, DOWN, BLOCK_M)
    rings.k.release(kv_count)
    rings.q.release(last)
    rings.dout.release(last)
    # Read again: what it says of the keys would take registers all the while.
    keys = received_keys(rings.notes, work_count, call)
    # By opaque indices: else the addresses of both places are kept, or spilled, all the while.
    place = rings.v.tiles.index(opaque_zero() + WHICH)
    store_grad(grads.dv, grads.dv_tiles, place, dv_acc, keys, WHICH, SPEC.head_dim)
    ds_ring.claim(last + ds_ring.STAGES)  # and so, as dQ goes by order, all of the ring
    tma.store_wait(0)  # it has read dV
    rings.v.release(kv_count)
    TIMES: gl.constexpr = 2 * BLOCK_M // BLOCK_D  # that the ring holds dK
    SHAPE: gl.constexpr = [TIMES, 1, ROWS, 1, BLOCK_D]
    dk_tiles = reinterpreted(ds_ring.tiles, rings.k.tiles.dtype, SHAPE, rings.k.tiles.layout)
    dk_acc *= mods.scale_log2 * LN2
    place = dk_tiles.index(opaque_zero())
    store_grad(grads.dk, grads.dk_tiles, place, dk_acc, keys, WHICH, SPEC.head_dim)


@gluon.jit
def multiply(
    rings, call, grads, group_size, DOWN: gl.constexpr, WHICH: gl.constexpr, SPEC: gl.constexpr,
    SCRUB: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Consumer number WHICH: keys WHICH * ROWS and on of every work."""
    ds_ring = rings.ds[WHICH]
    work_count = 0
    steps = value_of_note(rings.notes, work_count)
    while steps >= 0:
        work = received_work(rings.notes, steps, work_count, call, SPEC)
        if steps > 0:
            attend(
                work, work_count, rings, ds_ring, call, grads, group_size, DOWN, WHICH, SPEC,
                SCRUB, BLOCK_M, BLOCK_D,
            )  # fmt: skip
        elif work.start_n >= 0:
            ZEROS_LAYOUT: gl.constexpr = row_layout(BLOCK_D)
            zeros = gl.zeros([ROWS, BLOCK_D], gl.float32, ZEROS_LAYOUT)
            keys = (work.seq, work.head_k, work.start_n, work.k_first, work.seqlen_k)
            store(grads.dk, zeros, keys, WHICH, SPEC.head_dim)
            store(grads.dv, zeros, keys, WHICH, SPEC.head_dim)
        rings.notes.release(work_count)
        work_count += 1
        steps = value_of_note(rings.notes, work_count)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def hopper_backward_kernel(
    q, k, v, dout, sums, stats, dk, dv, dk_tiles, dv_tiles, counters, turns, cu_seqlens_q,
    cu_seqlens_k, seqused_q, seqused_k, leftpad_k, rows_q, rows_k, batch, nheads_k, group_size,
    parts, per_head, heads, total, head_group, tiles_q, mods, SPEC: gl.constexpr,
    SCRUB: gl.constexpr, DOWN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, STAGES: gl.constexpr, Q_TILES: gl.constexpr,
):  # fmt: skip
    """Grid: (programs,), any number. q, k, v and dout are descriptors of [batch, seqlen, heads,
    head_dim] (packed: batch 1), k and v of blocks of ROWS rows, two of which are BLOCK_N; stats and
    sums (float32, dQ over the softmax scale) of what prepare_kernel wrote, dk and dv Operands,
    dk_tiles and dv_tiles their descriptors where a tile has nothing but its sequence's rows, or
    None; counters Schedule's. nheads_k: of dk and dv, `parts` for each of K's, with group_size of
    Q's each. turns, and `done` behind them: see Sums."""
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    schedule = Schedule(per_head, heads, total, head_group, counters)
    call = Call(q_lengths, k_lengths, mods, nheads_k, schedule)
    # K of the next work is loaded under this one's end: 2 to 7 % at 1k, on zeros; of D 128 half.
    K_TILES: gl.constexpr = 3 if BLOCK_D == 128 else 4
    rings = make_rings(q, k, v, dout, stats, 2, K_TILES, 4, STAGES, Q_TILES, BLOCK_M)
    grads = Grads(dk, dv, dk_tiles, dv_tiles)
    FLAT: gl.constexpr = sums.layout
    done = turns + tiles_q * group_size * nheads_k
    to = Sums(None, sums, turns, done, make_ring(gl.float32, ROWS * ROWS // 256, 256, FLAT))
    gdc_wait()  # until prepare_kernel is done
    gl.warp_specialize(
        [
            (
                multiply,
                (rings, call, grads, group_size, DOWN, 0, SPEC, SCRUB, BLOCK_M, BLOCK_D),
            ),
            (
                multiply,
                (rings, call, grads, group_size, DOWN, 1, SPEC, SCRUB, BLOCK_M, BLOCK_D),
            ),
            (
                multiply_queries,
                (rings, call, to, group_size, tiles_q, SPEC, DOWN, BLOCK_M, BLOCK_D),
            ),
            (
                load,
                (
                    rings, call, q, k, v, dout, stats, group_size, parts, tiles_q,
                    SPEC, DOWN, BLOCK_M, BLOCK_N,
                ),
            ),
            (add, (rings, call, to, group_size, tiles_q, SPEC, DOWN, BLOCK_M, BLOCK_N)),
        ],
        [4, 4, 1, 1],
        [208, 72, 24, 24],
    )  # fmt: skip

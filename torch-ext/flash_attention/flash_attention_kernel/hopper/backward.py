"""Attention backward for sm_90 in one pass of five products: FlashAttention-2, algorithm 2.

Persistent: a program draws BLOCK_N keys of a KV head at a time; a warp loads them, and block by
block the Q and dO of every query head that sees them, and eight warps multiply. Sᵀ = KQᵀ and
dPᵀ = VdOᵀ come from shared memory; Pᵀ stays in registers as left factor of dV += PᵀdO; dSᵀ goes to
shared memory for dK += dSᵀQ and dQ = dS K, which another warp has the copy engine add to a float32
dQ in memory (turns.py).

Where dQ is to have the same bits every time, blocks of keys take turns to add to a block of it, and
begin with the last queries, so that they follow one another.

The tensor cores are kept busy under the arithmetic: while a block's P is computed, its dP and the
dK of the block before are under way, while its dS is, dV, and while dQ is handed to the copy
engine, dK and the next block's S. Nothing but dK and dV, both complete, is carried round the loop:
with a product in flight there ptxas waits for each.
"""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from ..common import LN2, at_head
from ..masks import diagonal_shift, keep_mask
from ..scores import mods_at_head, probability, product_grad, score_grad
from ..seqlen import Lengths, partner_bounds
from .compat import async_store, reinterpreted
from .pipeline import (
    inner_product,
    make_barriers,
    make_channel,
    make_notes,
    opaque_zero,
    scrub,
    spares_quarter,
)
from .schedule import (
    WORK_FIELDS,
    Call,
    Schedule,
    draw,
    find_work,
    first_block,
    leave,
    next_block,
    received_keys,
    received_work,
    send_no_work,
    value_of_note,
)
from .turns import add


class Rings(NamedTuple):
    """What passes between the warps."""

    k: Any
    v: Any
    q: Any
    dout: Any
    stats: Any  # [STAGES, 2 * BLOCK_M]: of dout's rows lse in log2 units, then delta
    stats_rows: Any  # [2 * STAGES, BLOCK_M]: the same
    notes: Any


class Grads(NamedTuple):
    """Where dK and dV go: Operands, and their descriptors or None."""

    dk: Any
    dv: Any
    dk_tiles: Any
    dv_tiles: Any


class Sums(NamedTuple):
    """Where dQ is summed."""

    tiles: Any  # descriptor of the float32 sums, block after block
    turns: Any  # int32 of each block: how many have added to it; None: they add in any order
    ready: Any  # the consumer has written Scratch.dq
    free: Any  # and the copy engine has read it


class Scratch(NamedTuple):
    """Shared memory of the consumer; what is in dq, `add` hands on."""

    ds: Any  # [1, BLOCK_N, BLOCK_M]: dSᵀ
    dq: Any  # float32, [BLOCK_M, BLOCK_D] in the order of `dq_layout`


@gluon.constexpr_function
def layout_of(ROWS, COLS):
    """Of a product [ROWS, COLS] of the eight warps: two groups, side by side if ROWS is 64."""
    if ROWS == 64:
        return gl.NVMMADistributedLayout([3, 0], [4, 2], [16, COLS // 2, 16])
    return gl.NVMMADistributedLayout([3, 0], [8, 1], [16, COLS, 16])


@gluon.constexpr_function
def dq_layout(ROWS, COLS):
    """Of dQ's block in shared memory and in `sums`: each thread's numbers by fours, so that a warp
    writes 512 bytes in a row, and the copy engine adds all of them in a row; see finish_kernel."""
    rows = [[1 << bit, 0] for bit in range(ROWS.bit_length() - 1)]
    cols = [[0, 1 << bit] for bit in range(COLS.bit_length() - 1)]
    return gl.SharedLinearLayout([cols[0], rows[3], *cols[1:3], *rows[:3], *rows[4:], *cols[3:]])


@gluon.constexpr_function
def stats_layout(ROWS):
    """Of lse and delta: by fours that one thread reads, four threads' in a row; see
    prepare_kernel."""
    bits = [[1 << bit] for bit in range(ROWS.bit_length() - 1)]
    return gl.SharedLinearLayout([bits[0], bits[3], *bits[1:3], *bits[4:]])


@gluon.jit
def load(
    rings, call, q, k, v, dout, stats, group_size, parts, tiles_q,
    SPEC: gl.constexpr, DOWN: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """The producer: draws work; loads its K and V, then Q, dO and their rows' stats, head by head.
    stats: [nheads, tiles_q, 2 * BLOCK_M], flat. DOWN: the last queries first."""
    count = 0
    kv_count = 0
    work_count = 0
    index = gl.program_id(0)
    if DOWN:  # a program that does not run yet must have no work that others wait for
        index = draw(call.schedule, False)
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
        k_place = [k_entry, work.k_first + work.start_n, work.head_k // parts, 0]
        for i in range(work.steps):
            if i == 0:
                rings.k.fill(k, k_place, kv_count)
            rings.q.fill(q, [q_entry, q_first + start_m, head, 0], count)
            if i == 0:
                rings.v.fill(v, k_place, kv_count)
            tile = head * tiles_q + work.first_tile + start_m // BLOCK_M
            rings.dout.fill_both(
                dout, [q_entry, q_first + start_m, head, 0],
                stats, [tile * (2 * BLOCK_M)], rings.stats, count,
            )  # fmt: skip
            count += 1
            start_m, head = next_block(start_m, head, work, group_size, DOWN, BLOCK_M)
        kv_count += gl.minimum(work.steps, 1)
        index = draw(call.schedule, not DOWN)
    send_no_work(rings.notes, work_count)
    leave(call.schedule)


@gluon.jit
def clean(tiles, count, rows, SCRUB: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr):
    """Wait for a tile -> it; of which, if SCRUB, no more than `rows` rows are this sequence's."""
    tile = tiles.receive(count, ROWS, COLS)
    if SCRUB:
        if rows < ROWS:
            scrub(tile, rows, ROWS, COLS)
    return tile


@gluon.jit
def product(left, right, ROWS: gl.constexpr, COLS: gl.constexpr):
    """left @ right, under way: [ROWS, COLS]."""
    LAYOUT: gl.constexpr = layout_of(ROWS, COLS)
    zeros = gl.zeros([ROWS, COLS], gl.float32, LAYOUT)
    return warpgroup_mma(left, right, zeros, use_acc=False, is_async=True)


@gluon.jit
def over_dim(
    left, right, SPEC: gl.constexpr, ROWS: gl.constexpr, COLS: gl.constexpr, BLOCK_D: gl.constexpr
):
    """left @ rightᵀ, two tiles with BLOCK_D columns, under way: [ROWS, COLS]."""
    LAYOUT: gl.constexpr = layout_of(ROWS, COLS)
    zeros = gl.zeros([ROWS, COLS], gl.float32, LAYOUT)
    return inner_product(left, right, zeros, SPEC.head_dim, BLOCK_D)


@gluon.jit
def grads_of_scores(
    dk_acc, dv_acc, qk, v_tile, k_pos, start_m, head, count, work, rings, scratch, mods, shift,
    exists, FIRST: gl.constexpr, SPEC: gl.constexpr, SCRUB: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """A block's P from its products, its part of dV, and dS into scratch.ds; under way, the dK of
    the block before, if there is one, ends. -> (dk_acc, dv_acc)"""
    COL: gl.constexpr = gl.SliceLayout(0, qk.type.layout)
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, dv_acc.type.layout, 2)
    dout_tile = clean(rings.dout, count, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_D)
    dp = over_dim(v_tile, dout_tile, SPEC, BLOCK_N, BLOCK_M, BLOCK_D)
    head_mods = mods_at_head(mods, work.seq, head, exists, shift, SPEC)
    rows = k_pos[:, None]
    cols = (start_m + gl.arange(0, BLOCK_M, layout=COL))[None, :]
    slot = count % rings.dout.STAGES
    lse_log2 = rings.stats_rows.index(2 * slot).load(COL)
    p = probability(qk, lse_log2[None, :], cols, rows, mods, head_mods, SPEC)
    masked = start_m < work.full_begin
    if SPEC.left:
        masked = masked | (start_m >= work.full_end)
    if masked:
        p = gl.where(keep_mask(cols, rows, shift, work.seqlen_k, mods, SPEC, True), p, 0.0)
    rings.dout.wait(count)  # a branch: ptxas moves the next wait above P otherwise
    dp, dk_acc = warpgroup_mma_wait(0, deps=[dp, dk_acc])
    if not FIRST:
        rings.q.release(count - 1)
    delta = rings.stats_rows.index(2 * slot + 1).load(COL)
    weights = gl.convert_layout(p.to(dout_tile.dtype), FACTOR)
    dv_acc = warpgroup_mma(weights, dout_tile, dv_acc, is_async=True)
    ds = product_grad(score_grad(p, dp, delta[None, :]), qk, mods, SPEC)
    scratch.ds.index(0).store(ds.to(dout_tile.dtype))
    fence_async_shared()
    rings.dout.wait(count)  # a branch again: without it ptxas (12.8, 12.9) crashes
    dv_acc = warpgroup_mma_wait(0, deps=[dv_acc])
    rings.dout.release(count)
    return dk_acc, dv_acc


@gluon.jit
def hand_on(part, count, scratch, sums, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr):
    """Leave block number `count` of dQ to `add`, which adds it to what other keys gave."""
    LAYOUT: gl.constexpr = dq_layout(BLOCK_M, BLOCK_D)
    tma.store_wait(0)  # it has read dK, which lay there
    mbarrier.wait(sums.free, (count & 1) ^ 1)
    reinterpreted(scratch.dq, gl.float32, [BLOCK_M, BLOCK_D], LAYOUT).store(part)
    fence_async_shared()
    mbarrier.arrive(sums.ready, count=1)


@gluon.jit
def attend(
    work, work_count, rings, scratch, call, grads, sums, group_size,
    SPEC: gl.constexpr, SCRUB: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """All the queries that see the keys of `work`, of which there are some. Writes dK and dV, which
    are laid by rows in tiles that are free by then."""
    S_LAYOUT: gl.constexpr = layout_of(BLOCK_N, BLOCK_M)
    ACC_LAYOUT: gl.constexpr = layout_of(BLOCK_N, BLOCK_D)
    DOWN: gl.constexpr = sums.turns is not None
    LATER: gl.constexpr = 3 if spares_quarter(SPEC.head_dim, BLOCK_D) else 2  # than dQ: S and dK
    mods = call.mods
    count = work.count
    kv_count = work.kv_count
    exists = work.seq < call.q_lengths.batch
    shift = diagonal_shift(work.seqlen_q, work.seqlen_k, SPEC)
    dk_acc = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, ACC_LAYOUT)
    dv_acc = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, ACC_LAYOUT)
    k_pos = work.start_n + gl.arange(0, BLOCK_N, layout=gl.SliceLayout(1, S_LAYOUT))
    start_m = first_block(work, DOWN, BLOCK_M)
    head = work.head_k * group_size
    k_tile = clean(rings.k, kv_count, work.seqlen_k - work.start_n, SCRUB, BLOCK_N, BLOCK_D)
    q_tile = clean(rings.q, count, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_D)
    qk = over_dim(k_tile, q_tile, SPEC, BLOCK_N, BLOCK_M, BLOCK_D)
    v_tile = clean(rings.v, kv_count, work.seqlen_k - work.start_n, SCRUB, BLOCK_N, BLOCK_D)
    qk = warpgroup_mma_wait(0, deps=[qk])
    dk_acc, dv_acc = grads_of_scores(
        dk_acc, dv_acc, qk, v_tile, k_pos, start_m, head, count, work, rings, scratch, mods, shift,
        exists, True, SPEC, SCRUB, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    for last in range(count, count + work.steps - 1):
        k_tile = rings.k.tiles.index(opaque_zero()).reshape([BLOCK_N, BLOCK_D])
        v_tile = rings.v.tiles.index(opaque_zero()).reshape([BLOCK_N, BLOCK_D])
        ds = scratch.ds.index(opaque_zero())  # with plain 0s, 130 to 210 bytes are spilled
        part = product(ds.permute((1, 0)), k_tile, BLOCK_M, BLOCK_D)
        start_m, head = next_block(start_m, head, work, group_size, DOWN, BLOCK_M)
        q_tile = clean(rings.q, last + 1, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_D)
        qk = over_dim(k_tile, q_tile, SPEC, BLOCK_N, BLOCK_M, BLOCK_D)
        q_last = rings.q.tile(last, BLOCK_M, BLOCK_D)
        dk_acc = warpgroup_mma(ds, q_last, dk_acc, is_async=True)
        part = warpgroup_mma_wait(LATER, deps=[part])
        hand_on(part, last, scratch, sums, BLOCK_M, BLOCK_D)
        qk = warpgroup_mma_wait(1, deps=[qk])
        dk_acc, dv_acc = grads_of_scores(
            dk_acc, dv_acc, qk, v_tile, k_pos, start_m, head, last + 1, work, rings, scratch, mods,
            shift, exists, False, SPEC, SCRUB, BLOCK_M, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    last = count + work.steps - 1
    ds = scratch.ds.index(0)
    part = product(ds.permute((1, 0)), k_tile, BLOCK_M, BLOCK_D)
    q_last = rings.q.tile(last, BLOCK_M, BLOCK_D)
    dk_acc = warpgroup_mma(ds, q_last, dk_acc, is_async=True)
    part = warpgroup_mma_wait(1, deps=[part])
    rings.k.release(kv_count)
    hand_on(part, last, scratch, sums, BLOCK_M, BLOCK_D)
    # Read again: what it says of the keys would take registers all the while.
    keys = received_keys(rings.notes, work_count, call)
    place = rings.v.tiles.index(0)
    store_grad(grads.dv, grads.dv_tiles, place, dv_acc, keys, SPEC, BLOCK_N, BLOCK_D)
    dk_acc = warpgroup_mma_wait(0, deps=[dk_acc])
    rings.q.release(last)
    STORES: gl.constexpr = 0 if grads.dv_tiles is None else 1  # of the copy engine, of each
    mbarrier.wait(sums.free, last & 1)
    TIMES: gl.constexpr = 2 * BLOCK_M // BLOCK_N  # that dQ's block holds dK's
    SHAPE: gl.constexpr = [TIMES, 1, BLOCK_N, 1, BLOCK_D]
    dk_tiles = reinterpreted(scratch.dq, k_tile.dtype, SHAPE, rings.k.tiles.layout)
    dk_acc *= mods.scale_log2 * LN2
    store_grad(grads.dk, grads.dk_tiles, dk_tiles.index(0), dk_acc, keys, SPEC, BLOCK_N, BLOCK_D)
    tma.store_wait(STORES)  # it has read dV
    rings.v.release(kv_count)


@gluon.constexpr_function
def row_layout(COLS):
    """Whole rows, 16 bytes a thread."""
    return gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [8, 1], [1, 0])


@gluon.jit
def store_grad(
    out, tiles, tile, values, keys, SPEC: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr
):
    """Write a gradient's rows of these keys: float32, a part of it, as the products lie; else by
    way of `tile`, and from there by the copy engine, or by `store` where `tiles` is None."""
    if out.ptr.dtype.element_ty == gl.float32:
        store(out, values, keys, SPEC)
        return
    rows = tile.reshape([BLOCK_N, BLOCK_D])
    rows.store(values.to(tile.dtype))
    if tiles is None:
        store(out, rows.load(row_layout(BLOCK_D)), keys, SPEC)
    fence_async_shared()
    if tiles is not None:
        async_store(tiles, [keys[0], keys[2], keys[1], 0], tile)


@gluon.jit
def store(out, values, keys, SPEC: gl.constexpr):
    """Write a gradient's rows of these keys."""
    seq, head_k, start_n, k_first, seqlen_k = keys
    LAYOUT: gl.constexpr = values.type.layout
    out = at_head(out, seq, head_k, k_first)
    rows = start_n + gl.arange(0, values.shape[0], layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    ptrs = out.ptr + rows.to(gl.int64)[:, None] * out.seq + cols[None, :] * out.dim
    mask = (rows < seqlen_k)[:, None] & (cols < SPEC.head_dim)[None, :]
    gl.store(ptrs, values.to(out.ptr.dtype.element_ty), mask=mask)


@gluon.jit
def multiply(
    rings, scratch, call, grads, sums, group_size, SPEC: gl.constexpr, SCRUB: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """The consumer."""
    work_count = 0
    steps = value_of_note(rings.notes, work_count)
    while steps >= 0:
        work = received_work(rings.notes, steps, work_count, call, SPEC)
        if steps > 0:
            attend(
                work, work_count, rings, scratch, call, grads, sums, group_size, SPEC,
                SCRUB, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
        elif work.start_n >= 0:
            ZEROS_LAYOUT: gl.constexpr = row_layout(BLOCK_D)
            zeros = gl.zeros([BLOCK_N, BLOCK_D], gl.float32, ZEROS_LAYOUT)
            keys = (work.seq, work.head_k, work.start_n, work.k_first, work.seqlen_k)
            store(grads.dk, zeros, keys, SPEC)
            store(grads.dv, zeros, keys, SPEC)
        rings.notes.release(work_count)
        work_count += 1
        steps = value_of_note(rings.notes, work_count)
    tma.store_wait(0)


@gluon.jit(
    do_not_specialize=(
        "rows_q", "rows_k", "batch", "nheads_k", "per_head", "heads", "total", "tiles_q",
    )
)  # fmt: skip
def hopper_backward_kernel(
    q, k, v, dout, sums, stats, dk, dv, dk_tiles, dv_tiles, counters, turns, cu_seqlens_q,
    cu_seqlens_k, seqused_q, seqused_k, leftpad_k, rows_q, rows_k, batch, nheads_k, group_size,
    parts, per_head, heads, total, head_group, tiles_q, mods, SPEC: gl.constexpr,
    SCRUB: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    STAGES: gl.constexpr, Q_TILES: gl.constexpr,
):  # fmt: skip
    """Grid: (programs,), any number. q, k, v and dout are descriptors of [batch, seqlen, heads,
    head_dim] (packed: batch 1), stats and sums (float32, dQ over the softmax scale) of what
    prepare_kernel wrote, dk and dv Operands, dk_tiles and dv_tiles their descriptors where a tile
    has nothing but its sequence's rows, or None; counters Schedule's. nheads_k: of dk and dv,
    `parts` for each of K's, with group_size of Q's each. turns: see Sums."""
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    schedule = Schedule(per_head, heads, total, head_group, counters)
    call = Call(q_lengths, k_lengths, mods, nheads_k, schedule)
    STATS: gl.constexpr = stats_layout(BLOCK_M)
    stats_tiles = gl.allocate_shared_memory(stats.dtype, [STAGES] + stats.block_shape, stats.layout)
    rings = Rings(
        make_channel(k, 1, 1), make_channel(v, 1, 1), make_channel(q, Q_TILES, 1),
        make_channel(dout, STAGES, 1), stats_tiles,
        reinterpreted(stats_tiles, gl.float32, [2 * STAGES, BLOCK_M], STATS),
        make_notes(WORK_FIELDS, 2),
    )  # fmt: skip
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_M], q.dtype)
    scratch = Scratch(
        gl.allocate_shared_memory(q.dtype, [1, BLOCK_N, BLOCK_M], DS),
        gl.allocate_shared_memory(gl.float32, sums.block_shape, sums.layout),
    )
    grads = Grads(dk, dv, dk_tiles, dv_tiles)
    to = Sums(sums, turns, make_barriers(1, 1).index(0), make_barriers(1, 1).index(0))
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    rings, scratch, call, grads, to, group_size,
                    SPEC, SCRUB, BLOCK_M, BLOCK_N, BLOCK_D,
                ),
            ),
            (
                load,
                (
                    rings, call, q, k, v, dout, stats, group_size, parts, tiles_q,
                    SPEC, turns is not None, BLOCK_M, BLOCK_N,
                ),
            ),
            (add, (rings, scratch.dq, call, to, group_size, tiles_q, SPEC, BLOCK_M, BLOCK_N)),
        ],
        [1, 1],
        [24, 24],
    )  # fmt: skip

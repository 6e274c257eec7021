"""Attention backward for sm_90 where backward.py's dK and dV would not fit its registers: head dims
of 129 to 256, head_dim_v its own.

A program draws ROWS keys at a time. Two warp groups divide the products, not the keys: one
multiplies Sᵀ = KQᵀ and dV += PᵀdO, the other dPᵀ = VdOᵀ and dK += dSᵀQ, each with one sum in its
registers. Pᵀ goes from the one to the other through shared memory, in half precision; a softcap's
derivative is multiplied into it on the way. A third warp group multiplies dQ = dS K (sums.py), and
adds it itself: for its pieces to lie in shared memory there is no room.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from ..common import LN2
from ..masks import diagonal_shift
from ..scores import mods_at_head, product_grad, score_grad
from ..seqlen import Lengths
from .backward import clean, load, make_rings, over_dim, stat_of, weights_of
from .grads import Grads, store
from .pipeline import (
    ROWS,
    make_ring,
    opaque_zero,
    packed,
    product_layout,
    unpacked,
)
from .schedule import (
    UNSPECIALIZED,
    Call,
    Schedule,
    first_block,
    next_block,
    received_keys,
    received_work,
    value_of_note,
)
from .sums import Sums, multiply_queries


@gluon.constexpr_function
def sum_layout(COLS):
    """Of dK or dV, [ROWS, COLS]: ptxas counts with 128 registers, too few for wider products."""
    return product_layout(min(COLS, 128))


@gluon.jit
def add_values(dv_acc, qk, start_m, head, count, work, rings, p_ring, call, SPEC: gl.constexpr):
    """A block's P into the ring, and its part of dV, under way."""
    FACTOR: gl.constexpr = gl.DotOperandLayout(0, dv_acc.type.layout, 2)
    DTYPE: gl.constexpr = rings.q.tiles.dtype
    shift = diagonal_shift(work.seqlen_q, work.seqlen_k, SPEC)
    mods, exists = call.mods, work.seq < call.q_lengths.batch
    head_mods = mods_at_head(mods, work.seq, head, exists, shift, SPEC)
    k_pos = work.start_n + gl.arange(0, ROWS, layout=gl.SliceLayout(1, qk.type.layout))
    lse_log2 = stat_of(rings, count, 0)
    p = weights_of(qk, lse_log2, k_pos, start_m, work, rings, mods, head_mods, SPEC)
    p_ring.claim(count)
    p_ring.tile(count, ROWS, qk.shape[1]).store(product_grad(p, qk, mods, SPEC).to(DTYPE))
    p_ring.announce(count)
    dout_tile = rings.dout.tile(count, qk.shape[1], dv_acc.shape[1])
    weights = gl.convert_layout(packed(p, DTYPE), FACTOR)
    return warpgroup_mma(weights, dout_tile, dv_acc, is_async=True)


@gluon.jit
def attend_values(
    work, rings, p_ring, call, group_size, SPEC: gl.constexpr, SCRUB: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
):  # fmt: skip
    """S of all the queries that see the keys of `work`, of which there are some -> dV"""
    dv_acc = gl.zeros([ROWS, BLOCK_DV], gl.float32, sum_layout(BLOCK_DV))
    start_m = first_block(work, False, BLOCK_M)
    head = work.head_k * group_size
    last = work.count + work.steps - 1
    k_tile = clean(rings.k, work.kv_count, work.seqlen_k - work.start_n, SCRUB, ROWS, BLOCK_D)
    q_tile = clean(rings.q, work.count, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_D)
    qk = warpgroup_mma_wait(0, deps=[over_dim(k_tile, q_tile, SPEC.head_dim)])
    rings.q.release(work.count)
    for count in range(work.count, last):
        k_tile = rings.k.tiles.index(opaque_zero()).reshape([ROWS, BLOCK_D])
        clean(rings.dout, count, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_DV)
        dv_acc = add_values(dv_acc, qk, start_m, head, count, work, rings, p_ring, call, SPEC)
        start_m, head = next_block(start_m, head, work, group_size, False, BLOCK_M)
        q_tile = clean(rings.q, count + 1, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_D)
        qk = over_dim(k_tile, q_tile, SPEC.head_dim)
        dv_acc, qk = warpgroup_mma_wait(0, deps=[dv_acc, qk])
        rings.q.release(count + 1)
        rings.dout.release(count)
    rings.k.release(work.kv_count)
    clean(rings.dout, last, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_DV)
    dv_acc = add_values(dv_acc, qk, start_m, head, last, work, rings, p_ring, call, SPEC)
    dv_acc = warpgroup_mma_wait(0, deps=[dv_acc])
    rings.dout.release(last)
    return dv_acc


@gluon.jit
def add_keys(
    dk_acc, dp, count, rings, p_ring, ds_ring, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr
):
    """dS of a block from dP and P into its ring, and its part of dK, under way."""
    LAYOUT: gl.constexpr = product_layout(BLOCK_M)
    p = p_ring.receive(count, ROWS, BLOCK_M).load(LAYOUT)
    p_ring.release(count)
    minus_delta = stat_of(rings, count, 1)
    ds = score_grad(unpacked(p), dp, -minus_delta[None, :])
    rings.dout.release(count)
    ds_ring.claim(count)
    ds_ring.tile(count, ROWS, BLOCK_M).store(ds.to(p.dtype))
    ds_ring.announce(count)
    ds_tile, q_tile = ds_ring.tile(count, ROWS, BLOCK_M), rings.q.tile(count, BLOCK_M, BLOCK_D)
    return warpgroup_mma(ds_tile, q_tile, dk_acc, is_async=True)


@gluon.jit
def attend_keys(
    work, rings, p_ring, call, group_size, SPEC: gl.constexpr, SCRUB: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
):  # fmt: skip
    """dP and dS of all the queries that see the keys of `work`, of which there are some -> dK"""
    ds_ring = rings.ds[0]
    dk_acc = gl.zeros([ROWS, BLOCK_D], gl.float32, sum_layout(BLOCK_D))
    start_m = first_block(work, False, BLOCK_M)
    head = work.head_k * group_size
    last = work.count + work.steps - 1
    v_tile = clean(rings.v, work.kv_count, work.seqlen_k - work.start_n, SCRUB, ROWS, BLOCK_DV)
    dout_tile = clean(rings.dout, work.count, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_DV)
    dp = warpgroup_mma_wait(0, deps=[over_dim(v_tile, dout_tile, SPEC.head_dim_v)])
    for count in range(work.count, last):
        v_tile = rings.v.tiles.index(opaque_zero()).reshape([ROWS, BLOCK_DV])
        clean(rings.q, count, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_D)
        dk_acc = add_keys(dk_acc, dp, count, rings, p_ring, ds_ring, BLOCK_M, BLOCK_D)
        start_m, head = next_block(start_m, head, work, group_size, False, BLOCK_M)
        dout_tile = clean(rings.dout, count + 1, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_DV)
        dp = over_dim(v_tile, dout_tile, SPEC.head_dim_v)
        dk_acc, dp = warpgroup_mma_wait(0, deps=[dk_acc, dp])
        rings.q.release(count)
    rings.v.release(work.kv_count)
    clean(rings.q, last, work.seqlen_q - start_m, SCRUB, BLOCK_M, BLOCK_D)
    dk_acc = add_keys(dk_acc, dp, last, rings, p_ring, ds_ring, BLOCK_M, BLOCK_D)
    dk_acc = warpgroup_mma_wait(0, deps=[dk_acc])
    rings.q.release(last)
    return dk_acc * (call.mods.scale_log2 * LN2)


@gluon.jit
def multiply(
    rings, p_ring, call, grads, group_size, WHICH: gl.constexpr, SPEC: gl.constexpr,
    SCRUB: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
):  # fmt: skip
    """The consumer of S and dV, if WHICH is 0, or of dP and dK."""
    work_count = 0
    steps = value_of_note(rings.notes, work_count)
    while steps >= 0:
        work = received_work(rings.notes, steps, work_count, call, SPEC)
        if WHICH == 0:
            grad = gl.zeros([ROWS, BLOCK_DV], gl.float32, sum_layout(BLOCK_DV))
            if steps > 0:
                grad = attend_values(
                    work, rings, p_ring, call, group_size, SPEC, SCRUB, BLOCK_M, BLOCK_D, BLOCK_DV
                )
        else:
            grad = gl.zeros([ROWS, BLOCK_D], gl.float32, sum_layout(BLOCK_D))
            if steps > 0:
                grad = attend_keys(
                    work, rings, p_ring, call, group_size, SPEC, SCRUB, BLOCK_M, BLOCK_D, BLOCK_DV
                )
        if work.start_n >= 0:
            # Read again: what it says of the keys would take registers all the while.
            keys = received_keys(rings.notes, work_count, call)
            if WHICH == 0:
                store(grads.dv, grad, keys, 0, SPEC.head_dim_v)
            else:
                store(grads.dk, grad, keys, 0, SPEC.head_dim)
        rings.notes.release(work_count)
        work_count += 1
        steps = value_of_note(rings.notes, work_count)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def hopper_wide_backward_kernel(
    q, k, v, dout, sums, stats, dk, dv, dk_tiles, dv_tiles, counters, turns, cu_seqlens_q,
    cu_seqlens_k, seqused_q, seqused_k, leftpad_k, rows_q, rows_k, batch, nheads_k, group_size,
    parts, per_head, heads, total, head_group, tiles_q, mods, SPEC: gl.constexpr,
    SCRUB: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
    BLOCK_DV: gl.constexpr, STAGES: gl.constexpr, Q_TILES: gl.constexpr,
):  # fmt: skip
    """hopper_backward_kernel's arguments, but: BLOCK_N is ROWS, sums a tuple of their pointer,
    dk_tiles, dv_tiles and turns are None; v and dout have BLOCK_DV columns."""
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    schedule = Schedule(per_head, heads, total, head_group, counters)
    call = Call(q_lengths, k_lengths, mods, nheads_k, schedule)
    rings = make_rings(q, k, v, dout, stats, 1, 1, 3, STAGES, Q_TILES, BLOCK_M)
    DS: gl.constexpr = gl.NVMMASharedLayout.get_default_for([ROWS, BLOCK_M], q.dtype)
    p_ring = make_ring(q.dtype, ROWS, BLOCK_M, DS, 1)
    grads = Grads(dk, dv, None, None)
    to = Sums(sums[0], None, None, None, None)
    gl.warp_specialize(
        [
            (
                multiply,
                (
                    rings, p_ring, call, grads, group_size, 0, SPEC, SCRUB, BLOCK_M, BLOCK_D,
                    BLOCK_DV,
                ),
            ),
            (
                multiply,
                (
                    rings, p_ring, call, grads, group_size, 1, SPEC, SCRUB, BLOCK_M, BLOCK_D,
                    BLOCK_DV,
                ),
            ),
            (
                multiply_queries,
                (rings, call, to, group_size, tiles_q, SPEC, False, BLOCK_M, BLOCK_D),
            ),
            (
                load,
                (
                    rings, call, q, k, v, dout, stats, group_size, parts, tiles_q,
                    SPEC, False, BLOCK_M, BLOCK_N,
                ),
            ),
        ],
        [4, 4, 1],
        [208, 72, 24],
    )  # fmt: skip

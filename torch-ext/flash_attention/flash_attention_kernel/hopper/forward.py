"""Attention forward for sm_90: a warp fills rings of tiles, warp groups of 64 query rows multiply.

Persistent: every program draws tiles, longest first, and loads the next under the end of this one.
A consumer computes the softmax of a block, then has its PV and the next block's QKᵀ in flight
together; the tensor cores work for one consumer while the others are at their softmax, as in
FlashAttention-3 (Shah et al. 2024), which softmax.py makes short enough that they hardly pause: at
D 128 each multiplies for 1,150 cycles of 2,400 a step. What is carried round the loop is a block's
scores, in float32: its weights in half precision cost 64 instructions a step to unpack and pack.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    tma,
    warpgroup_mma_wait,
)

from ..masks import diagonal_shift, keep_mask
from ..pages import Paging
from ..scores import exponent_scale, mods_at_head, score
from ..seqlen import Lengths
from .epilogue import Out, store, store_tile
from .pipeline import (
    ROWS,
    columns,
    first_column,
    make_channel,
    make_notes,
    make_tiles,
    product_layout,
)
from .producer import Given, load
from .products import (
    Rings,
    add_values,
    awaited,
    clean,
    groups_of_products,
    products,
    rescaled_if_new,
    zero_output,
)
from .schedule import (
    TILE_FIELDS,
    UNSPECIALIZED,
    Call,
    Schedule,
    received_tile,
    value_of_note,
)
from .softmax import GAIN_8, block_weights, initial_sums, of_rows


@gluon.jit
def kept(
    first_n, q_pos, COLS: gl.constexpr, tile, mods, head_mods, SPEC: gl.constexpr,
    DTYPE: gl.constexpr,
):  # fmt: skip
    """Which of COLS keys from first_n on each query sees. Every thread counts from the first that
    it has: then what its elements are compared with is the same in all blocks, and no register."""
    first = first_column(first_n, q_pos)
    rows, k_end = (q_pos - first)[:, None], (tile.seqlen_k - first)[:, None]
    return keep_mask(rows, columns(COLS, DTYPE)[None, :], head_mods.shift, k_end, mods, SPEC, True)


@gluon.constexpr_function
def gain_of_products(DTYPE, SPEC):
    """Whether float8's products are to be multiplied by their gain, as the exponent's scale, which
    else takes it, does not scale all of a score."""
    return DTYPE == gl.float8e4nv and (SPEC.softcap or not SPEC.defer_scale)


@gluon.jit
def scores_of(qk, i, q_pos, tile, mods, head_mods, SPEC: gl.constexpr, DTYPE: gl.constexpr):
    """The scores of block i from its products; -inf where the mask hides the key."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, qk.type.layout)
    first_n = tile.last_n - i * qk.shape[1]
    k_pos = first_n + gl.arange(0, qk.shape[1], layout=LAYOUT)
    if gain_of_products(DTYPE, SPEC):
        qk = qk * tile.gain
    scores = score(qk, q_pos[:, None], k_pos[None, :], mods, head_mods, SPEC)
    masked = i < tile.masked_end
    if SPEC.left:
        masked = masked | (i >= tile.blocks - tile.masked_begin)
    if masked:
        keep = kept(first_n, q_pos, qk.shape[1], tile, mods, head_mods, SPEC, DTYPE)
        scores = gl.where(keep, scores, float("-inf"))
    return scores


@gluon.jit
def first_products(
    blocks, q_count, k_count, rings, SPEC: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """QKᵀ of the first block of a tile [ROWS, BLOCK_N], under way; of no use if `blocks` < 1."""
    if blocks > 0:
        rings.q.wait(q_count)
        rings.k.wait(k_count)
    return products(q_count, k_count, rings, SPEC, BLOCK_N, BLOCK_D)


@gluon.jit
def first_products_alone(
    blocks, q_count, k_count, rings, SPEC: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """`first_products`, waited for."""
    qk = first_products(blocks, q_count, k_count, rings, SPEC, BLOCK_N, BLOCK_D)
    qk = warpgroup_mma_wait(0, deps=[qk])
    if blocks > 0:
        rings.k.release(k_count)
    return qk


@gluon.constexpr_function
def releases_late(STAGES):
    """Whether a step releases the values of the one before, under its products. Of two tiles of
    values the next would come too late: D 128 took 4 % more time."""
    return STAGES > 2


@gluon.jit
def weights_of(
    acc, l_i, m_i, qk, i, q_pos, tile, mods, head_mods, SPEC: gl.constexpr, DTYPE: gl.constexpr
):
    """Block i's softmax -> (acc rescaled, l_i, m_i, weights)"""
    scores = scores_of(qk, i, q_pos, tile, mods, head_mods, SPEC, DTYPE)
    scale = exponent_scale(mods, SPEC)
    if DTYPE == gl.float8e4nv and not gain_of_products(DTYPE, SPEC):
        scale *= tile.gain
    weights, alpha, l_i, m_i = block_weights(scores, i, scale, l_i, m_i, DTYPE)
    return rescaled_if_new(acc, alpha), l_i, m_i, weights


@gluon.jit
def step(
    acc, l_i, m_i, qk, q_count, q_pos, tile, i, kv_count, rings, mods, head_mods,
    SPEC: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr,
):  # fmt: skip
    """Block i's softmax; then QKᵀ of the next, for whose keys the step before has waited, and its
    PV. What passes between warps does so under these products: a release stops a warp group until
    all its warps are there."""
    acc, l_i, m_i, p = weights_of(
        acc, l_i, m_i, qk, i, q_pos, tile, mods, head_mods, SPEC, rings.q.tiles.dtype
    )
    LATE: gl.constexpr = releases_late(rings.v.STAGES)
    qk = products(q_count, kv_count + i + 1, rings, SPEC, BLOCK_N, BLOCK_D)
    acc = add_values(acc, p, kv_count + i, rings, BLOCK_N)
    if LATE:
        rings.v.release(kv_count + i - 1, i > 0)
    qk = warpgroup_mma_wait(len(acc), deps=[qk])
    rings.k.release(kv_count + i + 1)
    rings.k.wait(kv_count + i + 2, i + 2 < tile.blocks)
    acc = awaited(acc, 0)
    if not LATE:
        rings.v.release(kv_count + i)
    return acc, l_i, m_i, qk


@gluon.jit
def last_step(
    acc, l_i, m_i, qk, q_pos, tile, tile_count, q_count, kv_count, rings, out, mods, head_mods,
    WHICH: gl.constexpr, SPEC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr,
):  # fmt: skip
    """The last block's softmax and PV, and the next tile's first QKᵀ, under which this one's rows
    are written. -> (qk, the next tile's blocks)"""
    last = tile.blocks - 1
    acc, l_i, m_i, p = weights_of(
        acc, l_i, m_i, qk, last, q_pos, tile, mods, head_mods, SPEC, rings.q.tiles.dtype
    )
    acc = add_values(acc, p, kv_count + last, rings, BLOCK_N)
    if releases_late(rings.v.STAGES):
        rings.v.release(kv_count + last - 1, last > 0)
    blocks = value_of_note(rings.notes, tile_count)
    next_k = kv_count + tile.blocks
    qk = first_products(blocks, q_count + BLOCK_M // ROWS, next_k, rings, SPEC, BLOCK_N, BLOCK_D)
    LATER: gl.constexpr = groups_of_products(rings.k_more is not None, SPEC.head_dim, BLOCK_D)
    acc = awaited(acc, LATER)
    rings.v.release(kv_count + last)
    ROW: gl.constexpr = q_pos.type.layout
    DTYPE: gl.constexpr = rings.q.tiles.dtype
    sums, maxima = of_rows(l_i, m_i, ROW, DTYPE)
    if out.tiles is None:
        if DTYPE == gl.float8e4nv:
            store(out, acc, sums, maxima, q_pos, tile, tile.value_gain / GAIN_8, WHICH, SPEC)
        else:
            store(out, acc, sums, maxima, q_pos, tile, 1.0, WHICH, SPEC)
    else:
        store_tile(out, rings.q, acc, sums, maxima, q_count, q_pos, tile, WHICH)
    qk = warpgroup_mma_wait(0, deps=[qk])
    if blocks > 0:
        rings.k.release(next_k)
    return qk, blocks


@gluon.jit
def release_stored(q_count, rings, out, WHICH: gl.constexpr, BLOCK_M: gl.constexpr):
    """Release the place of the tile before, if its rows of out have been stored from there."""
    if out.tiles is not None:
        tma.store_wait(0)  # it has read them
        rings.q.release(q_count - BLOCK_M // ROWS, q_count > WHICH)


@gluon.jit
def pass_by(tile, q_count, kv_count, rings, out, WHICH: gl.constexpr, BLOCK_M: gl.constexpr):
    """The tile's keys, for a consumer that has none of the sequence's rows: the others are the
    sooner done. Of the first block, K has been read."""
    release_stored(q_count, rings, out, WHICH, BLOCK_M)
    for i in range(tile.blocks):
        rings.k.wait(kv_count + i, i > 0)
        rings.k.release(kv_count + i, i > 0)
        rings.v.wait(kv_count + i)
        rings.v.release(kv_count + i)
    if out.tiles is None:
        rings.q.release(q_count)


@gluon.jit
def attend(
    qk, q_pos, tile, tile_count, l_i, m_i, q_count, kv_count, rings, out, mods, head_mods,
    WHICH: gl.constexpr, SPEC: gl.constexpr, SCRUB: gl.constexpr, BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
):  # fmt: skip
    """All the tile's keys, from the products of the first block on, and its rows of out and lse.
    -> (first products of the next tile, its blocks)"""
    acc = zero_output(rings, BLOCK_DV)
    if SCRUB:
        clean(rings, kv_count, tile, BLOCK_N, BLOCK_DV)
    release_stored(q_count, rings, out, WHICH, BLOCK_M)
    rings.k.wait(kv_count + 1, tile.blocks > 1)
    for i in range(tile.blocks - 1):
        acc, l_i, m_i, qk = step(
            acc, l_i, m_i, qk, q_count, q_pos, tile, i, kv_count, rings, mods, head_mods,
            SPEC, BLOCK_N, BLOCK_D,
        )  # fmt: skip
    if out.tiles is None:
        rings.q.release(q_count)
    return last_step(
        acc, l_i, m_i, qk, q_pos, tile, tile_count, q_count, kv_count, rings, out, mods, head_mods,
        WHICH, SPEC, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip


@gluon.jit
def multiply(
    rings, call, out, WHICH: gl.constexpr, SPEC: gl.constexpr, SCRUB: gl.constexpr,
    BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr,
):  # fmt: skip
    """Consumer number WHICH: rows WHICH * ROWS and on of every tile."""
    DTYPE: gl.constexpr = rings.q.tiles.dtype
    S_LAYOUT: gl.constexpr = product_layout(BLOCK_N, DTYPE)
    ROW: gl.constexpr = gl.SliceLayout(1, S_LAYOUT)
    q_count = WHICH
    kv_count = 0
    tile_count = 0
    mods = call.mods
    blocks = value_of_note(rings.notes, tile_count)
    qk = first_products_alone(blocks, q_count, kv_count, rings, SPEC, BLOCK_N, BLOCK_D)
    while blocks >= 0:
        tile = received_tile(rings.notes, blocks, tile_count, DTYPE == gl.float8e4nv)
        shift = diagonal_shift(tile.seqlen_q, tile.seqlen_k, SPEC)
        tile_count += 1
        q_pos = tile.start_m + WHICH * ROWS + gl.arange(0, ROWS, layout=ROW)
        exists = tile.seq < call.q_lengths.batch
        head_mods = mods_at_head(mods, tile.seq, tile.head, exists, shift, SPEC)
        l_i, m_i = initial_sums(qk, mods, tile.head, exists, DTYPE)
        if (tile.blocks > 0) & (tile.start_m + WHICH * ROWS < tile.seqlen_q):
            qk, blocks = attend(
                qk, q_pos, tile, tile_count, l_i, m_i, q_count, kv_count, rings, out, mods,
                head_mods, WHICH, SPEC, SCRUB, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV,
            )  # fmt: skip
            q_count += BLOCK_M // ROWS
            kv_count += tile.blocks
        else:
            if tile.blocks > 0:
                pass_by(tile, q_count, kv_count, rings, out, WHICH, BLOCK_M)
                q_count += BLOCK_M // ROWS
                kv_count += tile.blocks
            elif tile.start_m >= 0:
                acc = zero_output(rings, BLOCK_DV)
                sums, maxima = of_rows(l_i, m_i, ROW, DTYPE)
                store(out, acc, sums, maxima, q_pos, tile, 1.0, WHICH, SPEC)
            blocks = value_of_note(rings.notes, tile_count)
            qk = first_products_alone(blocks, q_count, kv_count, rings, SPEC, BLOCK_N, BLOCK_D)
    tma.store_wait(0)


@gluon.jit(do_not_specialize=UNSPECIALIZED)
def hopper_forward_kernel(
    q, k, v, q_more, k_more, v_more, out, out_tiles, lse, counters, gains, cu_seqlens_q,
    cu_seqlens_k, seqused_q, seqused_k, leftpad_k, rows_q, rows_k, batch, nheads, group_size,
    per_head, heads, total, head_group, table, columns, batch_idx, entries, mods,
    SPEC: gl.constexpr, SCRUB: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
    BLOCK_D: gl.constexpr, BLOCK_DV: gl.constexpr, STAGES: gl.constexpr, Q_TILES: gl.constexpr,
):  # fmt: skip
    """Grid: (programs,), any number. q, k, v are descriptors of [batch, seqlen, heads, head_dim]
    (packed: batch 1) with blocks [1, rows, 1, BLOCK_D], rows ROWS or BLOCK_N, q_more, k_more and
    v_more of the columns past these, or None, out an Operand, out_tiles its descriptor where a tile
    has nothing but its sequence's rows, as many as Q's, and two tiles of Q fit, or None; lse a
    pointer, counters Schedule's, table to entries a Paging's. Of float8 v is what
    transpose_values_kernel wrote, blocks [1, BLOCK_DV, BLOCK_N], and gains are Call's."""
    paging = Paging(table, columns, batch_idx, entries)
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    schedule = Schedule(per_head, heads, total, head_group, counters)
    CONSUMERS: gl.constexpr = BLOCK_M // ROWS
    q_tiles = make_channel(q, Q_TILES * CONSUMERS, 1)  # a consumer's rows each
    k_tiles = make_channel(k, STAGES, CONSUMERS)
    v_tiles = make_channel(v, STAGES, CONSUMERS)
    q_rest = None
    k_rest = None
    v_rest = None
    if v_more is not None:
        v_rest = make_tiles(v_more, STAGES)
    if k_more is not None:
        q_rest = make_tiles(q_more, Q_TILES * CONSUMERS)
        k_rest = make_tiles(k_more, STAGES)
    notes = make_notes(TILE_FIELDS, CONSUMERS)
    rings = Rings(q_tiles, k_tiles, q_rest, k_rest, v_tiles, v_rest, notes)
    call = Call(q_lengths, k_lengths, mods, nheads, schedule, gains)
    given = Given(q, k, q_more, k_more, v, v_more)
    to = Out(out, out_tiles, lse, q_lengths, nheads)
    if CONSUMERS == 2:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (rings, call, to, 0, SPEC, SCRUB, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV),
                ),
                (
                    multiply,
                    (rings, call, to, 1, SPEC, SCRUB, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV),
                ),
                (load, (rings, call, given, paging, group_size, SPEC, BLOCK_M, BLOCK_N)),
            ],
            [4, 1],
            [240, 24],
        )
    else:
        gl.warp_specialize(
            [
                (
                    multiply,
                    (rings, call, to, 0, SPEC, SCRUB, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV),
                ),
                (
                    multiply,
                    (rings, call, to, 1, SPEC, SCRUB, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV),
                ),
                (
                    multiply,
                    (rings, call, to, 2, SPEC, SCRUB, BLOCK_M, BLOCK_N, BLOCK_D, BLOCK_DV),
                ),
                (load, (rings, call, given, paging, group_size, SPEC, BLOCK_M, BLOCK_N)),
            ],
            [4, 4, 1],
            [160, 160, 24],
        )

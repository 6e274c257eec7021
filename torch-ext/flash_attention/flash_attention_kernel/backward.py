"""Attention backward, without atomics: every gradient is bitwise repeatable.

dq_kernel owns BLOCK_M query rows, forms delta = rowsum(dO * O) - dlse for them and sums dQ over
the keys; dkdv_kernel owns BLOCK_N keys and sums dK and dV over the queries of every head in its
group, so that nothing is expanded to the query heads. P is recomputed from Q, K and lse
(FlashAttention-2, algorithm 2): seven matrix products in all where one fused pass needs five.
dbias_kernel (score_tiles.py) owns a tile of attn_bias.
"""

import triton
import triton.language as tl

from .common import (
    LN2,
    LOG2E,
    UNSPECIALIZED,
    Queries,
    at_head,
    load_row,
    load_tile,
    row_at_head,
    row_operand,
    store_row,
    store_tile,
)
from .masks import (
    diagonal_shift,
    keep_mask,
    kv_block_range,
    masked_steps,
    q_block_range,
    start_of_step,
)
from .scores import (
    distance,
    dropout_keep,
    mods_at_head,
    probability,
    product_grad,
    score_grad,
)
from .seqlen import Lengths, find_block, partner_bounds, sequence_bounds


@triton.jit
def accumulate_dq(
    acc, dslope_row, q_tile, dout_tile, lse_log2, delta_row, q_pos, k, v,
    begin, gap_begin, gap_end, end, seqlen_k, mods, head_mods,
    SPEC: tl.constexpr, MASKED: tl.constexpr, WANT_DSLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the keys [begin, gap_begin) and [gap_end, end) to acc [BLOCK_M, BLOCK_D]: dQ, less the
    softmax scale; and to dslope_row [BLOCK_M], each row's part of the ALiBi slope's gradient."""
    first, last, gap = masked_steps(begin, gap_begin, gap_end, end, MASKED, SPEC)
    for step in tl.range(first, last, BLOCK_N):
        start_n = start_of_step(step, gap_begin, gap, MASKED, SPEC)
        k_tile = load_tile(k, start_n, seqlen_k, BLOCK_N, BLOCK_D, MASKED, SPEC.head_dim)
        v_tile = load_tile(v, start_n, seqlen_k, BLOCK_N, BLOCK_D, MASKED, SPEC.head_dim_v)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        rows = q_pos[:, None]
        cols = (start_n + tl.arange(0, BLOCK_N))[None, :]
        p = probability(qk, lse_log2[:, None], rows, cols, mods, head_mods, SPEC)
        if MASKED:
            p = tl.where(keep_mask(rows, cols, head_mods.shift, seqlen_k, mods, SPEC), p, 0.0)
        dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if SPEC.dropout:
            dp = tl.where(dropout_keep(rows, cols, mods, head_mods), dp * mods.keep_scale, 0.0)
        ds = score_grad(p, dp, delta_row[:, None])
        if WANT_DSLOPE:
            dslope_row -= tl.sum(ds * distance(rows, cols, head_mods.shift), 1)
        ds = product_grad(ds, qk, mods, SPEC)
        acc = tl.dot(ds.to(k_tile.dtype), k_tile, acc, input_precision="ieee")
    return acc, dslope_row


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dq_kernel(
    q, k, v, out, dout, dq, lse, dlse, delta, dslope,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
    rows_q, rows_k, batch, num_tiles, group_size, mods,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tiles * nheads,). Writes dq, and delta for dkdv_kernel.

    lse, dlse (None: lse has no gradient), delta and dslope (None: not wanted; each row's part of
    the ALiBi slope's gradient) are pointers, the other tensors Operands.
    d lse / d scores = P, so that dS = P * (dP - rowsum(dO * O) + dlse): dlse belongs into delta.
    """
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    nheads = tl.num_programs(0) // num_tiles
    head = tl.program_id(0) // num_tiles
    seq, block = find_block(tl.program_id(0) % num_tiles, q_lengths, BLOCK_M)
    q_first, seqlen_q = sequence_bounds(q_lengths, seq)
    k_first, seqlen_k = partner_bounds(k_lengths, seq)
    if SPEC.causal:  # longest first
        block = tl.cdiv(seqlen_q, BLOCK_M) - 1 - block
    start_m = block * BLOCK_M
    if start_m < 0 or start_m >= seqlen_q:
        return

    q = at_head(q, seq, head, q_first)
    k = at_head(k, seq, head // group_size, k_first)
    v = at_head(v, seq, head // group_size, k_first)
    out = at_head(out, seq, head, q_first)
    dout = at_head(dout, seq, head, q_first)
    q_tile = load_tile(q, start_m, seqlen_q, BLOCK_M, BLOCK_D, True, SPEC.head_dim)
    dout_tile = load_tile(dout, start_m, seqlen_q, BLOCK_M, BLOCK_D, True, SPEC.head_dim_v)
    out_tile = load_tile(out, start_m, seqlen_q, BLOCK_M, BLOCK_D, True, SPEC.head_dim_v)
    lse = row_at_head(row_operand(lse, nheads, q_lengths), seq, head, q_first)
    lse_row = load_row(lse, start_m, seqlen_q, float("inf"), BLOCK_M, True)
    q_pos = start_m + tl.arange(0, BLOCK_M)

    delta_row = tl.sum(out_tile.to(tl.float32) * dout_tile.to(tl.float32), 1)
    if dlse is not None:
        dlse = row_at_head(row_operand(dlse, nheads, q_lengths), seq, head, q_first)
        delta_row -= load_row(dlse, start_m, seqlen_q, 0.0, BLOCK_M, True)
    delta_row = tl.where(lse_row == float("inf"), 0.0, delta_row)  # no keys, no gradient
    delta = row_at_head(row_operand(delta, nheads, q_lengths), seq, head, q_first)
    store_row(delta, start_m, seqlen_q, delta_row, BLOCK_M)

    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    dslope_row = tl.zeros([BLOCK_M], dtype=tl.float32)
    shift = diagonal_shift(seqlen_q, seqlen_k, SPEC)
    head_mods = mods_at_head(mods, seq, head, seq < batch, shift, SPEC)
    begin, full_begin, full_end, end = kv_block_range(
        start_m, BLOCK_M, shift, seqlen_k, mods, SPEC, BLOCK_N
    )
    lse_log2 = lse_row * LOG2E
    # Masked run first, as in forward.py.
    acc, dslope_row = accumulate_dq(
        acc, dslope_row, q_tile, dout_tile, lse_log2, delta_row, q_pos, k, v,
        begin, full_begin, full_end, end, seqlen_k, mods, head_mods,
        SPEC, True, dslope is not None, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, dslope_row = accumulate_dq(
        acc, dslope_row, q_tile, dout_tile, lse_log2, delta_row, q_pos, k, v,
        full_begin, full_end, full_end, full_end, seqlen_k, mods, head_mods,
        SPEC, False, dslope is not None, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc *= mods.scale_log2 * LN2
    dq = at_head(dq, seq, head, q_first)
    store_tile(dq, start_m, seqlen_q, acc, BLOCK_M, BLOCK_D, SPEC.head_dim)
    if dslope is not None:
        dslope = row_at_head(row_operand(dslope, nheads, q_lengths), seq, head, q_first)
        store_row(dslope, start_m, seqlen_q, dslope_row, BLOCK_M)


@triton.jit
def accumulate_dkdv(
    dk_acc, dv_acc, k_tile, v_tile, k_pos, queries, group_size,
    begin, gap_begin, gap_end, end, seqlen_q, seqlen_k, mods, first_mods, exists,
    SPEC: tl.constexpr, MASKED: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Add the query rows [begin, gap_begin) and [gap_end, end) of `group_size` heads, at the first
    of which `queries` and `first_mods` stand, to dk_acc [BLOCK_N, BLOCK_D], less the scale, and
    dv_acc.

    Scores are computed transposed, so that P and dS leave the first two products laid out as the
    left operands of the last two. dP comes before P, so that dV's product runs under dS: 12 to 20 %
    on an H200. Three things keep the registers under 255 at head_dim 128, where each spilled: one
    flat loop over heads and blocks, no hoisting out of it, and delta loaded last.
    """
    gap = gap_end - gap_begin
    blocks = tl.cdiv(end - begin - gap, BLOCK_M)  # per head
    for step in tl.range(0, group_size * blocks, disable_licm=True):
        head = 0
        block = step
        if group_size != 1:
            # Never 0: the pipeline divides ahead of the loop's test, and LLVM may take a division
            # as proof that its divisor is not 0, and drop the test.
            head = step // tl.maximum(blocks, 1)
            block = step - head * blocks
        start_m = begin + block * BLOCK_M
        if MASKED:
            start_m = tl.where(start_m < gap_begin, start_m, start_m + gap)
        q_head = at_head(queries.q, 0, head, 0)
        dout_head = at_head(queries.dout, 0, head, 0)
        lse_head = row_at_head(queries.lse, 0, head, 0)
        delta_head = row_at_head(queries.delta, 0, head, 0)
        head_mods = mods_at_head(
            mods, first_mods.batch, first_mods.head + head, exists, first_mods.shift, SPEC
        )
        q_tile = load_tile(q_head, start_m, seqlen_q, BLOCK_M, BLOCK_D, MASKED, SPEC.head_dim)
        dout_tile = load_tile(
            dout_head, start_m, seqlen_q, BLOCK_M, BLOCK_D, MASKED, SPEC.head_dim_v
        )
        lse_log2 = LOG2E * load_row(lse_head, start_m, seqlen_q, 0.0, BLOCK_M, MASKED)
        qk = tl.dot(k_tile, tl.trans(q_tile), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        dp = tl.dot(v_tile, tl.trans(dout_tile), input_precision="ieee")  # [BLOCK_N, BLOCK_M]
        rows = k_pos[:, None]
        q_pos = start_m + tl.arange(0, BLOCK_M)
        cols = q_pos[None, :]
        p = probability(qk, lse_log2[None, :], cols, rows, mods, head_mods, SPEC)
        if MASKED:
            keep = keep_mask(cols, rows, head_mods.shift, seqlen_k, mods, SPEC)
            p = tl.where(keep & (q_pos < seqlen_q)[None, :], p, 0.0)
        dropped_p = p
        if SPEC.dropout:
            keep = dropout_keep(cols, rows, mods, head_mods)
            dropped_p = tl.where(keep, p, 0.0)
            dp = tl.where(keep, dp * mods.keep_scale, 0.0)
        p = p.to(dout_tile.dtype)
        dv_acc = tl.dot(dropped_p.to(p.dtype), dout_tile, dv_acc, input_precision="ieee")
        delta_row = load_row(delta_head, start_m, seqlen_q, 0.0, BLOCK_M, MASKED)
        ds = score_grad(p.to(tl.float32), dp, delta_row[None, :])
        ds = product_grad(ds, qk, mods, SPEC)
        dk_acc = tl.dot(ds.to(q_tile.dtype), q_tile, dk_acc, input_precision="ieee")
    return dk_acc, dv_acc


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dkdv_kernel(
    q, k, v, dout, dk, dv, lse, delta,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
    rows_q, rows_k, batch, num_tiles, group_size, mods,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tiles * nheads_k,) over blocks of keys; if causal, the longest come first.

    lse and delta are pointers, the other tensors Operands.
    """
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    nheads = tl.num_programs(0) // num_tiles * group_size
    head_k = tl.program_id(0) // num_tiles
    seq, block = find_block(tl.program_id(0) % num_tiles, k_lengths, BLOCK_N)
    k_first, seqlen_k = sequence_bounds(k_lengths, seq)
    q_first, seqlen_q = partner_bounds(q_lengths, seq)
    start_n = block * BLOCK_N
    if start_n < 0 or start_n >= seqlen_k:
        return

    k = at_head(k, seq, head_k, k_first)
    v = at_head(v, seq, head_k, k_first)
    k_tile = load_tile(k, start_n, seqlen_k, BLOCK_N, BLOCK_D, True, SPEC.head_dim)
    v_tile = load_tile(v, start_n, seqlen_k, BLOCK_N, BLOCK_D, True, SPEC.head_dim_v)
    k_pos = start_n + tl.arange(0, BLOCK_N)

    dk_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    dv_acc = tl.zeros([BLOCK_N, BLOCK_D], dtype=tl.float32)
    shift = diagonal_shift(seqlen_q, seqlen_k, SPEC)
    begin, full_begin, full_end, end = q_block_range(
        start_n, seqlen_q, shift, mods, SPEC, BLOCK_M, BLOCK_N
    )
    first_head = head_k * group_size
    queries = Queries(
        at_head(q, seq, first_head, q_first),
        at_head(dout, seq, first_head, q_first),
        row_at_head(row_operand(lse, nheads, q_lengths), seq, first_head, q_first),
        row_at_head(row_operand(delta, nheads, q_lengths), seq, first_head, q_first),
    )
    first_mods = mods_at_head(mods, seq, first_head, seq < batch, shift, SPEC)
    dk_acc, dv_acc = accumulate_dkdv(  # the diagonal's blocks, and the rows that fill no block
        dk_acc, dv_acc, k_tile, v_tile, k_pos, queries, group_size,
        begin, full_begin, full_end, end, seqlen_q, seqlen_k, mods, first_mods, seq < batch,
        SPEC, True, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dk_acc, dv_acc = accumulate_dkdv(
        dk_acc, dv_acc, k_tile, v_tile, k_pos, queries, group_size,
        full_begin, full_end, full_end, full_end, seqlen_q, seqlen_k, mods, first_mods, seq < batch,
        SPEC, False, BLOCK_M, BLOCK_D,
    )  # fmt: skip
    dk_acc *= mods.scale_log2 * LN2
    if SPEC.dropout:
        dv_acc *= mods.keep_scale
    dk = at_head(dk, seq, head_k, k_first)
    dv = at_head(dv, seq, head_k, k_first)
    store_tile(dk, start_n, seqlen_k, dk_acc, BLOCK_N, BLOCK_D, SPEC.head_dim)
    store_tile(dv, start_n, seqlen_k, dv_acc, BLOCK_N, BLOCK_D, SPEC.head_dim_v)

"""Tiles of scores made visible: the gradient of attn_bias, and the probabilities themselves.

Neither belongs to training at speed: both are as large as what they describe.
"""

import triton
import triton.language as tl

from .common import LOG2E, UNSPECIALIZED, at_head, load_row, load_tile, row_at_head, row_operand
from .masks import diagonal_shift, keep_mask
from .scores import dropout_keep, mods_at_head, probability, score_grad
from .seqlen import Lengths, partner_bounds


@triton.jit
def probability_tile(
    q, k, lse_log2, seq, head, seqlen_q, seqlen_k, q_pos, k_pos, start_m, start_n, mods,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """-> (softmax probabilities [BLOCK_M, BLOCK_N] of one tile, 0 outside the mask, head_mods)"""
    q_tile = load_tile(q, start_m, seqlen_q, BLOCK_M, BLOCK_D, True, SPEC.head_dim)
    k_tile = load_tile(k, start_n, seqlen_k, BLOCK_N, BLOCK_D, True, SPEC.head_dim)
    shift = diagonal_shift(seqlen_q, seqlen_k, SPEC)
    head_mods = mods_at_head(mods, seq, head, True, shift, SPEC)
    qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")
    rows = q_pos[:, None]
    cols = k_pos[None, :]
    p = probability(qk, lse_log2[:, None], rows, cols, mods, head_mods, SPEC)
    keep = keep_mask(rows, cols, shift, seqlen_k, mods, SPEC) & (rows < seqlen_q)
    return tl.where(keep, p, 0.0), head_mods


@triton.jit(do_not_specialize=UNSPECIALIZED)
def dbias_kernel(
    q, k, v, dout, lse, delta, dbias,
    cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
    rows_q, rows_k, batch, nheads, group_size, dbias_batch, dbias_heads, dbias_rows, mods,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of dbias [dbias_batch, dbias_heads, dbias_rows, bias_cols],), dbias contiguous.

    A program sums one tile over all the batches, heads and query rows that share it, in order: a
    dimension of size 1 is shared. lse, delta and dbias are pointers, the others Operands.
    """
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    tiles_n = tl.cdiv(mods.bias_cols, BLOCK_N)
    tiles_m = tl.cdiv(dbias_rows, BLOCK_M)
    tile = tl.program_id(0)
    start_n = tile % tiles_n * BLOCK_N
    tile_m = tile // tiles_n % tiles_m
    bias_head = tile // tiles_n // tiles_m % dbias_heads
    bias_seq = tile // tiles_n // tiles_m // dbias_heads
    k_pos = start_n + tl.arange(0, BLOCK_N)
    shared_seqs = tl.where(dbias_batch == 1, batch, 1)
    shared_heads = tl.where(dbias_heads == 1, nheads, 1)
    shared_blocks = tl.where(dbias_rows == 1, tl.cdiv(rows_q, BLOCK_M), 1)

    acc = tl.zeros([BLOCK_M, BLOCK_N], dtype=tl.float32)
    for step in tl.range(0, shared_seqs * shared_heads * shared_blocks):
        seq = bias_seq + step // shared_blocks // shared_heads
        head = bias_head + step // shared_blocks % shared_heads
        start_m = (tile_m + step % shared_blocks) * BLOCK_M
        q_first, seqlen_q = partner_bounds(q_lengths, seq)
        k_first, seqlen_k = partner_bounds(k_lengths, seq)
        if start_m < seqlen_q and start_n < seqlen_k:
            q_pos = start_m + tl.arange(0, BLOCK_M)
            rows = row_at_head(row_operand(lse, nheads, q_lengths), seq, head, q_first)
            lse_row = load_row(rows, start_m, seqlen_q, float("inf"), BLOCK_M, True)
            rows = row_at_head(row_operand(delta, nheads, q_lengths), seq, head, q_first)
            delta_row = load_row(rows, start_m, seqlen_q, 0.0, BLOCK_M, True)
            p, head_mods = probability_tile(
                at_head(q, seq, head, q_first), at_head(k, seq, head // group_size, k_first),
                lse_row * LOG2E, seq, head, seqlen_q, seqlen_k, q_pos, k_pos, start_m, start_n,
                mods, SPEC, BLOCK_M, BLOCK_N, BLOCK_D,
            )  # fmt: skip
            dout_tile = load_tile(
                at_head(dout, seq, head, q_first),
                start_m, seqlen_q, BLOCK_M, BLOCK_D, True, SPEC.head_dim_v,
            )  # fmt: skip
            v_tile = load_tile(
                at_head(v, seq, head // group_size, k_first),
                start_n, seqlen_k, BLOCK_N, BLOCK_D, True, SPEC.head_dim_v,
            )  # fmt: skip
            dp = tl.dot(dout_tile, tl.trans(v_tile), input_precision="ieee")
            if SPEC.dropout:
                keep = dropout_keep(q_pos[:, None], k_pos[None, :], mods, head_mods)
                dp = tl.where(keep, dp * mods.keep_scale, 0.0)
            acc += score_grad(p, dp, delta_row[:, None])

    first_row = (bias_seq.to(tl.int64) * dbias_heads + bias_head) * dbias_rows
    rows = tile_m * BLOCK_M + tl.arange(0, BLOCK_M)
    if dbias_rows == 1:  # its rows are the parts of one sum
        acc = tl.broadcast_to(tl.sum(acc, 0)[None, :], [BLOCK_M, BLOCK_N])
        rows = tl.arange(0, BLOCK_M)
    ptrs = dbias + (first_row + rows)[:, None] * mods.bias_cols + k_pos[None, :]
    inside = (rows < dbias_rows)[:, None] & (k_pos < mods.bias_cols)[None, :]
    tl.store(ptrs, acc.to(dbias.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=UNSPECIALIZED)
def probs_kernel(
    q, k, lse, probs, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
    rows_q, rows_k, batch, nheads, group_size, probs_rows, probs_cols, mods,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles of probs,). Fills probs [batch, heads, probs_rows, probs_cols], contiguous:
    softmax probabilities, negative where dropout drops them."""
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    tiles_n = tl.cdiv(probs_cols, BLOCK_N)
    tiles_m = tl.cdiv(probs_rows, BLOCK_M)
    tile = tl.program_id(0)
    start_n = tile % tiles_n * BLOCK_N
    start_m = tile // tiles_n % tiles_m * BLOCK_M
    head = tile // tiles_n // tiles_m % nheads
    seq = tile // tiles_n // tiles_m // nheads
    q_first, seqlen_q = partner_bounds(q_lengths, seq)
    k_first, seqlen_k = partner_bounds(k_lengths, seq)
    q_pos = start_m + tl.arange(0, BLOCK_M)
    k_pos = start_n + tl.arange(0, BLOCK_N)
    rows = row_at_head(row_operand(lse, nheads, q_lengths), seq, head, q_first)
    lse_row = load_row(rows, start_m, seqlen_q, float("inf"), BLOCK_M, True)
    p, head_mods = probability_tile(
        at_head(q, seq, head, q_first), at_head(k, seq, head // group_size, k_first),
        lse_row * LOG2E, seq, head, seqlen_q, seqlen_k, q_pos, k_pos, start_m, start_n,
        mods, SPEC, BLOCK_M, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    if SPEC.dropout:
        p = tl.where(dropout_keep(q_pos[:, None], k_pos[None, :], mods, head_mods), p, -p)
    first_row = (seq.to(tl.int64) * nheads + head) * probs_rows
    ptrs = probs + (first_row + q_pos)[:, None] * probs_cols + k_pos[None, :]
    inside = (q_pos < probs_rows)[:, None] & (k_pos < probs_cols)[None, :]
    tl.store(ptrs, p.to(probs.dtype.element_ty), mask=inside)

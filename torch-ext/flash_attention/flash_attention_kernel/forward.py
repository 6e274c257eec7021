"""Attention forward: one program computes BLOCK_M query rows of one head."""

import triton
import triton.language as tl

from .common import (
    UNSPECIALIZED,
    at_head,
    load_tile,
    row_at_head,
    row_operand,
    store_row,
    store_tile,
)
from .masks import diagonal_shift, keep_mask, kv_block_range
from .scores import dropout_keep, exponent_scale, mods_at_head, score
from .seqlen import Lengths, find_block, partner_bounds, sequence_bounds
from .softmax import finalize, initial_state, online_softmax_update


@triton.jit
def attend(
    acc, l_i, m_i, q_tile, q_pos, k, v, begin, gap_begin, gap_end, end, seqlen_k, mods, head_mods,
    SPEC: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend from q_tile [BLOCK_M, BLOCK_D] to the keys [begin, gap_begin) and [gap_end, end).
    -> (acc, l_i, m_i)"""
    gap = 0
    if MASKED:
        if SPEC.left:
            gap = gap_end - gap_begin
        else:  # nothing before the gap
            begin = gap_end
    for step in tl.range(begin, end - gap, BLOCK_N):
        start_n = step
        if MASKED and SPEC.left:
            start_n = tl.where(step < gap_begin, step, step + gap)
        k_tile = load_tile(k, start_n, seqlen_k, BLOCK_N, BLOCK_D, MASKED, SPEC.head_dim)
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        k_pos = start_n + tl.arange(0, BLOCK_N)
        scores = score(qk, q_pos[:, None], k_pos[None, :], mods, head_mods, SPEC)
        if MASKED:
            keep = keep_mask(q_pos[:, None], k_pos[None, :], head_mods.shift, seqlen_k, mods, SPEC)
            scores = tl.where(keep, scores, float("-inf"))
        p, acc, l_i, m_i = online_softmax_update(
            acc, l_i, m_i, scores, exponent_scale(mods, SPEC), MASKED or mods.bias_ptr is not None
        )
        if SPEC.dropout:
            p = tl.where(dropout_keep(q_pos[:, None], k_pos[None, :], mods, head_mods), p, 0.0)
        v_tile = load_tile(v, start_n, seqlen_k, BLOCK_N, BLOCK_D, MASKED, SPEC.head_dim_v)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return acc, l_i, m_i


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
    rows_q, rows_k, batch, num_tiles, group_size, mods,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tiles * nheads,), the tiles of one head next to each other to share K and V.

    q, k, v, out are Operands, lse a pointer; group_size = nheads // nheads_k.
    """
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    lse = row_operand(lse, tl.num_programs(0) // num_tiles, q_lengths)
    head = tl.program_id(0) // num_tiles
    seq, block = find_block(tl.program_id(0) % num_tiles, q_lengths, BLOCK_M)
    q_first, seqlen_q = sequence_bounds(q_lengths, seq)
    k_first, seqlen_k = partner_bounds(k_lengths, seq)
    if SPEC.causal:  # the last rows see most keys: they come first, short tiles end the grid
        block = tl.cdiv(seqlen_q, BLOCK_M) - 1 - block
    start_m = block * BLOCK_M
    if start_m < 0 or start_m >= seqlen_q:
        return

    q = at_head(q, seq, head, q_first)
    k = at_head(k, seq, head // group_size, k_first)
    v = at_head(v, seq, head // group_size, k_first)
    q_tile = load_tile(q, start_m, seqlen_q, BLOCK_M, BLOCK_D, True, SPEC.head_dim)
    q_pos = start_m + tl.arange(0, BLOCK_M)

    shift = diagonal_shift(seqlen_q, seqlen_k, SPEC)
    head_mods = mods_at_head(mods, seq, head, seq < batch, shift, SPEC)
    scale = exponent_scale(mods, SPEC)
    acc, l_i, m_i = initial_state(mods, head, seq < batch, scale, BLOCK_M, BLOCK_D)
    begin, full_begin, full_end, end = kv_block_range(
        start_m, shift, seqlen_k, mods, SPEC, BLOCK_M, BLOCK_N
    )
    # Masked run first: behind the full one, it had ptxas serialise all products (C7515: -20 %).
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q_tile, q_pos, k, v, begin, full_begin, full_end, end, seqlen_k, mods,
        head_mods, SPEC, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q_tile, q_pos, k, v, full_begin, full_end, full_end, full_end, seqlen_k,
        mods, head_mods, SPEC, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    out_tile, lse_row = finalize(acc, l_i, m_i, scale)
    if SPEC.dropout:
        out_tile *= mods.keep_scale
    out = at_head(out, seq, head, q_first)
    store_tile(out, start_m, seqlen_q, out_tile, BLOCK_M, BLOCK_D, SPEC.head_dim_v)
    store_row(row_at_head(lse, seq, head, q_first), start_m, seqlen_q, lse_row, BLOCK_M)

"""Attention forward: one program computes BLOCK_M query rows of one head."""

import triton
import triton.language as tl

from .attend import attend
from .common import (
    UNSPECIALIZED,
    at_head,
    load_tile,
    row_at_head,
    row_operand,
    store_row,
    store_tile,
)
from .masks import diagonal_shift, kv_block_range
from .pages import Paging, find_keys
from .scores import exponent_scale, mods_at_head
from .seqlen import Lengths, find_block, partner_bounds, sequence_bounds
from .softmax import finalize, initial_state


@triton.jit(do_not_specialize=UNSPECIALIZED)
def forward_kernel(
    q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, seqused_q, seqused_k, leftpad_k,
    rows_q, rows_k, batch, num_tiles, group_size, table, columns, batch_idx, entries, mods,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tiles * nheads,), the tiles of one head next to each other to share K and V.

    q, k, v, out are Operands, lse a pointer; group_size = nheads // nheads_k; table to entries are
    a Paging's.
    """
    paging = Paging(table, columns, batch_idx, entries)
    q_lengths = Lengths(cu_seqlens_q, seqused_q, None, rows_q, batch)
    k_lengths = Lengths(cu_seqlens_k, seqused_k, leftpad_k, rows_k, batch)
    lse = row_operand(lse, tl.num_programs(0) // num_tiles, q_lengths)
    head = tl.program_id(0) // num_tiles
    seq, block = find_block(tl.program_id(0) % num_tiles, q_lengths, BLOCK_M)
    q_first, seqlen_q = sequence_bounds(q_lengths, seq)
    k_first, seqlen_k = partner_bounds(k_lengths, seq, SPEC.page_size > 0)
    if SPEC.causal:  # the last rows see most keys: they come first, short tiles end the grid
        block = tl.cdiv(seqlen_q, BLOCK_M) - 1 - block
    start_m = block * BLOCK_M
    if start_m < 0 or start_m >= seqlen_q:
        return

    q = at_head(q, seq, head, q_first)
    k, v, pages = find_keys(k, v, seq, batch, head // group_size, k_first, paging, SPEC)
    q_tile = load_tile(q, start_m, seqlen_q, BLOCK_M, BLOCK_D, True, SPEC.head_dim)
    q_pos = start_m + tl.arange(0, BLOCK_M)

    shift = diagonal_shift(seqlen_q, seqlen_k, SPEC)
    head_mods = mods_at_head(mods, seq, head, seq < batch, shift, SPEC)
    scale = exponent_scale(mods, SPEC)
    acc, l_i, m_i = initial_state(mods, head, seq < batch, scale, BLOCK_M, BLOCK_D)
    begin, full_begin, full_end, end = kv_block_range(
        start_m, BLOCK_M, shift, seqlen_k, mods, SPEC, BLOCK_N
    )
    # Masked run first: behind the full one, it had ptxas serialise all products (C7515: -20 %).
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q_tile, q_tile, q_pos, k, v, pages, begin, full_begin, full_end, end,
        seqlen_k, mods, head_mods, SPEC, True, BLOCK_N, BLOCK_D,
    )  # fmt: skip
    acc, l_i, m_i = attend(
        acc, l_i, m_i, q_tile, q_tile, q_pos, k, v, pages, full_begin, full_end, full_end,
        full_end, seqlen_k, mods, head_mods, SPEC, False, BLOCK_N, BLOCK_D,
    )  # fmt: skip

    out_tile, lse_row = finalize(acc, l_i, m_i, scale)
    if SPEC.dropout:
        out_tile *= mods.keep_scale
    out = at_head(out, seq, head, q_first)
    store_tile(out, start_m, seqlen_q, out_tile, BLOCK_M, BLOCK_D, SPEC.head_dim_v)
    store_row(row_at_head(lse, seq, head, q_first), start_m, seqlen_q, lse_row, BLOCK_M)

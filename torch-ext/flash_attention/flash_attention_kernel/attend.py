"""The loop over the keys, which forward.py and decode.py share."""

import triton
import triton.language as tl

from .common import TAIL_D
from .masks import keep_mask, masked_steps, start_of_step
from .pages import columns_from, load_keys, tile_pages
from .scores import dropout_keep, exponent_scale, score
from .softmax import online_softmax_update


@triton.jit
def attend(
    acc, l_i, m_i, q_tile, q_tail, q_pos, k, v, pages, begin, gap_begin, gap_end, end, seqlen_k,
    mods, head_mods,
    SPEC: tl.constexpr, MASKED: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Attend from q_tile [BLOCK_M, BLOCK_D] to the keys [begin, gap_begin) and [gap_end, end).
    q_tail [BLOCK_M, TAIL_D]: q's columns from BLOCK_D on, if it has any. -> (acc, l_i, m_i)"""
    first, last, gap = masked_steps(begin, gap_begin, gap_end, end, MASKED, SPEC)
    start_n = start_of_step(first, gap_begin, gap, MASKED, SPEC)
    found = tile_pages(pages, start_n, seqlen_k, BLOCK_N, SPEC)
    for step in tl.range(first, last, BLOCK_N):
        start_n = start_of_step(step, gap_begin, gap, MASKED, SPEC)
        k_tile = load_keys(
            k, pages, found, start_n, seqlen_k, BLOCK_N, BLOCK_D, MASKED, SPEC.head_dim, SPEC
        )
        qk = tl.dot(q_tile, tl.trans(k_tile), input_precision="ieee")  # [BLOCK_M, BLOCK_N]
        if SPEC.head_dim > BLOCK_D:
            k_tail = load_keys(
                columns_from(k, BLOCK_D), pages, found, start_n, seqlen_k, BLOCK_N, TAIL_D, MASKED,
                SPEC.head_dim - BLOCK_D, SPEC,
            )  # fmt: skip
            qk = tl.dot(q_tail, tl.trans(k_tail), qk, input_precision="ieee")
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
        v_tile = load_keys(
            v, pages, found, start_n, seqlen_k, BLOCK_N, BLOCK_D, MASKED, SPEC.head_dim_v, SPEC
        )
        if SPEC.page_size > 0:
            start_n = start_of_step(step + BLOCK_N, gap_begin, gap, MASKED, SPEC)
            found = tile_pages(pages, start_n, seqlen_k, BLOCK_N, SPEC)
        acc = tl.dot(p.to(v_tile.dtype), v_tile, acc, input_precision="ieee")
    return acc, l_i, m_i

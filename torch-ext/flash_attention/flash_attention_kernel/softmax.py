"""Online softmax (Milakov and Gimelshein 2018; FlashAttention-2, algorithm 1)."""

import triton
import triton.language as tl

from .common import LN2, LOG2E


@triton.jit
def initial_state(mods, head, has_keys, scale, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """-> (acc, l_i, m_i) before the first key: nothing, or the head's sink (gpt-oss), which is a
    score without a value. The tail of a packed tensor, which has no keys at all, has no sink."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    if mods.sink_ptr is not None:
        sink_log2 = tl.load(mods.sink_ptr + head).to(tl.float32) * LOG2E
        if has_keys and sink_log2 != float("-inf"):
            l_i += 1.0
            m_i = tl.zeros([BLOCK_M], dtype=tl.float32) + sink_log2 / scale
    return acc, l_i, m_i


@triton.jit
def online_softmax_update(acc, l_i, m_i, scores, scale, ANY_INF: tl.constexpr):
    """Fold one block of scores [BLOCK_M, BLOCK_N] into the running state.

    acc [BLOCK_M, BLOCK_D], l_i and m_i [BLOCK_M]: output, sum and maximum so far; m_i has the
    scores' units and `scale` turns those into log2 units. ANY_INF: a row's scores may all be -inf.
    -> (p, acc, l_i, m_i), acc rescaled.
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    m_log2 = m_new * scale
    if ANY_INF:  # a row that has seen no key yet keeps m = -inf; -inf - -inf would be NaN
        m_log2 = tl.where(m_new == float("-inf"), 0.0, m_log2)
    p = tl.exp2(scores * scale - m_log2[:, None])
    alpha = tl.exp2(m_i * scale - m_log2)
    return p, acc * alpha[:, None], l_i * alpha + tl.sum(p, 1), m_new


@triton.jit
def finalize(acc, l_i, m_i, scale):
    """-> (output [BLOCK_M, BLOCK_D], natural-log lse [BLOCK_M]); a row without keys: 0, +inf."""
    empty = l_i == 0.0
    out = acc / tl.where(empty, 1.0, l_i)[:, None]
    lse = (m_i * scale + tl.log2(l_i)) * LN2
    return out, tl.where(empty, float("inf"), lse)

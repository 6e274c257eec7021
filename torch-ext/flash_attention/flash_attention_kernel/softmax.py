"""Online softmax (Milakov and Gimelshein 2018; FlashAttention-2, algorithm 1)."""

import triton
import triton.language as tl

from .common import LN2, LOG2E


@triton.jit
def initial_state(mods, head, has_keys, scale, BLOCK_M: tl.constexpr, BLOCK_D: tl.constexpr):
    """-> (acc, l_i, m_i) before the first key: nothing, or the head's sink (gpt-oss), which is a
    score without a value. The tail of a packed tensor, which has no keys at all, has no sink.
    head: of all rows, or each row's [BLOCK_M]."""
    acc = tl.zeros([BLOCK_M, BLOCK_D], dtype=tl.float32)
    l_i = tl.zeros([BLOCK_M], dtype=tl.float32)
    m_i = tl.full([BLOCK_M], float("-inf"), dtype=tl.float32)
    l_i, m_i = with_sink(l_i, m_i, mods, head, has_keys, scale)
    return acc, l_i, m_i


@triton.jit
def with_sink(l_i, m_i, mods, head, has_keys, scale):
    """-> (l_i, m_i) and the head's sink, if it has one."""
    if mods.sink_ptr is not None:
        sink_log2 = tl.load(mods.sink_ptr + head).to(tl.float32) * LOG2E
        there = has_keys & (sink_log2 != float("-inf"))
        l_i += tl.where(there, 1.0, 0.0)
        m_i = tl.where(there, sink_log2 / scale, m_i)
    return l_i, m_i


@triton.jit
def online_softmax_update(acc, l_i, m_i, scores, scale, ANY_INF: tl.constexpr):
    """Fold one block of scores [BLOCK_M, BLOCK_N] into the output so far, acc [BLOCK_M, BLOCK_D],
    the running sum and the running maximum, both [BLOCK_M].

    m_i has the scores' units and `scale` turns those into log2 units. ANY_INF: a row's scores may
    all be -inf. -> (p, acc, l_i, m_i)
    """
    m_new = tl.maximum(m_i, tl.max(scores, 1))
    m_log2 = m_new * scale
    if ANY_INF:  # a row that has seen no key yet keeps m = -inf; -inf - -inf would be NaN
        m_log2 = tl.where(m_new == float("-inf"), 0.0, m_log2)
    p = tl.exp2(scores * scale - m_log2[:, None])
    alpha = tl.exp2(m_i * scale - m_log2)
    l_i = l_i * alpha + tl.sum(p, 1)
    return p, acc * alpha[:, None], l_i, m_new


@triton.jit
def finalize(acc, l_i, m_i, scale):
    """-> (output [BLOCK_M, BLOCK_D], natural-log lse [BLOCK_M]); a row without keys: 0, +inf."""
    empty = l_i == 0.0
    out = acc / tl.where(empty, 1.0, l_i)[:, None]
    lse = (m_i * scale + tl.log2(l_i)) * LN2
    return out, tl.where(empty, float("inf"), lse)


@triton.jit
def merge_splits(
    out_ptr, out_split, lse_ptr, lse_split, num_splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr,
):  # fmt: skip
    """One row's partial results, merged: out = sum_s exp(lse_s - lse) out_s, lse = log sum_s
    exp(lse_s); a split without keys has lse +inf or -inf, and its out is not read.

    -> (out [BLOCK_D], lse, -inf if no split has keys). The sum runs in blocks of BLOCK_S, in order:
    splits without keys after the last do not change a bit of it.
    """
    offs_s = tl.arange(0, BLOCK_S)
    offs_d = tl.arange(0, BLOCK_D)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    total = 0.0
    top = float("-inf")
    for start in tl.range(0, num_splits, BLOCK_S):
        split = start + offs_s
        lse = load_lse(lse_ptr, lse_split, split, num_splits)
        ptrs = out_ptr + split.to(tl.int64)[:, None] * out_split + offs_d[None, :]
        # Not masked by lse, for which it would have to wait.
        part = tl.load(
            ptrs, mask=(split < num_splits)[:, None] & (offs_d < DIM)[None, :], other=0.0
        )
        part = tl.where((lse > float("-inf"))[:, None], part.to(tl.float32), 0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        # Differences first: the weight of a split alone is 1 to the last bit.
        finite_top = tl.where(new_top == float("-inf"), 0.0, new_top)
        weight = tl.exp2((lse - finite_top) * LOG2E)
        alpha = tl.exp2((top - finite_top) * LOG2E)
        acc = acc * alpha + tl.sum(weight[:, None] * part, 0)
        total = total * alpha + tl.sum(weight, 0)
        top = new_top
    out = acc / tl.where(total == 0.0, 1.0, total)
    return out, tl.where(total == 0.0, float("-inf"), top + tl.log2(total) * LN2)


@triton.jit
def load_lse(ptr, stride, split, num_splits):
    """[BLOCK_S] lse of the splits, -inf for those without keys and past the last."""
    lse = tl.load(ptr + split.to(tl.int64) * stride, mask=split < num_splits, other=float("-inf"))
    lse = lse.to(tl.float32)
    return tl.where(lse == float("inf"), float("-inf"), lse)

"""The math between QKᵀ and the softmax, its gradient, and which probabilities dropout keeps.

score = softcap * tanh(softmax_scale * QKᵀ / softcap) - slope * |i + shift - j| + attn_bias, each
term where it is given; logits are in log2 units.
"""

import triton
import triton.language as tl

from .common import LN2, LOG2E, HeadMods

PHILOX_ROUNDS: tl.constexpr = tl.constexpr(7)  # as FA2; 7 pass BigCrush (Salmon et al. 2011)


@triton.jit
def mods_at_head(mods, batch, head, exists, shift, SPEC: tl.constexpr):
    """What changes the scores of one head of one sequence, if that exists: a tail does not."""
    slope_log2 = 0.0
    if mods.alibi_ptr is not None:
        offset = batch * mods.alibi_batch + head
        slope_log2 = tl.load(mods.alibi_ptr + offset, mask=exists, other=0.0) * LOG2E
    bias_ptr = 0
    if mods.bias_ptr is not None:
        offset = tl.cast(batch, tl.int64) * mods.bias_batch
        bias_ptr = mods.bias_ptr + offset + tl.cast(head, tl.int64) * mods.bias_head
    seed = 0
    if SPEC.dropout:
        seed = tl.load(mods.seed_ptr)
    return HeadMods(bias_ptr, slope_log2, seed, batch, head, shift)


@triton.jit
def capped(qk, mods, SPEC: tl.constexpr):
    """tanh(softmax_scale * QKᵀ / softcap)"""
    x = qk * (mods.tanh_log2 * (LN2 * 0.5))
    if SPEC.fast_tanh:  # one instruction, right to 2^-11: below the rounding of bfloat16's P
        return tl.inline_asm_elementwise(
            "tanh.approx.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        t = 1.0 - 2.0 / (tl.exp2(qk * mods.tanh_log2) + 1.0)
        if SPEC.precise:  # near 0 that cancels: its series, right to 1e-8 below 1/4
            x2 = x * x
            series = x2 * (-17 / 315 + x2 * (62 / 2835))
            t = tl.where(tl.abs(x) < 0.25, x + x * x2 * (-1 / 3 + x2 * (2 / 15) + x2 * series), t)
        return t


@triton.jit
def score(qk, q_pos, k_pos, mods, head_mods, SPEC: tl.constexpr):
    """Products QKᵀ -> scores, which `exponent_scale` times turns into log2 units.

    With a deferred scale the products pass untouched and the scale rides in the exponent's fused
    multiply-add: one multiplication per score fewer.
    """
    scores = qk
    if SPEC.softcap:
        scores = capped(qk, mods, SPEC)
    if SPEC.defer_scale:
        return scores
    else:
        scores *= unit(mods, SPEC)
        if mods.alibi_ptr is not None:
            scores -= head_mods.slope_log2 * distance(q_pos, k_pos, head_mods.shift)
        if mods.bias_ptr is not None:
            scores = add_bias(scores, q_pos, k_pos, mods, head_mods.bias_ptr)
        return scores


@triton.jit
def distance(q_pos, k_pos, shift):
    """ALiBi's |i + shift - j| (Press et al. 2022); converted before the broadcast, as a conversion
    takes four times as long as an addition."""
    return tl.abs((q_pos + shift).to(tl.float32) - k_pos.to(tl.float32))


@triton.jit
def add_bias(scores, q_pos, k_pos, mods, bias_ptr):
    """Scores plus attn_bias; of a boolean one (bytes), -inf where it is False."""
    inside = (q_pos < mods.bias_rows) & (k_pos < mods.bias_cols)
    rows = q_pos.to(tl.int64) * mods.bias_row
    ptrs = bias_ptr + rows + k_pos.to(tl.int64) * mods.bias_col
    if mods.bias_ptr.dtype.element_ty == tl.uint8:
        return tl.where(tl.load(ptrs, mask=inside, other=1) != 0, scores, float("-inf"))
    else:
        return scores + tl.load(ptrs, mask=inside, other=0.0).to(tl.float32) * LOG2E


@triton.jit
def unit(mods, SPEC: tl.constexpr):
    """What turns products, or their tanh, into log2 units."""
    if SPEC.softcap:
        return mods.softcap_log2
    else:
        return mods.scale_log2


@triton.jit
def exponent_scale(mods, SPEC: tl.constexpr):
    """What `score`'s result is still to be multiplied by to be in log2 units."""
    if SPEC.defer_scale:
        return unit(mods, SPEC)
    else:
        return 1.0


@triton.jit
def probability(qk, lse_log2, q_pos, k_pos, mods, head_mods, SPEC: tl.constexpr):
    """Softmax probabilities from products and the row's logsumexp (log2 units, +inf: no key)."""
    return tl.exp2(score(qk, q_pos, k_pos, mods, head_mods, SPEC) - lse_log2)


@triton.jit
def score_grad(p, dp, delta):
    """Gradient of the scores: P * (dP - delta), where delta = rowsum(dO * O) - dlse."""
    return p * (dp - delta)


@triton.jit
def product_grad(ds, qk, mods, SPEC: tl.constexpr):
    """Gradient of softmax_scale * QKᵀ from that of the scores."""
    if SPEC.softcap:
        t = capped(qk, mods, SPEC)
        return ds * (1.0 - t * t)
    else:
        return ds


@triton.jit
def philox_round(c0, c1, c2, c3, key0, key1):
    """One round of Philox4x32 (Salmon et al. 2011). The 64-bit products are one instruction each,
    where tl.philox takes two."""
    low = c0.to(tl.uint64) * 0xD2511F53
    high = c2.to(tl.uint64) * 0xCD9E8D57
    c0 = (high >> 32).to(tl.uint32) ^ c1 ^ key0
    c2 = (low >> 32).to(tl.uint32) ^ c3 ^ key1
    return c0, high.to(tl.uint32), c2, low.to(tl.uint32)


@triton.jit
def philox(seed, c0, c1, c2, c3):
    """Four random uint32 tensors from a 64-bit seed and four counters. The counters keep their
    shapes as long as they can, so that the first rounds run on rows and columns alone."""
    key0 = seed.to(tl.uint32)
    key1 = (seed >> 32).to(tl.uint32)
    for _ in tl.static_range(PHILOX_ROUNDS):
        c0, c1, c2, c3 = philox_round(c0, c1, c2, c3, key0, key1)
        key0 += 0x9E3779B9
        key1 += 0xBB67AE85
    return c0, c1, c2, c3


@triton.jit
def dropout_keep(q_pos, k_pos, mods, head_mods):
    """Bool: dropout keeps the pair, by Philox on (q position, k position, head, batch).

    One call's four numbers serve the pairs (q, q ^ 8) x (k, k ^ 8). A thread's part of a tensor
    core's accumulator holds all four, whichever of the two positions runs along the rows, so that
    the compiler makes one call of four; in any other layout the result is the same.
    """
    rows = (q_pos & ~8).to(tl.uint32)
    cols = (k_pos & ~8).to(tl.uint32)
    head = tl.cast(head_mods.head, tl.uint32)
    batch = tl.cast(head_mods.batch, tl.uint32)
    r0, r1, r2, r3 = philox(head_mods.seed, rows, cols, head, batch)
    odd_col = (k_pos & 8) != 0
    word = tl.where((q_pos & 8) != 0, tl.where(odd_col, r3, r2), tl.where(odd_col, r1, r0))
    return word.to(tl.int32, bitcast=True) >= mods.drop_below

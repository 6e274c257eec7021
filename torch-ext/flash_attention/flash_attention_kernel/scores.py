"""The math between QKᵀ and the softmax, and its gradient."""

import triton
import triton.language as tl


@triton.jit
def score(qk, mods, SPEC: tl.constexpr):
    """Products QKᵀ -> scores, which `exponent_scale` times turns into log2 units.

    With a deferred scale the products pass untouched and the scale rides in the exponent's fused
    multiply-add: one multiplication per score fewer.
    """
    if SPEC.defer_scale:
        return qk
    else:
        return qk * mods.scale_log2


@triton.jit
def exponent_scale(mods, SPEC: tl.constexpr):
    """What `score`'s result is still to be multiplied by to be in log2 units."""
    if SPEC.defer_scale:
        return mods.scale_log2
    else:
        return 1.0


@triton.jit
def probability(qk, lse_log2, mods):
    """Softmax probabilities from products and the row's logsumexp (log2 units, +inf: no key)."""
    return tl.exp2(qk * mods.scale_log2 - lse_log2)


@triton.jit
def score_grad(p, dp, delta):
    """Gradient of the scaled scores: P * (dP - delta), where delta = rowsum(dO * O) - dlse."""
    return p * (dp - delta)

"""Attention in [batch, heads, seqlen, head_dim] layout, as torch's SDPA has it."""

import torch

from .interface import flash_attn_func


def flash_attention(q, k, v, causal=False, softmax_scale=None):
    """Differentiable attention with the heads before the sequence.

    Arguments:
        q: [batch, nheads, seqlen_q, head_dim], float16, bfloat16 or float32.
        k: [batch, nheads_k, seqlen_k, head_dim], with nheads a multiple of nheads_k.
        v: [batch, nheads_k, seqlen_k, head_dim_v]
        causal: query i sees keys j <= i + seqlen_k - seqlen_q.
        softmax_scale: factor on the scores; None means head_dim ** -0.5.

    Returns:
        [batch, nheads, seqlen_q, head_dim_v] in q's dtype. Errors as of `flash_attn_func`, whose
        names for the dimensions are those of its own layout.
    """
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, torch.Tensor) or tensor.dim() != 4:
            got = tuple(tensor.shape) if isinstance(tensor, torch.Tensor) else type(tensor).__name__
            raise ValueError(f"{name} must be [batch, heads, seqlen, head_dim], got {got}")
    out = flash_attn_func(
        q.transpose(1, 2),
        k.transpose(1, 2),
        v.transpose(1, 2),
        softmax_scale=softmax_scale,
        causal=causal,
    )
    return out.transpose(1, 2)


@torch.no_grad()
def flash_attention_forward(q, k, v, causal=False):
    """`flash_attention` for inference: the default scale, and autograd records nothing."""
    return flash_attention(q, k, v, causal)

"""Hub layers, for `kernels.kernelize`: forward alone, which replaces that of a user's module.

They read the attributes that flash_attn.modules.mha's SelfAttention and CrossAttention have too:
`causal`, `softmax_scale`, `drop` (an nn.Dropout, whose p counts while training), and, where the
module has them, `window_size`, `alibi_slopes` and `deterministic`.
"""

import torch

from .interface import (
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def _options(module, causal):
    """What a module's attributes ask of the attention functions."""
    return {
        "dropout_p": module.drop.p if module.training else 0.0,
        "softmax_scale": module.softmax_scale,
        "causal": module.causal if causal is None else causal,
        "window_size": getattr(module, "window_size", (-1, -1)),
        "alibi_slopes": getattr(module, "alibi_slopes", None),
        "deterministic": getattr(module, "deterministic", False),
    }


class SelfAttention(torch.nn.Module):
    """softmax(QKᵀ) V of packed projections."""

    can_torch_compile = True
    has_backward = True

    def forward(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None):
        """qkv [batch, seqlen, 3, nheads, head_dim] -> [batch, seqlen, nheads, head_dim]; with
        cu_seqlens (batch + 1,) and max_seqlen, [total, 3, nheads, head_dim] -> [total, ...]."""
        options = _options(self, causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class CrossAttention(torch.nn.Module):
    """softmax(QKᵀ) V of a query and packed keys and values."""

    can_torch_compile = True
    has_backward = True

    def forward(
        self,
        q,
        kv,
        causal=None,
        cu_seqlens=None,
        max_seqlen=None,
        cu_seqlens_k=None,
        max_seqlen_k=None,
    ):
        """q [batch, seqlen_q, nheads, head_dim], kv [batch, seqlen_k, 2, nheads_k, head_dim] ->
        like q; with cu_seqlens of both, batch and seqlen are one dimension."""
        options = _options(self, causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        lengths = (cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k)
        return flash_attn_varlen_kvpacked_func(q, kv, *lengths, **options)

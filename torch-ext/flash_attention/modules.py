"""nn.Modules: the attention modules of flash_attn, and multi-head attention built on them."""

import math
from dataclasses import dataclass, field
from typing import Optional

import torch
from torch import nn

from .kvcache import flash_attn_with_kvcache
from .layers import CrossAttention, SelfAttention
from .padding import pad_input, unpad_input
from .rotary import apply_rotary_emb


class FlashSelfAttention(SelfAttention):
    """Self-attention of packed projections; `forward` is `layers.SelfAttention`'s.

    Arguments:
        causal, softmax_scale, window_size, deterministic: as in `flash_attn_func`.
        attention_dropout: `dropout_p` while training.
        alibi_slopes: (nheads,) float32 tensor, kept as a buffer that is not saved.
    """

    def __init__(
        self,
        causal=False,
        softmax_scale=None,
        attention_dropout=0.0,
        window_size=(-1, -1),
        alibi_slopes=None,
        deterministic=False,
    ):
        super().__init__()
        _keep_options(
            self, causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )


class FlashCrossAttention(CrossAttention):
    """Attention of a query to packed keys and values; `forward` is `layers.CrossAttention`'s, the
    arguments are `FlashSelfAttention`'s."""

    def __init__(
        self,
        causal=False,
        softmax_scale=None,
        attention_dropout=0.0,
        window_size=(-1, -1),
        alibi_slopes=None,
        deterministic=False,
    ):
        super().__init__()
        _keep_options(
            self, causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )


def _keep_options(
    module, causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
):
    module.causal = causal
    module.softmax_scale = softmax_scale
    module.drop = nn.Dropout(attention_dropout)
    module.window_size = window_size
    module.deterministic = deterministic
    module.register_buffer("alibi_slopes", alibi_slopes, persistent=False)


class FlashAttention(nn.Module):
    """flash_attn 1's module: self-attention of padded or packed projections.

    Arguments:
        softmax_scale: as in `flash_attn_func`.
        attention_dropout: `dropout_p` while training.
    """

    def __init__(self, softmax_scale=None, attention_dropout=0.0):
        super().__init__()
        self.inner = FlashSelfAttention(False, softmax_scale, attention_dropout)

    def forward(
        self, qkv, key_padding_mask=None, causal=False, cu_seqlens=None, max_s=None,
        need_weights=False,
    ):  # fmt: skip
        """-> (out, None)

        Arguments:
            qkv: [batch, seqlen, 3, nheads, head_dim], or [total, 3, nheads, head_dim] with
                cu_seqlens and max_s.
            key_padding_mask: [batch, seqlen] bool, True for tokens; the output of others is 0.
            need_weights: must be False: the probabilities are never stored.
        """
        if need_weights:
            raise NotImplementedError(
                "need_weights: the probabilities are never stored; see return_attn_probs of "
                "flash_attn_func"
            )
        if key_padding_mask is None:
            return self.inner(qkv, causal, cu_seqlens, max_s), None
        if cu_seqlens is not None:
            raise ValueError("key_padding_mask and cu_seqlens exclude one another: give one")
        batch, seqlen = qkv.shape[:2]
        tokens, indices, cu_seqlens, longest, _ = unpad_input(qkv, key_padding_mask)
        out = self.inner(tokens, causal, cu_seqlens, longest)
        return pad_input(out, indices, batch, seqlen), None


class RotaryEmbedding(nn.Module):
    """Tables of cos and sin for `apply_rotary_emb`, as long as they were ever needed.

    Arguments:
        dim: columns that are turned, rotary_dim.
        base: pair i turns by base ** (-2 i / dim) radians per position.
        interleaved: as in `apply_rotary_emb`.
    """

    def __init__(self, dim, base=10000.0, interleaved=False, device=None):
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved
        exponents = torch.arange(0, dim, 2, device=device, dtype=torch.float32) / dim
        self.register_buffer("inv_freq", base**-exponents, persistent=False)
        self._tables = None

    def tables(self, seqlen, like):
        """cos and sin, [at least seqlen, dim / 2] in `like`'s dtype, on its device."""
        tables = self._tables
        if (
            tables is None
            or tables[0].shape[0] < seqlen
            or tables[0].device != like.device
            or tables[0].dtype != like.dtype
            or (self.training and tables[0].is_inference())
        ):
            positions = torch.arange(seqlen, device=like.device, dtype=torch.float32)
            angles = torch.outer(positions, self.inv_freq.to(like.device, torch.float32))
            tables = self._tables = (angles.cos().to(like.dtype), angles.sin().to(like.dtype))
        return tables

    def forward(self, x, seqlen_offset=0, cu_seqlens=None, max_seqlen=None):
        """x [batch, seqlen, nheads, head_dim], or packed with cu_seqlens and max_seqlen, turned."""
        seqlen = x.shape[1] if cu_seqlens is None else max_seqlen
        cos, sin = self.tables(int(seqlen) + seqlen_offset, x)
        return apply_rotary_emb(
            x, cos, sin, self.interleaved, seqlen_offsets=seqlen_offset, cu_seqlens=cu_seqlens
        )


@dataclass
class InferenceParams:
    """What the layers of a model share while it generates, as flash_attn.utils.generation's."""

    max_seqlen: int  # rows of the caches
    max_batch_size: int
    seqlen_offset: int = 0  # rows that the caches hold of every sequence; the caller counts on
    batch_size_offset: int = 0  # the batch at hand begins at this entry of the caches
    key_value_memory_dict: dict = field(default_factory=dict)  # layer_idx -> its cache
    lengths_per_sample: Optional[torch.Tensor] = None  # (batch,) int32, in seqlen_offset's place


class MHA(nn.Module):
    """Multi-head self- or cross-attention: projections, rotary embedding, attention, projection.
    Parameters are named as those of flash_attn.modules.mha.MHA, whose checkpoints load.

    Arguments:
        embed_dim: width of the input; head_dim = embed_dim / num_heads.
        num_heads, num_heads_kv: query heads, and KV heads (None: as many), which divide them.
        cross_attn: the keys and values come from `x_kv`.
        qkv_proj_bias, out_proj_bias: whether the projections have biases.
        dropout: of the attention probabilities, while training.
        softmax_scale, causal, window_size: as in `flash_attn_func`.
        rotary_emb_dim: columns of q and k that are turned; 0: none.
        rotary_emb_base, rotary_emb_interleaved: as in `RotaryEmbedding`.
        use_alibi: ALiBi with `get_alibi_slopes(num_heads)`.
        layer_idx: the layer's key in InferenceParams.key_value_memory_dict.
    """

    def __init__(
        self,
        embed_dim,
        num_heads,
        num_heads_kv=None,
        cross_attn=False,
        qkv_proj_bias=True,
        out_proj_bias=True,
        dropout=0.0,
        softmax_scale=None,
        causal=False,
        rotary_emb_dim=0,
        rotary_emb_base=10000.0,
        rotary_emb_interleaved=False,
        use_alibi=False,
        window_size=(-1, -1),
        layer_idx=None,
        device=None,
        dtype=None,
    ):
        super().__init__()
        self.layer_idx = layer_idx
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        if embed_dim % num_heads:
            raise ValueError(
                f"embed_dim must be a multiple of num_heads {num_heads}, got {embed_dim}"
            )
        if num_heads % self.num_heads_kv:
            raise ValueError(f"num_heads_kv must divide num_heads {num_heads}, got {num_heads_kv}")
        if cross_attn and rotary_emb_dim:
            raise ValueError(
                "rotary_emb_dim must be 0 with cross_attn: its positions are not shared"
            )
        self.head_dim = embed_dim // num_heads
        self.cross_attn = cross_attn
        factory = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.num_heads_kv * self.head_dim
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **factory)
        self.rotary_emb = None
        if rotary_emb_dim:
            rotary = (rotary_emb_dim, rotary_emb_base, rotary_emb_interleaved)
            self.rotary_emb = RotaryEmbedding(*rotary, device=device)
        slopes = None
        if use_alibi:
            slopes = torch.tensor(get_alibi_slopes(num_heads), device=device, dtype=torch.float32)
        options = (causal, softmax_scale, dropout, window_size, slopes)
        self.inner_attn = FlashSelfAttention(*options)
        self.inner_cross_attn = FlashCrossAttention(*options)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)

    def forward(
        self,
        x,
        x_kv=None,
        key_padding_mask=None,
        cu_seqlens=None,
        max_seqlen=None,
        cu_seqlens_k=None,
        max_seqlen_k=None,
        inference_params=None,
    ):
        """[batch, seqlen, embed_dim] -> the same; [total, embed_dim] with cu_seqlens, max_seqlen.

        Arguments:
            x_kv: the keys' and values' input, only with cross_attn; packed with cu_seqlens_k.
            key_padding_mask: [batch, seqlen] bool, True for tokens: x is unpadded for the
                attention, and the attention of the other tokens is 0. Not with cross_attn.
            inference_params: an InferenceParams: x goes on where the layer's cache ends, and its
                keys and values are written there. Alone, and not with cross_attn.
        """
        if (x_kv is not None) != self.cross_attn:
            raise ValueError("x_kv must be given if, and only if, the module has cross_attn=True")
        if inference_params is not None:
            if x_kv is not None or key_padding_mask is not None or cu_seqlens is not None:
                raise NotImplementedError(
                    "inference_params needs self-attention of [batch, seqlen, embed_dim] without "
                    "key_padding_mask; see flash_attn_with_kvcache for cu_seqlens_q"
                )
            return self.out_proj(self._attend_to_cache(x, inference_params))
        if key_padding_mask is not None:
            if self.cross_attn or cu_seqlens is not None:
                raise ValueError("key_padding_mask needs self-attention without cu_seqlens")
            batch, seqlen = x.shape[:2]
            tokens, indices, cu_seqlens, longest, _ = unpad_input(x, key_padding_mask)
            out = self._attend(tokens, tokens, cu_seqlens, longest, cu_seqlens, longest)
            return self.out_proj(pad_input(out, indices, batch, seqlen))
        if not self.cross_attn:
            x_kv, cu_seqlens_k, max_seqlen_k = x, cu_seqlens, max_seqlen
        return self.out_proj(
            self._attend(x, x_kv, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k)
        )

    def _attend(self, x, x_kv, cu_seqlens, max_seqlen, cu_seqlens_k, max_seqlen_k):
        """Projected, turned, attended to: [..., embed_dim]"""
        lengths = {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        packed = self.num_heads == self.num_heads_kv and not self.cross_attn
        if packed and self.rotary_emb is None:
            qkv = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim))
            return self.inner_attn(qkv, **lengths).flatten(-2)
        q, kv = self._project(x, x_kv)
        if self.rotary_emb is not None:
            k, v = kv.unbind(-3)
            q, k = (self.rotary_emb(t, 0, cu_seqlens, max_seqlen) for t in (q, k))
            kv = torch.stack([k, v], -3)
        lengths.update(cu_seqlens_k=cu_seqlens_k, max_seqlen_k=max_seqlen_k)
        return self.inner_cross_attn(q, kv, **lengths).flatten(-2)

    def _project(self, x, x_kv):
        """-> q [..., num_heads, head_dim], kv [..., 2, num_heads_kv, head_dim]"""
        if self.cross_attn:
            q, kv = self.Wq(x), self.Wkv(x_kv)
        else:
            qkv = self.Wqkv(x)
            q, kv = qkv.split((x.shape[-1], qkv.shape[-1] - x.shape[-1]), dim=-1)
        q = q.unflatten(-1, (self.num_heads, self.head_dim))
        return q, kv.unflatten(-1, (2, self.num_heads_kv, self.head_dim))

    def allocate_inference_cache(self, batch_size, max_seqlen, dtype=None):
        """-> an empty cache, [batch_size, max_seqlen, 2, num_heads_kv, head_dim]"""
        weight = self.out_proj.weight
        shape = (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim)
        return weight.new_empty(shape, dtype=dtype or weight.dtype)

    def _attend_to_cache(self, x, params):
        """Projected, turned, appended to the layer's cache, attended to it: [..., embed_dim]"""
        if self.layer_idx is None:
            raise ValueError("layer_idx must be given to MHA: inference_params keeps caches by it")
        q, kv = self._project(x, None)
        caches = params.key_value_memory_dict
        if self.layer_idx not in caches:
            sizes = (params.max_batch_size, params.max_seqlen)
            caches[self.layer_idx] = self.allocate_inference_cache(*sizes, dtype=kv.dtype)
        batch, first = x.shape[0], params.batch_size_offset
        cache = caches[self.layer_idx][first : first + batch]
        lengths = params.lengths_per_sample
        lengths = params.seqlen_offset if lengths is None else lengths[:batch]
        cos = sin = None
        if self.rotary_emb is not None:
            cos, sin = self.rotary_emb.tables(cache.shape[1], x)
        inner = self.inner_attn
        return flash_attn_with_kvcache(
            q, *cache.unbind(2), *kv.unbind(2), cos, sin, lengths,
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            alibi_slopes=inner.alibi_slopes,
            rotary_interleaved=self.rotary_emb is not None and self.rotary_emb.interleaved,
        ).flatten(-2)  # fmt: skip


def get_alibi_slopes(nheads):
    """-> list of nheads floats: the slopes of ALiBi (Press et al. 2022), 2 ** (-8 i / n) for a
    power of two n; for others those of the next smaller one and every second of the next larger."""

    def of_power(n):
        return [2.0 ** (-8.0 * (i + 1) / n) for i in range(n)]

    smaller = 2 ** math.floor(math.log2(nheads))
    return of_power(smaller) + of_power(2 * smaller)[::2][: nheads - smaller]

"""Exact attention in Triton: FlashAttention-2's API on every GPU, and on the CPU."""

from . import layers
from .classic import flash_attention, flash_attention_forward
from .interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)
from .kvcache import flash_attn_with_kvcache
from .merging import flash_attn_combine, merge_attention_states
from .modules import (
    MHA,
    FlashAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    InferenceParams,
    RotaryEmbedding,
    get_alibi_slopes,
)
from .padding import (
    index_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)
from .private import (  # noqa: F401 (importable, as in flash_attn, but not public)
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
    _flash_attn_varlen_forward,
)
from .rotary import apply_rotary_emb

__all__ = [
    "FlashAttention",
    "FlashCrossAttention",
    "FlashSelfAttention",
    "InferenceParams",
    "MHA",
    "RotaryEmbedding",
    "apply_rotary_emb",
    "flash_attention",
    "flash_attention_forward",
    "flash_attn_combine",
    "flash_attn_func",
    "flash_attn_kvpacked_func",
    "flash_attn_qkvpacked_func",
    "flash_attn_varlen_func",
    "flash_attn_varlen_kvpacked_func",
    "flash_attn_varlen_qkvpacked_func",
    "flash_attn_with_kvcache",
    "get_alibi_slopes",
    "index_first_axis",
    "layers",
    "merge_attention_states",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]

"""FlashAttention-2's functions: names, order and defaults of flash_attn 2.7."""

import numbers

import torch

from .autograd import attention
from .problem import AttentionProblem


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """Exact attention, softmax(softmax_scale * Q Kᵀ) V, without ever storing the scores.

    Dao et al. 2022 (arXiv:2205.14135) and Dao 2023 (arXiv:2307.08691). Query head i uses KV head
    i // (nheads // nheads_k), so that multi-query and grouped-query attention need no copies of
    K or V. The tensors may have any strides and any alignment.

    Arguments:
        q: [batch, seqlen_q, nheads, head_dim], float16, bfloat16 or float32 (IEEE arithmetic, no
            TF32). head_dim is 1 to 256. Inside torch.autocast, q, k and v are cast to its dtype.
        k: [batch, seqlen_k, nheads_k, head_dim], with nheads a multiple of nheads_k.
        v: [batch, seqlen_k, nheads_k, head_dim_v]; head_dim_v, 1 to 256, may differ from head_dim.
        dropout_p: must be 0.0 (not implemented yet).
        softmax_scale: factor on the scores, any finite number; None means head_dim ** -0.5.
        causal: query i sees keys j <= i + seqlen_k - seqlen_q: the mask's corner is bottom right.
        window_size: must be (-1, -1), no window (not implemented yet).
        softcap: must be 0.0 (not implemented yet).
        alibi_slopes: must be None (not implemented yet).
        deterministic: accepted; every result is bitwise repeatable in any case.
        return_attn_probs: return (out, lse, None) instead of out.

    Returns:
        out: [batch, seqlen_q, nheads, head_dim_v] in q's dtype. A query that sees no key gives 0.
        lse: only if return_attn_probs: [batch, nheads, seqlen_q] float32, the natural logarithm of
            the sum of exp(score) over the row's keys; +inf for a query that sees no key.
            Differentiable like out.

    Raises:
        TypeError: a dtype or type that does not fit, naming the argument.
        ValueError: a shape, device or value that does not fit, naming the argument.
        NotImplementedError: an option that is not implemented yet, and the way round.
        RuntimeError: on a second derivative; backward is once differentiable.
    """
    _refuse_options(dropout_p, causal, window_size, softcap, alibi_slopes)
    q, k, v = _autocast(q, k, v)
    out, lse = attention(AttentionProblem.dense(q, k, v, softmax_scale, causal))
    return (out, lse, None) if return_attn_probs else out


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` on qkv [batch, seqlen, 3, nheads, head_dim], read in place."""
    _check_packed("qkv", qkv, 5, 3, "[batch, seqlen, 3, nheads, head_dim]")
    return flash_attn_func(
        *qkv.unbind(2),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_func` on kv [batch, seqlen_k, 2, nheads_k, head_dim], read in place."""
    _check_packed("kv", kv, 5, 2, "[batch, seqlen_k, 2, nheads_k, head_dim]")
    return flash_attn_func(
        q,
        *kv.unbind(2),
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
):
    """`flash_attn_func` for sequences of different lengths, packed without padding.

    Arguments:
        q: [total_q, nheads, head_dim]; sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k: [total_k, nheads_k, head_dim]
        v: [total_k, nheads_k, head_dim_v]
        cu_seqlens_q: (batch + 1,) int32 on q's device, not decreasing, beginning with 0. int64 and
            CPU tensors are converted. Their values are read on the device, without synchronising.
        cu_seqlens_k: (batch + 1,) likewise, for k and v. Either side of a sequence may be empty.
        max_seqlen_q, max_seqlen_k: int, or a tensor of one element, which is never read: the
            kernels find their tiles from cu_seqlens, so the result does not depend on these.
        block_table: must be None (paged K and V are not implemented yet).
        The other arguments, and the errors, are those of `flash_attn_func`; causal is aligned
        bottom right in every sequence.

    Returns:
        out: [total_q, nheads, head_dim_v]; rows past cu_seqlens_q[-1] are 0.
        lse: only if return_attn_probs, in (out, lse, None): [nheads, total_q] float32.
    """
    _refuse_options(dropout_p, causal, window_size, softcap, alibi_slopes, block_table)
    _check_max_seqlen("max_seqlen_q", max_seqlen_q)
    _check_max_seqlen("max_seqlen_k", max_seqlen_k)
    q, k, v = _autocast(q, k, v)
    out, lse = attention(
        AttentionProblem.varlen(q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal)
    )
    return (out, lse, None) if return_attn_probs else out


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` on qkv [total, 3, nheads, head_dim], read in place."""
    _check_packed("qkv", qkv, 4, 3, "[total, 3, nheads, head_dim]")
    return flash_attn_varlen_func(
        *qkv.unbind(1),
        cu_seqlens,
        cu_seqlens,
        max_seqlen,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
):
    """`flash_attn_varlen_func` on kv [total_k, 2, nheads_k, head_dim], read in place."""
    _check_packed("kv", kv, 4, 2, "[total_k, 2, nheads_k, head_dim]")
    return flash_attn_varlen_func(
        q,
        *kv.unbind(1),
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_attn_probs,
    )


def _autocast(*tensors):
    """Inside torch.autocast, floating-point tensors take its dtype, as torch's own ops do."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return tensors  # AttentionProblem says which is not
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(t.to(dtype) if t.is_floating_point() else t for t in tensors)


def _refuse_options(dropout_p, causal, window_size, softcap, alibi_slopes, block_table=None):
    """Raise for an option that is set and that this version does not compute."""
    if dropout_p != 0.0:
        if not 0.0 <= dropout_p < 1.0:
            raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
        raise NotImplementedError(
            f"dropout_p={dropout_p} is not implemented yet; apply dropout to the output instead"
        )
    if not _is_whole_window(window_size, causal):
        raise NotImplementedError(
            f"window_size={window_size} is not implemented yet; pass (-1, -1) and, for a window, "
            "use torch's flex_attention"
        )
    if softcap:
        if softcap < 0.0:
            raise ValueError(f"softcap must be at least 0, got {softcap}")
        raise NotImplementedError(
            f"softcap={softcap} is not implemented yet; use torch's flex_attention"
        )
    if alibi_slopes is not None:
        raise NotImplementedError(
            "alibi_slopes is not implemented yet; pass None and use torch's flex_attention"
        )
    if block_table is not None:
        raise NotImplementedError(
            "block_table is not implemented yet; gather the pages of K and V into one tensor each"
        )


def _is_whole_window(window_size, causal) -> bool:
    """Whether (left, right) excludes no key: both unbounded; causal bounds the right by itself."""
    if window_size is None:
        return True
    if isinstance(window_size, torch.Tensor):
        window_size = window_size.tolist()
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size}")
    left, right = (-1 if side is None else side for side in window_size)
    return left < 0 and (right < 0 or causal)


def _check_packed(name, tensor, rank, parts, layout):
    """The packed dimension must be there before it is unbound."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != rank or tensor.shape[rank - 3] != parts:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(tensor.shape)}")


def _check_max_seqlen(name, value):
    """An integer or a one-element tensor, whose value is left unread."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
    elif not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")

"""FlashAttention-2's functions: names, order and defaults of flash_attn 2.7, then our own options
by keyword."""

import numbers

import torch

from . import remembered
from .autograd import attention, probabilities
from .options import FLOAT8, Options
from .problem import AttentionProblem

NO_TENSORS = (None,) * (len(AttentionProblem.tensors(AttentionProblem._fields)) - 3)


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
    *,
    s_aux=None,
    learnable_sink=None,
    attn_bias=None,
    causal_alignment="bottom-right",
    num_splits=0,
    batch_invariant=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
):
    """Exact attention, softmax(scores) V, without ever storing the scores.

    score = softcap * tanh(softmax_scale * q_i·k_j / softcap) - slope * |i + shift - j| + bias, each
    term where its option is given; shift = seqlen_k - seqlen_q (see causal_alignment).
    Dao et al. 2022 (arXiv:2205.14135) and Dao 2023 (arXiv:2307.08691). Query head i uses KV head
    i // (nheads // nheads_k), so that multi-query and grouped-query attention need no copies of
    K or V. The tensors may have any strides and any alignment.

    Arguments:
        q: [batch, seqlen_q, nheads, head_dim], float16, bfloat16 or float32 (IEEE arithmetic, no
            TF32), or, for inference, float8_e4m3fn. head_dim is 1 to 512. Inside torch.autocast, q,
            k and v are cast to its dtype, unless they are float8. On Hopper float8's weights are
            rounded to e4m3, 2^8 times as great as the row's greatest at the time; elsewhere, and
            past head_dim 128, q, k and v are cast to bfloat16.
        k: [batch, seqlen_k, nheads_k, head_dim], with nheads a multiple of nheads_k.
        v: [batch, seqlen_k, nheads_k, head_dim_v]; head_dim_v, 1 to 512, may differ from head_dim.
        dropout_p: chance, in [0, 1), that a probability is set to 0, the others being divided by
            1 - dropout_p. Counter-based (Philox) on batch, head, query and key; the seed is drawn
            from torch's default generator of q's device. Use 0.0 for evaluation.
        softmax_scale: factor on the products, any finite number; None means head_dim ** -0.5.
        causal: query i sees keys j <= i + shift.
        window_size: (left, right): query i sees keys i + shift - left to i + shift + right,
            inclusive; -1 or None: no bound. Two integers in a tuple, a list or a CPU tensor. With
            causal, right is 0. Tiles outside the window are never loaded.
        softcap: bound on the scaled products (Gemma 2, Grok), natural-log units; 0.0: none.
        alibi_slopes: (nheads,) or (batch, nheads) float32 (Press et al. 2022); may require grad.
        deterministic: every gradient is bitwise repeatable, as it is if
            torch.use_deterministic_algorithms(True). Without it dQ may be summed in any order, on
            Hopper, where the backward is 0.98 to 1.15 times as fast so, with a head_dim above 128
            1.4 to 2.2 times; elsewhere it makes no difference.
        return_attn_probs: return (out, lse, S_dmask) instead of out.
        s_aux, learnable_sink: (nheads,), any float dtype, one argument under two names: a score
            without a value in every row's softmax (gpt-oss's sinks); may require grad.
        attn_bias: broadcastable to [batch, nheads, seqlen_q, seqlen_k]: any float dtype, added to
            the scores (natural-log units), or boolean, where False hides the key; may require grad,
            which is summed over what was broadcast. Nothing is expanded in memory.
        causal_alignment: where the diagonal ends: "bottom-right", or "top-left", where shift = 0.
        num_splits: into how many parts the keys are divided where queries are few; 0: chosen from
            the shapes, so that the GPU is full. Forward alone.
        batch_invariant: no bit of a sequence's result depends on the others of the batch; so too
            with num_splits=1.
        q_descale, k_descale, v_descale: (batch, nheads_k) float32, or None, 1: what float8's q, of
            the heads of a group, k and v are to be multiplied by (as FlashAttention-3 takes them);
            positive.

    Returns:
        out: [batch, seqlen_q, nheads, head_dim_v] in q's dtype, of float8 in bfloat16. A query that
            sees no key gives 0.
        lse: only if return_attn_probs: [batch, nheads, seqlen_q] float32, the natural logarithm of
            the sum of exp(score) over the row's keys, and its sink; +inf for a row without either.
            Differentiable like out.
        S_dmask: only if return_attn_probs: None without dropout; with it, [batch, nheads, seqlen_q,
            seqlen_k], the softmax probabilities, negative where dropped. For tests: it is as large
            as the scores, and has no gradient.

    Raises:
        TypeError: a dtype or type that does not fit, naming the argument.
        ValueError: a shape, device or value that does not fit, naming the argument.
        NotImplementedError: a gradient through float8, or dropout with it, and the way round.
        RuntimeError: on a second derivative; backward is once differentiable.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux,
        learnable_sink, attn_bias, causal_alignment, (q_descale, k_descale, v_descale), num_splits,
        batch_invariant, deterministic,
    )  # fmt: skip
    return _dense(q, k, v, options, return_attn_probs)


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
    *,
    s_aux=None,
    learnable_sink=None,
    attn_bias=None,
    causal_alignment="bottom-right",
):
    """`flash_attn_func` on qkv [batch, seqlen, 3, nheads, head_dim], read in place; backward writes
    into one gradient of that shape."""
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux,
        learnable_sink, attn_bias, causal_alignment, deterministic=deterministic,
    )  # fmt: skip
    qkv = _packed("qkv", qkv, 5, 3, "[batch, seqlen, 3, nheads, head_dim]")
    return _dense(*qkv.unbind(2), options, return_attn_probs, packed=(qkv,))


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
    *,
    s_aux=None,
    learnable_sink=None,
    attn_bias=None,
    causal_alignment="bottom-right",
):
    """`flash_attn_func` on kv [batch, seqlen_k, 2, nheads_k, head_dim], read in place; backward
    writes into one gradient of that shape."""
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux,
        learnable_sink, attn_bias, causal_alignment, deterministic=deterministic,
    )  # fmt: skip
    kv = _packed("kv", kv, 5, 2, "[batch, seqlen_k, 2, nheads_k, head_dim]")
    (q,) = _autocast(q)
    return _dense(q, *kv.unbind(2), options, return_attn_probs, packed=(q, kv))


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
    *,
    s_aux=None,
    learnable_sink=None,
    attn_bias=None,
    causal_alignment="bottom-right",
    seqused_q=None,
    seqused_k=None,
    leftpad_k=None,
    num_splits=0,
    batch_invariant=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
):
    """`flash_attn_func` for sequences of different lengths, packed without padding.

    Arguments:
        q: [total_q, nheads, head_dim]; sequence b is rows cu_seqlens_q[b] to cu_seqlens_q[b + 1].
        k: [total_k, nheads_k, head_dim]
        v: [total_k, nheads_k, head_dim_v]
        cu_seqlens_q: (batch + 1,) int32 on q's device, not decreasing, beginning with 0. int64 and
            CPU tensors are converted. Their values are read on the device, without synchronising.
        cu_seqlens_k: (batch + 1,) likewise, for k and v. Either side of a sequence may be empty.
        max_seqlen_q, max_seqlen_k: int, which only helps to choose a kernel, or a tensor of one
            element, which is not read: the tiles are found from cu_seqlens. With dropout and
            return_attn_probs they are the size of S_dmask [batch, nheads, max_seqlen_q,
            max_seqlen_k], and attn_bias is broadcastable to that shape; a score that it has no
            element for is left alone.
        seqused_q, seqused_k: (batch,) int32: how many of a sequence's rows count, from the first;
            the others give 0 in out and gradients, +inf in lse. None: all.
        leftpad_k: (batch,) int32: how many of k's and v's first rows of a sequence are skipped.
        block_table: [batch, pages per sequence] int32: k and v are [num_pages, page_size, nheads_k,
            head_dim], any page_size from 1, and sequence b's keys lie in pages block_table[b][0],
            [1], ... Their number is that of seqused_k or of cu_seqlens_k, of which one may be None
            (the smaller, with both). Entries that are not in use may be anything. No gradient.
        The other arguments, and the errors, are those of `flash_attn_func`; the diagonal is
        aligned in every sequence by the rows that count.

    Returns:
        out: [total_q, nheads, head_dim_v]; rows past cu_seqlens_q[-1] are 0.
        lse: only if return_attn_probs, in (out, lse, S_dmask): [nheads, total_q] float32.
    """
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux,
        learnable_sink, attn_bias, causal_alignment, (q_descale, k_descale, v_descale), num_splits,
        batch_invariant, deterministic,
    )  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    parts = (seqused_q, seqused_k, leftpad_k)
    return _varlen(q, k, v, lengths, options, return_attn_probs, parts, None, block_table)


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
    *,
    s_aux=None,
    learnable_sink=None,
    attn_bias=None,
    causal_alignment="bottom-right",
):
    """`flash_attn_varlen_func` on qkv [total, 3, nheads, head_dim], read in place; backward writes
    into one gradient of that shape."""
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux,
        learnable_sink, attn_bias, causal_alignment, deterministic=deterministic,
    )  # fmt: skip
    qkv = _packed("qkv", qkv, 4, 3, "[total, 3, nheads, head_dim]")
    lengths = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    return _varlen(*qkv.unbind(1), lengths, options, return_attn_probs, packed=(qkv,))


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
    *,
    s_aux=None,
    learnable_sink=None,
    attn_bias=None,
    causal_alignment="bottom-right",
):
    """`flash_attn_varlen_func` on kv [total_k, 2, nheads_k, head_dim], read in place; backward
    writes into one gradient of that shape."""
    options = Options(
        dropout_p, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux,
        learnable_sink, attn_bias, causal_alignment, deterministic=deterministic,
    )  # fmt: skip
    kv = _packed("kv", kv, 4, 2, "[total_k, 2, nheads_k, head_dim]")
    (q,) = _autocast(q)
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _varlen(q, *kv.unbind(1), lengths, options, return_attn_probs, packed=(q, kv))


def _dense(q, k, v, options, return_attn_probs, packed=None):
    """The dense functions, once their arguments are sorted."""
    key = None
    if packed is None and not return_attn_probs:
        key = _dense_signature(q, k, v, options)
        known = remembered.find(key)
        if known is not None:
            scalars, memo = known
            return attention(AttentionProblem(q, k, v, *NO_TENSORS, *scalars), None, memo)[0]
    given = (q, k, v)
    q, k, v = _autocast(q, k, v)
    problem = AttentionProblem.dense(q, k, v, options)
    memo = None
    if all(a is b for a, b in zip(given, problem)):
        memo = remembered.keep(key, problem[len(problem.tensors()) :])
    out, lse = attention(problem, packed, memo)
    if not return_attn_probs:
        return out
    return out, lse, _dropped_probabilities(problem, lse, q.shape[1], k.shape[1])


def _dense_signature(q, k, v, options):
    """See remembered.signature; None where the options have tensors, or dropout draws a seed."""
    o = options
    if o.dropout_p or not (o.alibi_slopes is o.s_aux is o.learnable_sink is o.attn_bias is None):
        return None
    if not (o.descales[0] is o.descales[1] is o.descales[2] is None):
        return None
    window = o.window_size if type(o.window_size) is tuple else (o.window_size,)
    return remembered.signature(
        (q, k, v), "dense", torch.is_autocast_enabled("cuda"), o.softmax_scale, o.causal, o.softcap,
        o.causal_alignment, o.num_splits, o.batch_invariant, o.deterministic, *o.descales, *window,
    )  # fmt: skip


def _varlen(
    q, k, v, lengths, options, return_attn_probs, parts=(None,) * 3, packed=None, block_table=None
):
    """The varlen functions, once their arguments are sorted."""
    _check_max_seqlen("max_seqlen_q", lengths[2])
    _check_max_seqlen("max_seqlen_k", lengths[3])
    q, k, v = _autocast(q, k, v)
    problem = AttentionProblem.varlen(q, k, v, *lengths, options, *parts, block_table=block_table)
    out, lse = attention(problem, packed)
    if not return_attn_probs:
        return out
    return out, lse, _dropped_probabilities(problem, lse, *lengths[2:])


def _dropped_probabilities(problem, lse, max_seqlen_q, max_seqlen_k):
    """S_dmask, which is only there with dropout, as in flash_attn."""
    if not problem.dropout_p:
        return None
    return probabilities(problem, lse, int(max_seqlen_q), int(max_seqlen_k))


def _autocast(*tensors):
    """Inside torch.autocast, floating-point tensors take its dtype, as torch's own ops do."""
    if not all(isinstance(tensor, torch.Tensor) for tensor in tensors):
        return tensors  # AttentionProblem says which is not
    device_type = tensors[0].device.type
    if device_type == "meta" or not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    cast = (t.is_floating_point() and t.dtype != FLOAT8 for t in tensors)  # whose scales are apart
    return tuple(t.to(dtype) if casts else t for t, casts in zip(tensors, cast))


def _packed(name, tensor, rank, parts, layout):
    """A packed tensor, checked before it is unbound, in autocast's dtype."""
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != rank or tensor.shape[rank - 3] != parts:
        raise ValueError(f"{name} must have shape {layout}, got {tuple(tensor.shape)}")
    return _autocast(tensor)[0]


def _check_max_seqlen(name, value):
    """An integer or a one-element tensor."""
    if isinstance(value, torch.Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} must be one number, got shape {tuple(value.shape)}")
    elif not isinstance(value, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"{name} must be an integer, got {type(value).__name__}")

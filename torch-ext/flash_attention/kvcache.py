"""flash_attn_with_kvcache: attention to a cache, and new keys and values into it."""

import numbers

import torch

from . import ops, remembered
from .options import Options
from .problem import AttentionProblem


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
    *,
    s_aux=None,
    learnable_sink=None,
    page_table=None,
    cu_seqlens_q=None,
    max_seqlen_q=None,
    causal_alignment="bottom-right",
    batch_invariant=False,
    dropout_p=0.0,
    deterministic=False,
    q_descale=None,
    k_descale=None,
    v_descale=None,
):
    """Attention of new queries to the keys in a cache, as in decoding; without gradient.

    If k and v are given, they are first written into the cache, in place, after the rows that
    cache_seqlens counts; the queries then see them too. The new rows of a sequence are normally as
    many as its queries, and `causal` aligns the last query with the last key. The keys of a
    sequence may be divided among the GPU's cores (Flash-Decoding), and the query heads of a group
    read K and V together.

    Arguments:
        q: [batch, seqlen_q, nheads, head_dim], or [total_q, nheads, head_dim] with cu_seqlens_q;
            float16, bfloat16 or float32. head_dim is 1 to 576 (latent attention).
        k_cache: [batch_cache, seqlen_cache, nheads_k, head_dim]; with block_table [num_pages,
            page_size, nheads_k, head_dim], any page_size from 1. Columns next to each other, any
            other strides; v_cache may be a part of it.
        v_cache: likewise, with head_dim_v, 1 to 512.
        k, v: [batch, seqlen_new, nheads_k, head_dim or head_dim_v], or [total_q, ...] with
            cu_seqlens_q: both or none.
        rotary_cos, rotary_sin: [seqlen_rotary, rotary_dim / 2], rotary_dim <= head_dim; needs k.
            k's row i is turned by the angles of position cache_seqlens + i; q's likewise if causal
            or with a window, else all of q by those of cache_seqlens. seqlen_rotary must reach as
            far as the cache.
        cache_seqlens: int or (batch,) int32: the rows of each sequence that the cache holds, before
            k. None: all of them. Needed with k.
        cache_batch_idx: (batch,) int32: sequence b is entry cache_batch_idx[b] of the cache, not b.
            Which row is kept if two sequences append to one entry is not defined.
        cache_leftpad: (batch,) int32: the first rows of a sequence's cache to skip; they count in
            cache_seqlens and in the positions of the rotary embedding.
        block_table, page_table: [batch, pages per sequence] int32, one argument under two names:
            the pages of each sequence, in order. Entries that are not in use may be anything.
        softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, learnable_sink,
        causal_alignment: as in `flash_attn_func`; positions count from the first row not skipped.
        rotary_interleaved: the pairs are columns (2i, 2i + 1); else (i, i + rotary_dim / 2).
        num_splits: into how many parts a sequence's keys are divided; 0: chosen from the shapes, so
            that the GPU is full. With 1, no bit of a sequence's result depends on the others.
        return_softmax_lse: return (out, lse).
        cu_seqlens_q, max_seqlen_q: as in `flash_attn_varlen_func`: q (and k, v) packed, sequences
            of any lengths together. max_seqlen_q only helps to choose a kernel.
        batch_invariant: no bit of a sequence's result depends on the others, with splits of a fixed
            number of keys.
        dropout_p: must be 0.0. deterministic: accepted; results are always repeatable.
        q_descale, k_descale, v_descale: must be None (of a cache float8 is not implemented).

    Returns:
        out: like q, with head_dim_v columns. A query that sees no key gives 0.
        lse: only if return_softmax_lse: [batch, nheads, seqlen_q] float32 (packed [nheads,
            total_q]), natural logarithm; +inf for a row that sees no key.

    Raises:
        TypeError, ValueError: what does not fit, naming the argument.
        RuntimeError: the cache, or block_table, has no room for k and v, naming it. To see that,
            the host waits for a cache_seqlens that is on a GPU; while a CUDA graph is captured it
            does not look. What has no room is never written.
        NotImplementedError: a gradient is wanted, dropout, float8; and the way round.
    """
    if block_table is not None and page_table is not None:
        raise ValueError("block_table and page_table are one argument: give one of them")
    table = page_table if block_table is None else block_table
    tensors = (
        q, k_cache, v_cache, cu_seqlens_q, cache_seqlens, cache_leftpad, table, cache_batch_idx,
        alibi_slopes, s_aux, k, v, rotary_cos, rotary_sin,
    )  # fmt: skip
    window = window_size if type(window_size) is tuple else (window_size,)
    key = remembered.signature(
        tensors, softmax_scale, causal, softcap, num_splits, causal_alignment, batch_invariant,
        max_seqlen_q, rotary_interleaved, dropout_p, learnable_sink, q_descale, k_descale,
        v_descale, *window,
    )  # fmt: skip
    known = remembered.find(key)
    if known is not None:
        scalars, memo = known
        problem, cos, sin = _problem(tensors, scalars), rotary_cos, rotary_sin
    else:
        _check_refused(dropout_p, q_descale=q_descale, k_descale=k_descale, v_descale=v_descale)
        options = Options(
            0.0, softmax_scale, causal, window_size, softcap, alibi_slopes, s_aux, learnable_sink,
            None, causal_alignment, num_splits=num_splits, batch_invariant=batch_invariant,
        )  # fmt: skip
        problem = AttentionProblem.kvcache(
            q, k_cache, v_cache, options, cache_seqlens, cache_batch_idx, cache_leftpad, table,
            cu_seqlens_q, max_seqlen_q, "page_table" if block_table is None else "block_table",
        )  # fmt: skip
        cos, sin = _rotary(problem, rotary_cos, rotary_sin, k)
        if k is not None or v is not None:
            _check_new(problem, k, v, cache_seqlens)
        memo = _remember(key, tensors, problem, cos, sin)
    if k is not None:
        problem = _append(problem, k, v, cos, sin, rotary_interleaved)
    out, lse = ops.fwd_eager(problem, memo)
    return (out, lse) if return_softmax_lse else out


def _problem(tensors, scalars):
    """The problem, before k and v are appended, of tensors that need no conversion."""
    q, k_cache, v_cache, cu_seqlens_q, seqlens, leftpad, table, batch_idx, slopes, sink = tensors[
        :10
    ]
    return AttentionProblem(
        q, k_cache, v_cache, cu_seqlens_q, None, None, seqlens, leftpad, table, batch_idx, None,
        slopes, sink, None, None, *scalars,
    )  # fmt: skip


def _remember(key, tensors, problem, cos, sin):
    """Let calls of this signature skip the checks, if no tensor had to be converted. -> the memo of
    such calls for the launcher, or None"""
    if key is None:
        return None
    scalars = problem[len(problem.tensors()) :]
    alike = (*_problem(tensors, scalars).tensors(), *tensors[-2:])
    if not all(a is b for a, b in zip(alike, (*problem.tensors(), cos, sin))):
        return None
    return remembered.keep(key, scalars)


def _check_refused(dropout_p, **descales):
    for name, value in descales.items():
        if value is not None:
            raise NotImplementedError(
                f"{name} is for float8, which is not implemented for a cache; keep it in bfloat16, "
                "or pass keys and values themselves to flash_attn_varlen_func"
            )
    if dropout_p:
        raise NotImplementedError(
            f"dropout_p must be 0.0 with a KV cache, got {dropout_p}; to train, pass the keys and "
            "values themselves to flash_attn_varlen_func"
        )


def _append(problem, k, v, cos, sin, interleaved):
    """Write k and v into the cache -> the problem with q turned, and the lengths afterwards."""
    with torch.no_grad():
        seqused, q = ops.append_eager(
            problem.q, k, v, problem.k, problem.v, cos, sin, problem.cu_seqlens_q,
            problem.seqused_k, problem.block_table, problem.cache_batch_idx, bool(interleaved),
            problem.is_masked(),
        )  # fmt: skip
    return problem._replace(q=problem.q if cos is None else q, seqused_k=seqused)


def _check_new(problem, k, v, cache_seqlens):
    """k and v as they may be appended."""
    if k is None or v is None:
        raise ValueError("k and v must be given both, or none of them")
    if cache_seqlens is None:
        raise ValueError("cache_seqlens must be given with k: it says where k goes")
    q = problem.q
    rows = tuple(q.shape[:-2]) if problem.cu_seqlens_q is not None else (q.shape[0], None)
    for name, tensor, cache in (("k", k, problem.k), ("v", v, problem.v)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise TypeError(
                f"{name} must be {q.dtype} on {q.device}, as q is, got {tensor.dtype} on "
                f"{tensor.device}"
            )
        expected = (*rows, *cache.shape[-2:])
        if tensor.dim() != len(expected) or any(
            want is not None and have != want for have, want in zip(tensor.shape, expected)
        ):
            shown = ", ".join("seqlen_new" if n is None else str(n) for n in expected)
            raise ValueError(f"{name} must have shape ({shown}), got {tuple(tensor.shape)}")
    if k.shape[:-1] != v.shape[:-1]:
        raise ValueError(f"v must have as many rows as k, {k.shape[1]}, got {v.shape[1]}")
    if isinstance(cache_seqlens, numbers.Integral) and problem.cu_seqlens_q is None:
        if cache_seqlens + k.shape[1] > problem.rows_k():
            where = "the cache" if problem.block_table is None else "block_table"
            raise RuntimeError(
                f"{where} has room for {problem.rows_k()} rows of a sequence, but cache_seqlens is "
                f"{cache_seqlens} and k has {k.shape[1]} more: give it more rows, or pages"
            )


def _rotary(problem, cos, sin, k):
    """rotary_cos and rotary_sin as the op takes them: contiguous, or None both."""
    if cos is None and sin is None:
        return None, None
    if cos is None or sin is None:
        raise ValueError("rotary_cos and rotary_sin must be given both, or none of them")
    if k is None:
        raise ValueError("rotary_cos needs k and v: what is in the cache is turned already")
    device, head_dim = problem.q.device, problem.q.shape[-1]
    if cos.dim() != 2 or cos.shape != sin.shape or cos.device != device or sin.device != device:
        raise ValueError(
            f"rotary_cos and rotary_sin must both be [seqlen, rotary_dim / 2] on {device}, got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)} on {cos.device} and {sin.device}"
        )
    if 2 * cos.shape[1] > head_dim:
        raise ValueError(
            f"rotary_cos must have at most head_dim / 2 = {head_dim // 2} columns, got "
            f"{cos.shape[1]}"
        )
    if cos.shape[0] < problem.rows_k():
        raise ValueError(
            f"rotary_cos must reach as far as the cache, {problem.rows_k()} rows, got "
            f"{cos.shape[0]}"
        )
    return tuple(t.detach().contiguous() if t.requires_grad else t.contiguous() for t in (cos, sin))

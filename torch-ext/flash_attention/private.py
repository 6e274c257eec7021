"""flash_attn's private functions, as packages built on it import them (ring-flash-attn, for one):
signatures and results of flash_attn 2.7. They record no gradient."""

import torch

from . import ops
from .options import Options
from .problem import AttentionProblem


def _flash_attn_forward(
    q,
    k,
    v,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    return_softmax,
):
    """Dense forward -> (out, softmax_lse, S_dmask, rng_state). Arguments as `flash_attn_func`.

    S_dmask is None without return_softmax, rng_state (1,) int64 is None without dropout.
    """
    window = (window_size_left, window_size_right)
    options = Options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    problem = AttentionProblem.dense(q, k, v, options)
    return _forward(problem, (q.shape[1], k.shape[1]) if return_softmax else None)


def _flash_attn_varlen_forward(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,
):
    """Varlen forward -> (out, softmax_lse, S_dmask, rng_state). zero_tensors changes nothing: rows
    of no sequence are 0 in any case."""
    if block_table is not None:
        raise NotImplementedError(
            "block_table is not implemented yet; gather the pages of K and V into one tensor each"
        )
    window = (window_size_left, window_size_right)
    options = Options(dropout_p, softmax_scale, causal, window, softcap, alibi_slopes)
    longest = (max_seqlen_q, max_seqlen_k)
    problem = AttentionProblem.varlen(
        q, k, v, cu_seqlens_q, cu_seqlens_k, *longest, options, None, seqused_k, leftpad_k
    )
    return _forward(problem, tuple(map(int, longest)) if return_softmax else None)


def _flash_attn_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
):
    """Fill dq, dk and dv (each may be None) of a dense forward -> softmax_d, rowsum(dO * O), like
    softmax_lse. rng_state is what forward returned."""
    _check_rng_state(dropout_p, rng_state)
    window = (window_size_left, window_size_right)
    options = Options(
        dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic=deterministic
    )  # fmt: skip
    problem = AttentionProblem.dense(q, k, v, options, rng_state)
    return _backward(problem, dout, out, softmax_lse, (dq, dk, dv))


def _flash_attn_varlen_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    deterministic,
    rng_state=None,
    zero_tensors=False,
):
    """`_flash_attn_backward` of a varlen forward."""
    _check_rng_state(dropout_p, rng_state)
    window = (window_size_left, window_size_right)
    options = Options(
        dropout_p, softmax_scale, causal, window, softcap, alibi_slopes, deterministic=deterministic
    )  # fmt: skip
    lengths = (cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    problem = AttentionProblem.varlen(q, k, v, *lengths, options, rng_state=rng_state)
    return _backward(problem, dout, out, softmax_lse, (dq, dk, dv))


@torch.no_grad()
def _forward(problem, probs_shape):
    out, lse = ops.fwd_eager(problem)
    probs = None if probs_shape is None else ops.probs(lse, *probs_shape, *problem)
    return out, lse, probs, problem.rng_state


@torch.no_grad()
def _backward(problem, dout, out, lse, targets):
    grads = ops.bwd(dout, None, out, lse, 1, (False, False, False), *problem)
    for target, grad in zip(targets, grads):
        if target is not None:
            target.copy_(grad)
    return (dout.float() * out.float()).sum(-1).transpose(-1, -2).contiguous()


def _check_rng_state(dropout_p, rng_state):
    """A mask drawn anew would not be the one that forward used."""
    if dropout_p and rng_state is None:
        raise ValueError(f"rng_state must be what forward returned when dropout_p={dropout_p}")

"""Attention over parts of the keys, merged: split-KV's last step, and context parallelism's."""

import torch

from . import ops

DTYPES = (torch.float16, torch.bfloat16, torch.float32)


class Combine(torch.autograd.Function):
    """(out_partial, lse_partial, dtype) -> (out, lse [..., seqlen, nheads])"""

    @staticmethod
    def forward(ctx, out_partial, lse_partial, dtype):
        out, lse = ops.combine(out_partial, lse_partial, dtype)
        ctx.save_for_backward(out_partial, lse_partial, out, lse)
        return out, lse

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dout, dlse):
        """out = sum_s w_s out_s, w_s = exp(lse_s - lse), so that d out_s = w_s dout and
        d lse_s = w_s (dlse + <dout, out_s - out>)."""
        out_partial, lse_partial, out, lse = ctx.saved_tensors
        lses = lse_partial.float()
        weights = (lses - lse.masked_fill(lse == float("-inf"), 0.0)).exp()
        weights = weights.masked_fill(lses == float("inf"), 0.0)
        dout, parts = dout.float(), out_partial.float()
        parts = parts.masked_fill((weights == 0.0).unsqueeze(-1), 0.0)
        d_lse = weights * (dlse + ((parts - out.float()) * dout).sum(-1))
        d_out = weights.unsqueeze(-1) * dout
        return d_out.to(out_partial.dtype), d_lse.to(lse_partial.dtype), None


def flash_attn_combine(out_partial, lse_partial, out=None, out_dtype=None):
    """Merge attention over parts of the keys into attention over all of them.

    out = sum_s exp(lse_s - lse) out_s with lse = log sum_s exp(lse_s) (Flash-Decoding).

    Arguments:
        out_partial: [num_splits, batch, seqlen, nheads, head_dim], or [num_splits, total, nheads,
            head_dim]; float32, float16 or bfloat16; head_dim is 1 to 512. Differentiable.
        lse_partial: [num_splits, batch, seqlen, nheads] or [num_splits, total, nheads], natural
            logarithm; +inf and -inf both mean that the part has no key for the row, whose out is
            then not read. Differentiable.
        out: where to write the result; None: a new tensor.
        out_dtype: of the new tensor; None: out_partial's.

    Returns:
        out: without the first dimension.
        lse: likewise, float32; +inf for a row without keys.
    """
    _check(out_partial, lse_partial)
    if out is not None:
        shape = tuple(out_partial.shape[1:])
        if tuple(out.shape) != shape or (out_dtype is not None and out.dtype != out_dtype):
            raise ValueError(
                f"out must have shape {shape} and, if given, out_dtype, got {tuple(out.shape)} "
                f"{out.dtype}"
            )
        out_dtype = out.dtype
    dtype = out_partial.dtype if out_dtype is None else out_dtype
    if dtype not in DTYPES:
        raise TypeError(f"out_dtype must be float16, bfloat16 or float32, got {dtype}")
    result, lse = Combine.apply(out_partial, lse_partial, dtype)
    lse = lse.masked_fill(lse == float("-inf"), float("inf"))
    if out is None:
        return result, lse
    return out.copy_(result), lse


def merge_attention_states(out_a, lse_a, out_b, lse_b):
    """Attention over the keys of a and of b, from that over each: a ring's or a prefix's step.

    Arguments:
        out_a, out_b: [batch, seqlen, nheads, head_dim], or [total, nheads, head_dim].
            Differentiable.
        lse_a, lse_b: [batch, nheads, seqlen] or [nheads, total], as the attention functions return
            them, +inf (or -inf) for a row without keys. Differentiable.

    Returns:
        out: like out_a; lse: like lse_a, float32.
    """
    for name, tensor, like in (("out_b", out_b, out_a), ("lse_b", lse_b, lse_a)):
        if tensor.shape != like.shape:
            raise ValueError(
                f"{name} must have the other's shape {tuple(like.shape)}, got {tuple(tensor.shape)}"
            )
    outs = torch.stack([out_a, out_b])
    lses = torch.stack([lse_a, lse_b]).transpose(-1, -2)
    out, lse = flash_attn_combine(outs, lses)
    return out, lse.transpose(-1, -2).contiguous()


def _check(out_partial, lse_partial):
    for name, tensor in (("out_partial", out_partial), ("lse_partial", lse_partial)):
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dtype not in DTYPES:
            raise TypeError(f"{name} must be float16, bfloat16 or float32, got {tensor.dtype}")
    if out_partial.dim() not in (4, 5) or out_partial.shape[0] < 1:
        raise ValueError(
            "out_partial must be [num_splits, batch, seqlen, nheads, head_dim] or [num_splits, "
            f"total, nheads, head_dim], got {tuple(out_partial.shape)}"
        )
    if lse_partial.shape != out_partial.shape[:-1] or lse_partial.device != out_partial.device:
        raise ValueError(
            f"lse_partial must have shape {tuple(out_partial.shape[:-1])} on "
            f"{out_partial.device}, got {tuple(lse_partial.shape)} on {lse_partial.device}"
        )
    if not 1 <= out_partial.shape[-1] <= 512:
        raise ValueError(f"out_partial's head_dim must be 1 to 512, got {out_partial.shape[-1]}")

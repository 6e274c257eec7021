"""apply_rotary_emb, as flash_attn.layers.rotary has it."""

import numbers

import torch

from . import ops


class ApplyRotary(torch.autograd.Function):
    """(x, cos, sin, cu_seqlens, offsets, offset, interleaved, inplace) -> x turned."""

    @staticmethod
    def forward(ctx, x, cos, sin, cu_seqlens, offsets, offset, interleaved, inplace):
        ctx.save_for_backward(cos, sin, cu_seqlens, offsets)
        ctx.scalars = (offset, interleaved, inplace)
        tables = (cos, sin, cu_seqlens, offsets, offset, interleaved, False)
        if not inplace:
            return ops.rotary(x, *tables)
        ops.rotary_(x, *tables)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, grad):
        """The inverse turn; not in place, as the gradient may be somebody else's too."""
        cos, sin, cu_seqlens, offsets = ctx.saved_tensors
        offset, interleaved, _ = ctx.scalars
        if torch.is_grad_enabled():  # create_graph=True: linear in grad, so the same again
            grad = ApplyRotary.apply(grad, cos, -sin, cu_seqlens, offsets, *ctx.scalars[:2], False)
        else:
            grad = ops.rotary(grad, cos, sin, cu_seqlens, offsets, offset, interleaved, True)
        return (grad, *(None,) * 7)


def apply_rotary_emb(
    x,
    cos,
    sin,
    interleaved=False,
    inplace=False,
    seqlen_offsets=0,
    cu_seqlens=None,
    max_seqlen=None,
):
    """Turn pairs of x's columns by the angles of their positions (Su et al. 2021, RoFormer).

    Arguments:
        x: [batch, seqlen, nheads, head_dim], or [total, nheads, head_dim] with cu_seqlens; any
            strides; float16, bfloat16 or float32. Differentiable.
        cos, sin: [seqlen_rotary, rotary_dim / 2], any float dtype, computed in float32; without
            gradient. rotary_dim <= head_dim; the columns from rotary_dim on stay as they are, and
            so do rows whose position is past the tables.
        interleaved: the pairs are columns (2i, 2i + 1) (GPT-J); else (i, i + rotary_dim / 2)
            (GPT-NeoX, Llama).
        inplace: write into x, and return it.
        seqlen_offsets: int or (batch,) int tensor: the position of each sequence's first row.
        cu_seqlens: (batch + 1,) int32: the sequences are packed as in `flash_attn_varlen_func`.
        max_seqlen: accepted; not needed.

    Returns:
        Like x.
    """
    _check(x, cos, sin, cu_seqlens)
    offset, offsets = seqlen_offsets, None
    if isinstance(seqlen_offsets, torch.Tensor):
        batch = x.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1
        if tuple(seqlen_offsets.shape) != (batch,) or seqlen_offsets.is_floating_point():
            raise ValueError(
                f"seqlen_offsets must be an integer or (batch,) = ({batch},) integers, got "
                f"{tuple(seqlen_offsets.shape)} {seqlen_offsets.dtype}"
            )
        offset, offsets = 0, seqlen_offsets.to(x.device, torch.int32).contiguous()
    elif not isinstance(seqlen_offsets, (numbers.Integral, torch.SymInt)):
        raise TypeError(f"seqlen_offsets must be an integer, got {type(seqlen_offsets).__name__}")
    if cu_seqlens is not None:
        cu_seqlens = cu_seqlens.to(x.device, torch.int32).contiguous()
    cos, sin = cos.detach().contiguous(), sin.detach().contiguous()
    return ApplyRotary.apply(x, cos, sin, cu_seqlens, offsets, offset, interleaved, inplace)


def _check(x, cos, sin, cu_seqlens):
    rank, layout = (4, "[batch, seqlen, nheads, head_dim]")
    if cu_seqlens is not None:
        rank, layout = 3, "[total, nheads, head_dim]"
        if cu_seqlens.dim() != 1 or cu_seqlens.dtype not in (torch.int32, torch.int64):
            raise ValueError(
                f"cu_seqlens must be (batch + 1,) int32, got {tuple(cu_seqlens.shape)} "
                f"{cu_seqlens.dtype}"
            )
    if x.dim() != rank or not x.is_floating_point():
        raise ValueError(f"x must be floating-point {layout}, got {tuple(x.shape)} {x.dtype}")
    if cos.dim() != 2 or cos.shape != sin.shape or cos.device != x.device or sin.device != x.device:
        raise ValueError(
            f"cos and sin must both be [seqlen, rotary_dim / 2] on {x.device}, got "
            f"{tuple(cos.shape)} and {tuple(sin.shape)} on {cos.device} and {sin.device}"
        )
    if 2 * cos.shape[1] > x.shape[-1]:
        raise ValueError(
            f"cos must have at most head_dim / 2 = {x.shape[-1] // 2} columns, got {cos.shape[1]}"
        )

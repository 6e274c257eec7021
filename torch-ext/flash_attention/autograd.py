"""The one autograd.Function, for dense and packed problems alike."""

import torch
from torch.autograd.function import once_differentiable

from . import ops
from .problem import AttentionProblem


class Attention(torch.autograd.Function):
    """(*AttentionProblem) -> (out, lse), both differentiable, once."""

    @staticmethod
    def forward(*fields):
        return ops.fwd(*fields)

    @staticmethod
    def setup_context(ctx, inputs, output):
        q, k, v, cu_seqlens_q, cu_seqlens_k, *ctx.scalars = inputs
        ctx.save_for_backward(*output, q, k, v, cu_seqlens_q, cu_seqlens_k)
        ctx.set_materialize_grads(False)  # lse mostly has no gradient: do not fill zeros for it

    @staticmethod
    @once_differentiable
    def backward(ctx, dout, dlse):
        out, lse, *tensors = ctx.saved_tensors
        problem = AttentionProblem(*tensors, *ctx.scalars)
        if dout is None:  # only lse was used
            dout = torch.zeros_like(out)
        grads = ops.bwd(dout, dlse, out, lse, *problem)
        return (*grads, *(None for _ in problem[3:]))


def attention(problem: AttentionProblem):
    """-> (out, lse); recorded, and its tensors saved, only if a gradient is wanted."""
    if problem.needs_grad():
        return Attention.apply(*problem)
    return ops.fwd_eager(problem)

"""The one autograd.Function, for dense and packed problems alike."""

import torch

from . import ops
from .problem import AttentionProblem


class OnceDifferentiable(torch.autograd.Function):
    """(dq, dk, dv, *what they depend on) -> dq, dk, dv, whose own derivative raises.

    torch's `once_differentiable` looks at dout alone: with out.sum() as the loss it would let a
    second derivative drop its terms in q, k and v without a word.
    """

    @staticmethod
    def forward(dq, dk, dv, *sources):
        return dq.view_as(dq), dk.view_as(dk), dv.view_as(dv)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "flash attention is once_differentiable: for a second derivative use torch's "
            "scaled_dot_product_attention with SDPBackend.MATH"
        )


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
    def backward(ctx, dout, dlse):
        out, lse, *tensors = ctx.saved_tensors
        problem = AttentionProblem(*tensors, *ctx.scalars)
        with torch.no_grad():
            if dout is None:  # only lse was used
                dout = torch.zeros_like(out)
            grads = ops.bwd(dout, dlse, out, lse, *problem)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            grads = OnceDifferentiable.apply(*grads, dout, *problem[:3])
        return (*grads, *(None for _ in problem[3:]))


def attention(problem: AttentionProblem):
    """-> (out, lse); recorded, and its tensors saved, only if a gradient is wanted."""
    if problem.needs_grad():
        if torch.compiler.is_compiling():
            problem = _distinct(problem)
        return Attention.apply(*problem)
    return ops.fwd_eager(problem)


def _distinct(problem: AttentionProblem) -> AttentionProblem:
    """Views in place of what may be one tensor twice, which Dynamo's autograd.Function refuses."""
    cu_seqlens_k = problem.cu_seqlens_k
    return problem._replace(
        k=problem.k.view_as(problem.k),
        v=problem.v.view_as(problem.v),
        cu_seqlens_k=None if cu_seqlens_k is None else cu_seqlens_k.view_as(cu_seqlens_k),
    )

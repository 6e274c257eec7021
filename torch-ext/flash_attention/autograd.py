"""The one autograd.Function, for dense and packed problems alike."""

import contextlib

import torch

from . import ops
from .problem import AttentionProblem

NUM_TENSORS = AttentionProblem._fields.index("softmax_scale")  # the fields begin with them
FIRST_MOD = AttentionProblem._fields.index("attn_bias")  # of AttentionProblem.differentiable()
NOT_WANTED = (False,) * 3


class OnceDifferentiable(torch.autograd.Function):
    """(count, *grads, *what they depend on) -> the `count` grads, whose own derivative raises.

    torch's `once_differentiable` looks at dout alone: with out.sum() as the loss it would let a
    second derivative drop its terms in q, k and v without a word.
    """

    @staticmethod
    def forward(count, *tensors):
        return tuple(grad.view_as(grad) for grad in tensors[:count])

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *grads):
        raise RuntimeError(
            "flash attention is once_differentiable: for a second derivative use torch's "
            "scaled_dot_product_attention with SDPBackend.MATH"
        )


def unpack(pack, q, k, v):
    """q, k, v of (q, k, v), of (q, kv, None) if pack is 2, of (qkv, None, None) if it is 3."""
    if pack == 3:
        return q.unbind(-3)
    return (q, *k.unbind(-3)) if pack == 2 else (q, k, v)


def problem_of(pack, scalars, tensors) -> AttentionProblem:
    """The problem of what `Attention` is given."""
    missing = (None,) * (NUM_TENSORS - len(tensors))
    return AttentionProblem(*unpack(pack, *tensors[:3]), *tensors[3:], *missing, *scalars)


class Attention(torch.autograd.Function):
    """(memo, pack, scalars, *tensors) -> (out, lse), both differentiable, once.

    scalars, tensors: AttentionProblem's; of these none but the first three where the others are
    None, as every argument takes host time. The first three are q, k, v, or packed as
    `unpack` says: then so are their gradients, which backward writes where they belong. memo: see
    ops.fwd_eager.
    """

    @staticmethod
    def forward(memo, pack, scalars, *tensors):
        return ops.fwd_eager(problem_of(pack, scalars, tensors), memo)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.memo, ctx.pack, ctx.scalars, *tensors = inputs
        ctx.save_for_backward(*output, *tensors)
        ctx.set_materialize_grads(False)  # lse mostly has no gradient: do not fill zeros for it

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, *tensors = ctx.saved_tensors
        problem = problem_of(ctx.pack, ctx.scalars, tensors)
        wanted = ctx.needs_input_grad[3 + FIRST_MOD : 3 + FIRST_MOD + 3] or NOT_WANTED
        records = torch.is_grad_enabled()  # create_graph=True, or torch.compile
        with torch.no_grad() if records else contextlib.nullcontext():
            if dout is None:  # only lse was used
                dout = torch.zeros_like(out)
            grads = ops.bwd_eager(dout, dlse, out, lse, ctx.pack, wanted, problem, ctx.memo)
        if records and not torch.compiler.is_compiling():
            sources = (dout, *tensors[:3], *problem.differentiable())
            sources = [tensor for tensor in sources if tensor is not None]
            grads = OnceDifferentiable.apply(len(grads), *grads, *sources)
        places = [place for place in range(3) if tensors[place] is not None]
        places += [FIRST_MOD + number for number, flag in enumerate(wanted) if flag]
        of_tensors = [None] * len(tensors)
        for place, grad in zip(places, grads):
            of_tensors[place] = grad
        return (None, None, None, *of_tensors)


# What Function.apply calls in the end, where no functorch transform is active; before that it
# inspects the signature of `forward`, on every call.
past_function_apply = super(torch.autograd.Function, Attention).apply


def attention(problem: AttentionProblem, packed=None, memo=None):
    """-> (out, lse); recorded, and its tensors saved, only if a gradient is wanted.

    packed: (qkv,) or (q, kv), where q, k and v are views of them. memo: see ops.fwd_eager.
    """
    if not problem.needs_grad():
        return ops.fwd_eager(problem, memo)
    if ops.unobserved(*problem[:3]):
        apply = past_function_apply
    else:
        apply, memo = Attention.apply, None
    if torch.compiler.is_compiling() and packed is None:
        problem = _distinct(problem)
    pack = 1 if packed is None else 4 - len(packed)
    tensors = problem[:3] if packed is None else (*packed, *(None,) * (3 - len(packed)))
    if problem.cu_seqlens_q is not None or problem.has_mods():
        tensors += problem[3:NUM_TENSORS]
    return apply(memo, pack, problem[NUM_TENSORS:], *tensors)


def probabilities(problem: AttentionProblem, lse, max_seqlen_q, max_seqlen_k):
    """Softmax probabilities [batch, nheads, max_seqlen_q, max_seqlen_k], negative where dropped;
    without gradient."""
    with torch.no_grad():
        return ops.probs(lse, max_seqlen_q, max_seqlen_k, *problem)


def _distinct(problem: AttentionProblem) -> AttentionProblem:
    """Views in place of what may be one tensor twice, which Dynamo's autograd.Function refuses."""
    names = ("k", "v", "cu_seqlens_k", "seqused_k", "leftpad_k")
    tensors = {name: getattr(problem, name) for name in names}
    return problem._replace(
        **{name: tensor.view_as(tensor) for name, tensor in tensors.items() if tensor is not None}
    )

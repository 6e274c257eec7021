"""The one autograd.Function, for dense and packed problems alike."""

import torch

from . import ops
from .problem import AttentionProblem

NUM_TENSORS = AttentionProblem._fields.index("softmax_scale")  # the fields begin with them
FIRST_MOD = AttentionProblem._fields.index("attn_bias")  # of AttentionProblem.differentiable()


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


class Attention(torch.autograd.Function):
    """(memo, pack, *AttentionProblem) -> (out, lse), both differentiable, once.

    The first three fields are q, k, v, or packed as `unpack` says: then so are their gradients,
    which backward writes where they belong. memo: see ops.fwd_eager.
    """

    @staticmethod
    def forward(memo, pack, *fields):
        problem = AttentionProblem(*unpack(pack, *fields[:3]), *fields[3:])
        return ops.fwd_eager(problem, memo)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.memo, ctx.pack, *fields = inputs
        ctx.scalars = fields[NUM_TENSORS:]
        ctx.save_for_backward(*output, *fields[:NUM_TENSORS])
        ctx.set_materialize_grads(False)  # lse mostly has no gradient: do not fill zeros for it

    @staticmethod
    def backward(ctx, dout, dlse):
        out, lse, *tensors = ctx.saved_tensors
        pack, packed = ctx.pack, tensors[:3]
        problem = AttentionProblem(*unpack(pack, *packed), *tensors[3:], *ctx.scalars)
        wanted = ctx.needs_input_grad[2 + FIRST_MOD : 2 + FIRST_MOD + 3]
        with torch.no_grad():
            if dout is None:  # only lse was used
                dout = torch.zeros_like(out)
            grads = ops.bwd_eager(dout, dlse, out, lse, pack, wanted, problem, ctx.memo)
        if torch.is_grad_enabled() and not torch.compiler.is_compiling():  # create_graph=True
            sources = [t for t in (dout, *packed, *problem.differentiable()) if t is not None]
            grads = OnceDifferentiable.apply(len(grads), *grads, *sources)
        grads = iter(grads)
        of_packed = [None if t is None else next(grads) for t in packed]
        of_mods = [next(grads) if flag else None for flag in wanted]
        of_lengths = [None] * (FIRST_MOD - 3)
        of_others = [None] * (NUM_TENSORS - FIRST_MOD - 3 + len(ctx.scalars))
        return (None, None, *of_packed, *of_lengths, *of_mods, *of_others)


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
    if packed is not None:
        pack = 3 if len(packed) == 1 else 2
        tensors = (*packed, *(None,) * (3 - len(packed)))
        return apply(memo, pack, *tensors, *problem[3:])
    if torch.compiler.is_compiling():
        problem = _distinct(problem)
    return apply(memo, 1, *problem)


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

"""The ops behind the schemas of torch_binding.h: fakes, and each device's implementation."""

import functools

import torch

from . import cpu, cpu_cache
from ._ops import add_op_namespace_prefix, ops
from .problem import AttentionProblem

# The default overloads: a packet would look the overload up on every call.
fwd = ops.fwd.default
bwd = ops.bwd.default
probs = ops.probs.default
append = ops.append.default
combine = ops.combine.default
rotary = ops.rotary.default
rotary_ = ops.rotary_.default


@functools.lru_cache(maxsize=None)
def _launch():
    """The Triton launcher, imported at the first launch: the package loads without Triton."""
    from .flash_attention_kernel import launch

    return launch


def _fwd_cpu(*fields):
    problem = AttentionProblem(*fields)
    if problem.is_float8():
        out, lse = cpu.forward(problem.dequantized(torch.float32))
        return out.to(torch.bfloat16), lse
    return cpu.forward(problem)


def _bwd_cpu(dout, dlse, out, lse, pack, wanted, *fields):
    return cpu.backward(AttentionProblem(*fields), dout, dlse, out, lse, pack, wanted)


def _probs_cpu(lse, max_seqlen_q, max_seqlen_k, *fields):
    return cpu.probabilities(AttentionProblem(*fields), lse, max_seqlen_q, max_seqlen_k)


def _fwd_triton(*fields):
    return _launch().forward(AttentionProblem(*fields))


def _bwd_triton(dout, dlse, out, lse, pack, wanted, *fields):
    return _launch().backward(AttentionProblem(*fields), dout, dlse, out, lse, pack, wanted)


def _probs_triton(lse, max_seqlen_q, max_seqlen_k, *fields):
    return _launch().probabilities(AttentionProblem(*fields), lse, max_seqlen_q, max_seqlen_k)


def _append_triton(*tensors):
    return _launch().append(*tensors)


def _combine_triton(out_partial, lse_partial, dtype):
    return _launch().combine(out_partial, lse_partial, dtype)


def _rotary(turn, x, cos, *options):
    """A new tensor: turned columns, and the others copied."""
    out = torch.empty_like(x)
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim < x.shape[-1]:
        out[..., rotary_dim:].copy_(x[..., rotary_dim:])
    return turn(x, out, cos, *options)


def _rotary_cpu(x, *options):
    return _rotary(cpu_cache.rotary, x, *options)


def _rotary_triton(x, *options):
    return _rotary(_launch().rotary, x, *options)


def _rotary_cpu_(x, *options):
    cpu_cache.rotary(x, x, *options)


def _rotary_triton_(x, *options):
    _launch().rotary(x, x, *options)


def unobserved(q, k, v):
    """Whether a call may go past the dispatcher, which takes 11 us of host time (an H200's host):
    nothing but the device's implementation would have run. Plain tensors on a GPU, and nobody is
    tracing, compiling, vmapping, profiling or otherwise looking on."""
    return (
        q.is_cuda
        and type(q) is type(k) is type(v) is torch.Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    )


def fwd_eager(problem, memo=None):
    """`fwd`, which autograd is not to see, past the dispatcher if nobody minds.

    memo: None, or a dict for all calls that are alike in everything but their data.
    """
    if unobserved(*problem[:3]):
        return _launch().forward(problem, None, None, memo)
    return fwd(*problem)


def bwd_eager(dout, dlse, out, lse, pack, wanted, problem, memo):
    """`bwd`, past the dispatcher if nobody minds. memo: that of the forward."""
    if unobserved(dout, out, problem.q):
        launch = _launch()
        return launch.backward(problem, dout, dlse, out, lse, pack, wanted, None, None, memo)
    return bwd(dout, dlse, out, lse, pack, wanted, *problem)


def append_eager(q, k, v, *more):
    """`append`, past the dispatcher if nobody minds."""
    if unobserved(q, k, v):
        return _launch().append(q, k, v, *more)
    return append(q, k, v, *more)


torch.library.impl(add_op_namespace_prefix("fwd"), "CPU", _fwd_cpu)
torch.library.impl(add_op_namespace_prefix("bwd"), "CPU", _bwd_cpu)
torch.library.impl(add_op_namespace_prefix("probs"), "CPU", _probs_cpu)
torch.library.impl(add_op_namespace_prefix("append"), "CPU", cpu_cache.append)
torch.library.impl(add_op_namespace_prefix("combine"), "CPU", cpu_cache.combine)
torch.library.impl(add_op_namespace_prefix("rotary"), "CPU", _rotary_cpu)
torch.library.impl(add_op_namespace_prefix("rotary_"), "CPU", _rotary_cpu_)
for _key in ("CUDA", "XPU"):  # ROCm is CUDA to torch
    torch.library.impl(add_op_namespace_prefix("fwd"), _key, _fwd_triton)
    torch.library.impl(add_op_namespace_prefix("bwd"), _key, _bwd_triton)
    torch.library.impl(add_op_namespace_prefix("probs"), _key, _probs_triton)
    torch.library.impl(add_op_namespace_prefix("append"), _key, _append_triton)
    torch.library.impl(add_op_namespace_prefix("combine"), _key, _combine_triton)
    torch.library.impl(add_op_namespace_prefix("rotary"), _key, _rotary_triton)
    torch.library.impl(add_op_namespace_prefix("rotary_"), _key, _rotary_triton_)


@torch.library.register_fake(add_op_namespace_prefix("fwd"))
def _fwd_fake(*fields):
    problem = AttentionProblem(*fields)
    return problem.empty_out(), problem.empty_lse()


@torch.library.register_fake(add_op_namespace_prefix("bwd"))
def _bwd_fake(dout, dlse, out, lse, pack, wanted, *fields):
    problem = AttentionProblem(*fields)
    return problem.empty_grads(pack)[0] + problem.empty_mod_grads(wanted)


@torch.library.register_fake(add_op_namespace_prefix("probs"))
def _probs_fake(lse, max_seqlen_q, max_seqlen_k, *fields):
    return AttentionProblem(*fields).empty_probs(max_seqlen_q, max_seqlen_k)


@torch.library.register_fake(add_op_namespace_prefix("append"))
def _append_fake(
    q, k, v, k_cache, v_cache, cos, sin, cu_seqlens, cache_seqlens, block_table, batch_idx,
    interleaved, turn_each,
):  # fmt: skip
    return torch.empty_like(cache_seqlens), q.new_empty(0) if cos is None else torch.empty_like(q)


@torch.library.register_fake(add_op_namespace_prefix("combine"))
def _combine_fake(out_partial, lse_partial, dtype):
    out = out_partial.new_empty(out_partial.shape[1:], dtype=dtype)
    return out, lse_partial.new_empty(lse_partial.shape[1:], dtype=torch.float32)


@torch.library.register_fake(add_op_namespace_prefix("rotary"))
def _rotary_fake(x, cos, sin, cu_seqlens, offsets, offset, interleaved, conjugate):
    return torch.empty_like(x)


@torch.library.register_fake(add_op_namespace_prefix("rotary_"))
def _rotary_fake_(x, cos, sin, cu_seqlens, offsets, offset, interleaved, conjugate):
    return None

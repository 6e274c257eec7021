"""The ops behind the schemas of torch_binding.h: fakes, and each device's implementation."""

import functools

import torch

from . import cpu
from ._ops import add_op_namespace_prefix, ops
from .problem import AttentionProblem

# The default overloads: a packet would look the overload up on every call.
fwd = ops.fwd.default
bwd = ops.bwd.default


@functools.lru_cache(maxsize=None)
def _launch():
    """The Triton launcher, imported at the first launch: the package loads without Triton."""
    from .flash_attention_kernel import launch

    return launch


def _fwd_cpu(*fields):
    return cpu.forward(AttentionProblem(*fields))


def _bwd_cpu(dout, dlse, out, lse, *fields):
    return cpu.backward(AttentionProblem(*fields), dout, dlse, out, lse)


def _fwd_triton(*fields):
    return _launch().forward(AttentionProblem(*fields))


def _bwd_triton(dout, dlse, out, lse, *fields):
    return _launch().backward(AttentionProblem(*fields), dout, dlse, out, lse)


def fwd_eager(problem):
    """`fwd` without the dispatcher, which takes 11 us of host time a call (on an H200's host).

    Only where nothing but the device's implementation would have run: plain tensors on a GPU, no
    gradient wanted, and nobody tracing, compiling, vmapping, profiling or otherwise looking on.
    """
    if (
        problem.q.is_cuda
        and type(problem.q) is type(problem.k) is type(problem.v) is torch.Tensor
        and not torch.compiler.is_compiling()
        and torch._C._len_torch_dispatch_stack() == 0
        and torch._C._functorch.peek_interpreter_stack() is None
        and torch._C._get_tracing_state() is None
        and not torch.autograd._profiler_enabled()
    ):
        return _launch().forward(problem)
    return fwd(*problem)


torch.library.impl(add_op_namespace_prefix("fwd"), "CPU", _fwd_cpu)
torch.library.impl(add_op_namespace_prefix("bwd"), "CPU", _bwd_cpu)
torch.library.impl(add_op_namespace_prefix("fwd"), "CUDA", _fwd_triton)  # ROCm is CUDA to torch
torch.library.impl(add_op_namespace_prefix("bwd"), "CUDA", _bwd_triton)
torch.library.impl(add_op_namespace_prefix("fwd"), "XPU", _fwd_triton)
torch.library.impl(add_op_namespace_prefix("bwd"), "XPU", _bwd_triton)


@torch.library.register_fake(add_op_namespace_prefix("fwd"))
def _fwd_fake(*fields):
    problem = AttentionProblem(*fields)
    return problem.empty_out(), problem.empty_lse()


@torch.library.register_fake(add_op_namespace_prefix("bwd"))
def _bwd_fake(dout, dlse, out, lse, *fields):
    return AttentionProblem(*fields).empty_grads()

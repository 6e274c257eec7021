"""Launch plans: what a call was built of, kept for the next call of the same signature.

A call keeps what it was built of under the signature of its tensors, so that the next one with the
same shapes and strides only fills in the pointers.
"""

import functools
from typing import Any, NamedTuple

import torch
import triton

from .calls import Launch
from .tensor_maps import direct, expanded, layout_of

MAX_PLANS = 4096  # signatures remembered; one costs about 2 KiB


class Plan(NamedTuple):
    """A launch without its tensors and its scale, for calls of the same signature."""

    compiled: Any  # None: nothing to launch
    programs: int
    layouts: tuple  # of each operand: its strides, or the fields of its tensor descriptor
    counts: tuple
    constexprs: tuple
    direct: Any  # see tensor_maps.py


memos = {}  # signature -> memo: what is known of the calls that have it


def layout(tensor):
    """What of a tensor a compiled kernel or a launch depends on, beyond its shape."""
    return None if tensor is None else (tensor.stride(), tensor.data_ptr() & 15)


def signature(problem, *more) -> tuple:
    """Everything that Triton specialises on or a launch is computed from."""
    q, k, v = problem[:3]
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
        q.data_ptr() & 15, k.data_ptr() & 15, v.data_ptr() & 15, q.dtype, q.device, problem.causal,
        problem.softmax_scale > 0, *map(layout, more),
    )  # fmt: skip
    if problem.cu_seqlens_q is not None:
        key += (problem.cu_seqlens_q.shape[0], problem.size_class())
    if problem.has_mods():
        tensors = problem.tensors()[3:]
        scalars = problem.modifiers()[:-1]  # not max_seqlen_q
        key += (scalars, *((t.shape, t.dtype, layout(t)) if t is not None else t for t in tensors))
    return key


def profiled() -> bool:
    """Whether a profiler has hooked Triton's launches: then they go the long way."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))  # a chain of hooks, or None


def memo_of(key) -> dict:
    """The memo of a signature, empty at first: plans by name, and whether and how to split."""
    memo = memos.get(key)
    if memo is None:
        if len(memos) >= MAX_PLANS:
            memos.clear()
        memo = memos[key] = {}
    return memo


def fresh(memo, name, build):
    """An uninitialised tensor like the one that `build` made for the first of the calls that share
    `memo`: without the way through shapes to strides."""
    again = memo.get(name)
    if again is not None:
        return again()
    tensor = build()
    memo[name] = functools.partial(
        torch.empty_strided, tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device
    )
    return tensor


def call(memo, name, device, operands, pointers, lengths, others, build):
    """Launch by the plan that `memo` has under `name`, or else by what `build` returns."""
    plan = memo.get(name)
    if plan is None or profiled():
        return first_call(memo, name, build())
    compiled = plan.compiled
    if compiled is not None:
        stream = triton.runtime.driver.active.get_current_stream(device.index)
        if plan.direct is not None:
            plan.direct.launch(
                plan.programs, 1, 1, stream, compiled.function, *plan.direct.base,
                compiled.packed_metadata, None, None, None,
                *plan.direct.expanded(operands, plan.layouts),
                *pointers, *lengths, *plan.counts, *others, *plan.constexprs,
            )  # fmt: skip
            return
        # The last lines of JITFunction.run, alike in Triton 3.6 to 3.9; what precedes them there
        # costs 19 us a call on an H200's host.
        compiled.run(
            plan.programs, 1, 1, stream, compiled.function, compiled.packed_metadata,
            None, None, None, *map(expanded, operands, plan.layouts),
            *pointers, *lengths, *plan.counts, *others, *plan.constexprs,
        )  # fmt: skip


def first_call(memo, name, launch: Launch):
    """Make a call the long way and remember its plan."""
    compiled = None
    if launch.programs > 0:
        compiled = launch.kernel[launch.grid](*launch.args, **launch.options)
        if compiled is None:  # the interpreter: there is nothing to remember
            return
    memo[name] = Plan(
        compiled,
        launch.programs,
        tuple(map(layout_of, launch.operands)),
        launch.counts,
        tuple(value for name, value in launch.options.items() if name.isupper()),
        direct(compiled) if compiled is not None else None,
    )


def run(launch: Launch):
    """Make a call that is not worth a plan."""
    if launch.programs > 0:
        launch.kernel[launch.grid](*launch.args, **launch.options)

"""From a problem to kernel calls: config, buffers, grid, arguments.

`*_launch` builds a call from scratch; tools/aot.py compiles those offline. `forward` and `backward`
keep what a call was built of under the signature of its tensors, so that the next call with the
same shapes and strides only fills in the pointers.
"""

import functools
from typing import Any, NamedTuple, Optional, Tuple

import torch
import triton

from .backward import dkdv_kernel, dq_kernel
from .common import LOG2E, Mods, Operand, Spec
from .config import TileConfig, architecture, block_dim, choose
from .forward import forward_kernel
from .seqlen import Lengths, num_tiles

MAX_PLANS = 4096  # signatures remembered; one costs about 2 KiB


class Launch(NamedTuple):
    """One kernel call."""

    kernel: Any
    grid: Tuple[int]
    args: tuple
    options: dict


@functools.lru_cache(maxsize=None)
def _options(tile: TileConfig, head_dim: int, head_dim_v: int, causal: bool, defer_scale: bool):
    """The compile-time half of a call; the kernels' constexpr parameters first, in their order."""
    return {
        "SPEC": Spec(head_dim, head_dim_v, causal, defer_scale),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_dim(max(head_dim, head_dim_v)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


NUM_CONSTEXPRS = 4  # SPEC to BLOCK_D


def _operand(tensor) -> Operand:
    strides = tensor.stride()
    return Operand(tensor, *strides) if len(strides) == 4 else Operand(tensor, 0, *strides)


def _tile(kernel: str, problem) -> TileConfig:
    q, v = problem.q, problem.v
    arch = architecture(q.device)
    return choose(kernel, arch, q.dtype, q.shape[-1], v.shape[-1], problem.causal)


def _launch(kernel, problem, tile, operands, rows, defer_scale=False, over_keys=False) -> Launch:
    """A call over the tiles of the queries of every head, or of the keys of every KV head.

    operands: tensors whose strides a kernel takes; rows: tensors like lse, which it knows.
    """
    q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale, causal = problem
    nheads, nheads_k = q.shape[-2], k.shape[-2]
    if cu_seqlens_q is None:
        batch, rows_q, rows_k = q.shape[0], q.shape[1], k.shape[1]
    else:
        batch, rows_q, rows_k = cu_seqlens_q.shape[0] - 1, q.shape[0], k.shape[0]
    if over_keys:
        tiles, heads = num_tiles(Lengths(cu_seqlens_k, rows_k, batch), tile.block_n), nheads_k
    else:
        tiles, heads = num_tiles(Lengths(cu_seqlens_q, rows_q, batch), tile.block_m), nheads
    args = (
        *map(_operand, operands), *rows, cu_seqlens_q, cu_seqlens_k, rows_q, rows_k, batch,
        tiles, nheads // nheads_k, Mods(softmax_scale * LOG2E.value),
    )  # fmt: skip
    options = _options(tile, q.shape[-1], v.shape[-1], causal, defer_scale)
    return Launch(kernel, (tiles * heads,), args, options)


def forward_launch(problem, out, lse, tile: Optional[TileConfig] = None) -> Launch:
    """The call that fills `out` and `lse`."""
    # Products are compared before they are scaled, which only a positive scale allows.
    defer_scale = problem.softmax_scale > 0
    tile = tile or _tile("forward", problem)
    return _launch(forward_kernel, problem, tile, (*problem[:3], out), (lse,), defer_scale)


def dq_launch(problem, dout, dlse, out, lse, dq, delta, tile: Optional[TileConfig] = None):
    """The call that fills `dq` and `delta`; `dlse` None if lse has no gradient."""
    operands = (*problem[:3], out, dout, dq)
    tile = tile or _tile("dq", problem)
    return _launch(dq_kernel, problem, tile, operands, (lse, dlse, delta))


def dkdv_launch(problem, dout, lse, delta, dk, dv, tile: Optional[TileConfig] = None):
    """The call that fills `dk` and `dv` from the `delta` of dq_launch."""
    operands = (*problem[:3], dout, dk, dv)
    tile = tile or _tile("dkdv", problem)
    return _launch(dkdv_kernel, problem, tile, operands, (lse, delta), over_keys=True)


class Plan(NamedTuple):
    """A launch without its tensors and its scale, for calls of the same signature."""

    compiled: Any  # None: nothing to launch
    grid: int
    strides: tuple  # of each operand
    counts: tuple  # rows_q, rows_k, batch, num_tiles, group_size
    constexprs: tuple


_plans = {}


def _signature(problem, *more) -> tuple:
    """Everything that Triton specialises on or a launch is computed from."""
    q, k, v, cu_seqlens_q, _, softmax_scale, causal = problem
    return (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
        q.data_ptr() & 15, k.data_ptr() & 15, v.data_ptr() & 15, q.dtype, q.device, causal,
        softmax_scale > 0, None if cu_seqlens_q is None else cu_seqlens_q.shape[0],
        *[None if t is None else (t.stride(), t.data_ptr() & 15) for t in more],
    )  # fmt: skip


def _profiled() -> bool:
    """Whether a profiler has hooked Triton's launches: then they go the long way."""
    hook = triton.knobs.runtime.launch_enter_hook
    return bool(getattr(hook, "calls", hook))  # a chain of hooks, or None


def _call(key, problem, operands, rows, build):
    """Launch by the plan that is known for `key`, or else by what `build` returns."""
    plan = _plans.get(key)
    if plan is None or _profiled():
        return _first_call(key, build())
    compiled = plan.compiled
    if compiled is not None:
        stream = triton.runtime.driver.active.get_current_stream(problem.q.device.index)
        # The last lines of JITFunction.run, alike in Triton 3.6 to 3.9; what precedes them there
        # costs 19 us a call on an H200's host.
        compiled.run(
            plan.grid, 1, 1, stream, compiled.function, compiled.packed_metadata, None, None, None,
            *[(t, *strides) for t, strides in zip(operands, plan.strides)], *rows,
            problem.cu_seqlens_q, problem.cu_seqlens_k, *plan.counts,
            (problem.softmax_scale * LOG2E.value,), *plan.constexprs,
        )  # fmt: skip


def _first_call(key, launch: Launch):
    """Make a call the long way and remember its plan."""
    compiled = None
    if launch.grid[0] > 0:
        compiled = launch.kernel[launch.grid](*launch.args, **launch.options)
        if compiled is None:  # the interpreter: there is nothing to remember
            return
    if len(_plans) >= MAX_PLANS:
        _plans.clear()
    operands = [arg for arg in launch.args[:-1] if isinstance(arg, Operand)]
    _plans[key] = Plan(
        compiled,
        launch.grid[0],
        tuple(operand[1:] for operand in operands),
        launch.args[-6:-1],
        tuple(launch.options.values())[:NUM_CONSTEXPRS],
    )


def _on_device(function):
    """Run with the tensors' device current: Triton launches on the current device's stream."""

    @functools.wraps(function)
    def guarded(problem, *args):
        device = problem.q.device
        if device.type == "cpu":  # the interpreter
            return function(problem, *args)
        module = torch.cuda if device.type == "cuda" else torch.get_device_module(device)
        if device.index == module.current_device():
            return function(problem, *args)
        with module.device(device):
            return function(problem, *args)

    return guarded


@_on_device
def forward(problem, tile: Optional[TileConfig] = None):
    """-> (out, lse)"""
    out, lse = problem.empty_out(), problem.empty_lse()
    key = (forward_kernel, tile, *_signature(problem))
    operands = (*problem[:3], out)
    _call(key, problem, operands, (lse,), lambda: forward_launch(problem, out, lse, tile))
    return out, lse


@_on_device
def backward(problem, dout, dlse, out, lse, dq_tile=None, dkdv_tile=None):
    """-> (dq, dk, dv)"""
    dq, dk, dv = problem.empty_grads()
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    signature = _signature(problem, dout, out, lse, dlse)
    _call(
        (dq_kernel, dq_tile, *signature),
        problem,
        (*problem[:3], out, dout, dq),
        (lse, dlse, delta),
        lambda: dq_launch(problem, dout, dlse, out, lse, dq, delta, dq_tile),
    )
    _call(
        (dkdv_kernel, dkdv_tile, *signature),
        problem,
        (*problem[:3], dout, dk, dv),
        (lse, delta),
        lambda: dkdv_launch(problem, dout, lse, delta, dk, dv, dkdv_tile),
    )
    return dq, dk, dv

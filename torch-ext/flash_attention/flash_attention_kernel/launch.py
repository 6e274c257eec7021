"""From a problem to kernel calls: config, buffers, grid, arguments.

`*_launch` builds a call without making it, which is what tools/aot.py compiles offline.
"""

import functools
from typing import Any, NamedTuple, Optional, Tuple

import torch

from .backward import dkdv_kernel, dq_kernel
from .common import LOG2E, Mods, Operand, RowOperand, Spec
from .config import TileConfig, architecture, block_dim, choose
from .forward import forward_kernel
from .seqlen import Lengths, num_tiles


class Launch(NamedTuple):
    """One kernel call."""

    kernel: Any
    grid: Tuple[int]
    args: tuple
    options: dict

    def run(self):
        if self.grid[0] > 0:
            self.kernel[self.grid](*self.args, **self.options)


@functools.lru_cache(maxsize=None)
def _options(tile: TileConfig, head_dim: int, head_dim_v: int, causal: bool, defer_scale: bool):
    """The compile-time half of a call; cached, as building it costs host time on every call."""
    return {
        "SPEC": Spec(head_dim, head_dim_v, causal, defer_scale),
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_dim(head_dim),
        "BLOCK_DV": block_dim(head_dim_v),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def _operand(tensor) -> Operand:
    strides = tensor.stride()
    return Operand(tensor, *strides) if len(strides) == 4 else Operand(tensor, 0, *strides)


def _row_operand(tensor) -> Optional[RowOperand]:
    if tensor is None:
        return None
    strides = tensor.stride()
    return RowOperand(tensor, *strides[:2]) if len(strides) == 3 else RowOperand(tensor, 0, strides[0])


def _lengths(problem) -> Tuple[Lengths, Lengths]:
    q, k = problem.q, problem.k
    if problem.cu_seqlens_q is None:
        return Lengths(None, q.shape[1], q.shape[0]), Lengths(None, k.shape[1], k.shape[0])
    batch = problem.cu_seqlens_q.shape[0] - 1
    return (
        Lengths(problem.cu_seqlens_q, q.shape[0], batch),
        Lengths(problem.cu_seqlens_k, k.shape[0], batch),
    )


def _tile(kernel: str, problem) -> TileConfig:
    q, v = problem.q, problem.v
    arch = architecture(q.device)
    return choose(kernel, arch, q.dtype, q.shape[-1], v.shape[-1], problem.causal)


def _launch(kernel, problem, tile, operands, defer_scale=False, over_keys=False) -> Launch:
    """A call over the tiles of the queries of every head, or of the keys of every KV head."""
    q_lengths, k_lengths = _lengths(problem)
    nheads, nheads_k = problem.q.shape[-2], problem.k.shape[-2]
    if over_keys:
        tiles, heads = num_tiles(k_lengths, tile.block_n), nheads_k
    else:
        tiles, heads = num_tiles(q_lengths, tile.block_m), nheads
    mods = Mods(problem.softmax_scale * LOG2E.value)
    args = (*operands, q_lengths, k_lengths, tiles, nheads // nheads_k, mods)
    head_dim, head_dim_v = problem.q.shape[-1], problem.v.shape[-1]
    options = _options(tile, head_dim, head_dim_v, problem.causal, defer_scale)
    return Launch(kernel, (tiles * heads,), args, options)


def forward_launch(problem, out, lse, tile: Optional[TileConfig] = None) -> Launch:
    """The call that fills `out` and `lse`."""
    operands = (
        _operand(problem.q), _operand(problem.k), _operand(problem.v), _operand(out),
        _row_operand(lse),
    )  # fmt: skip
    # Products are compared before they are scaled, which only a positive scale allows.
    defer_scale = problem.softmax_scale > 0
    return _launch(forward_kernel, problem, tile or _tile("forward", problem), operands, defer_scale)


def dq_launch(problem, dout, dlse, out, lse, dq, delta, tile: Optional[TileConfig] = None):
    """The call that fills `dq` and `delta`; `dlse` None if lse has no gradient."""
    operands = (
        _operand(problem.q), _operand(problem.k), _operand(problem.v), _operand(out),
        _operand(dout), _operand(dq), _row_operand(lse), _row_operand(dlse), _row_operand(delta),
    )  # fmt: skip
    return _launch(dq_kernel, problem, tile or _tile("dq", problem), operands)


def dkdv_launch(problem, dout, lse, delta, dk, dv, tile: Optional[TileConfig] = None):
    """The call that fills `dk` and `dv` from the `delta` of dq_launch."""
    operands = (
        _operand(problem.q), _operand(problem.k), _operand(problem.v), _operand(dout),
        _operand(dk), _operand(dv), _row_operand(lse), _row_operand(delta),
    )  # fmt: skip
    return _launch(
        dkdv_kernel, problem, tile or _tile("dkdv", problem), operands, over_keys=True
    )


def _on_device(function):
    """Run with the tensors' device current: Triton launches on the current device's stream."""

    @functools.wraps(function)
    def guarded(problem, *args):
        device = problem.q.device
        if device.type == "cpu":  # the interpreter
            return function(problem, *args)
        module = torch.get_device_module(device)
        if device.index == module.current_device():
            return function(problem, *args)
        with module.device(device):
            return function(problem, *args)

    return guarded


@_on_device
def forward(problem, tile: Optional[TileConfig] = None):
    """-> (out, lse)"""
    out, lse = problem.empty_out(), problem.empty_lse()
    forward_launch(problem, out, lse, tile).run()
    return out, lse


@_on_device
def backward(problem, dout, dlse, out, lse, dq_tile=None, dkdv_tile=None):
    """-> (dq, dk, dv)"""
    dq, dk, dv = problem.empty_grads()
    delta = torch.empty_like(lse)
    dlse = None if dlse is None else dlse.contiguous()
    dq_launch(problem, dout, dlse, out, lse, dq, delta, dq_tile).run()
    dkdv_launch(problem, dout, lse, delta, dk, dv, dkdv_tile).run()
    return dq, dk, dv

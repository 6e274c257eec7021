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
from .rotary import rotary_kernel
from .score_tiles import dbias_kernel, probs_kernel
from .seqlen import Lengths, num_tiles

MAX_PLANS = 4096  # signatures remembered; one costs about 2 KiB
NUM_CONSTEXPRS = 4  # of _options: SPEC to BLOCK_D
UNBOUNDED = 2**31 - 1


class Launch(NamedTuple):
    """One kernel call."""

    kernel: Any
    grid: Tuple[int]
    args: tuple
    options: dict


@functools.lru_cache(maxsize=None)
def _options(tile: TileConfig, spec: Spec):
    """The compile-time half of a call; the kernels' constexpr parameters first, in their order."""
    return {
        "SPEC": spec,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
        "BLOCK_D": block_dim(max(spec.head_dim, spec.head_dim_v)),
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        "enable_fp_fusion": True,
    }


def _has_ptx(device) -> bool:
    """Whether kernels are compiled for NVIDIA, as tools/aot.py may do for meta tensors too."""
    target = triton.runtime.driver.active.get_current_target() if device.type != "cpu" else None
    return target is not None and target.backend == "cuda"


def _spec(problem, defer_scale=False) -> Spec:
    """What the kernels are compiled for. defer_scale: products may be compared before they are
    scaled, which only a positive scale, and nothing added to the scores, allows."""
    p = problem
    bare = p.alibi_slopes is None and p.attn_bias is None
    return Spec(
        head_dim=p.q.shape[-1],
        head_dim_v=p.v.shape[-1],
        causal=p.causal,
        left=p.window_left >= 0,
        right=p.window_right >= 0,
        top_left=p.top_left,
        softcap=p.softcap > 0.0,
        dropout=p.dropout_p > 0.0,
        precise=p.q.dtype == torch.float32,
        fast_tanh=p.softcap > 0.0 and p.q.dtype == torch.bfloat16 and _has_ptx(p.q.device),
        defer_scale=defer_scale and bare and (p.softcap > 0.0 or p.softmax_scale > 0),
    )


def _mods(problem) -> Mods:
    """The run-time values of a call."""
    p = problem
    scale_log2 = p.softmax_scale * LOG2E.value
    if not p.has_mods():
        return Mods(scale_log2)
    mods = Mods(
        scale_log2,
        window_left=max(p.window_left, 0),
        window_right=max(p.window_right, 0),
        sink_ptr=p.s_aux,
    )
    if p.softcap:
        mods = mods._replace(
            softcap_log2=p.softcap * LOG2E.value, tanh_log2=2.0 * scale_log2 / p.softcap
        )
    if p.dropout_p:
        mods = mods._replace(
            drop_below=min(round(p.dropout_p * 2**32), 2**32 - 1) - 2**31,
            keep_scale=1.0 / (1.0 - p.dropout_p),
            seed_ptr=p.rng_state,
        )
    if p.alibi_slopes is not None:
        slopes = p.alibi_slopes
        mods = mods._replace(
            alibi_ptr=slopes, alibi_batch=slopes.stride(0) if slopes.dim() == 2 else 0
        )
    if p.attn_bias is not None:
        bias = p.attn_bias
        batch, head, row, col = (
            0 if size == 1 else stride for size, stride in zip(bias.shape, bias.stride())
        )
        rows = UNBOUNDED if bias.shape[2] == 1 else bias.shape[2]
        mods = mods._replace(
            bias_ptr=bias,
            bias_batch=batch,
            bias_head=head,
            bias_row=row,
            bias_col=col,
            bias_rows=rows,
            bias_cols=bias.shape[3],
        )
    return mods


def _operand(tensor) -> Operand:
    strides = tensor.stride()
    return Operand(tensor, *strides) if len(strides) == 4 else Operand(tensor, 0, *strides)


def tile_for(kernel: str, arch: str, problem) -> TileConfig:
    """The table's config for a kernel of this problem."""
    q, v = problem.q, problem.v
    masked = problem.causal or problem.window_left >= 0 or problem.window_right >= 0
    dims = (q.shape[-1], v.shape[-1])
    return choose(kernel, arch, q.dtype, *dims, masked, problem.weight())


def _tile(kernel: str, problem) -> TileConfig:
    return tile_for(kernel, architecture(problem.q.device), problem)


def _counts(problem):
    """-> rows_q, rows_k, batch as the kernels take them."""
    q, k = problem.q, problem.k
    if problem.cu_seqlens_q is None:
        return q.shape[1], k.shape[1], q.shape[0]
    return q.shape[0], k.shape[0], problem.cu_seqlens_q.shape[0] - 1


def _launch(kernel, problem, tile, operands, rows, defer_scale=False, over_keys=False) -> Launch:
    """A call over the tiles of the queries of every head, or of the keys of every KV head.

    operands: tensors whose strides a kernel takes; rows: tensors like lse, which it knows.
    """
    nheads, nheads_k = problem.q.shape[-2], problem.k.shape[-2]
    rows_q, rows_k, batch = _counts(problem)
    if over_keys:
        lengths, block, heads = (problem.cu_seqlens_k, rows_k), tile.block_n, nheads_k
    else:
        lengths, block, heads = (problem.cu_seqlens_q, rows_q), tile.block_m, nheads
    tiles = num_tiles(Lengths(lengths[0], None, None, lengths[1], batch), block)
    args = (
        *map(_operand, operands), *rows, *problem.lengths(), rows_q, rows_k, batch,
        tiles, nheads // nheads_k, _mods(problem),
    )  # fmt: skip
    return Launch(kernel, (tiles * heads,), args, _options(tile, _spec(problem, defer_scale)))


def forward_launch(problem, out, lse, tile: Optional[TileConfig] = None) -> Launch:
    """The call that fills `out` and `lse`."""
    tile = tile or _tile("forward", problem)
    return _launch(forward_kernel, problem, tile, (*problem[:3], out), (lse,), defer_scale=True)


def dq_launch(problem, dout, dlse, out, lse, dq, delta, dslope=None, tile=None) -> Launch:
    """The call that fills `dq`, `delta` and `dslope`; `dlse` None if lse has no gradient, `dslope`
    if alibi_slopes wants none."""
    operands = (*problem[:3], out, dout, dq)
    tile = tile or _tile("dq", problem)
    return _launch(dq_kernel, problem, tile, operands, (lse, dlse, delta, dslope))


def dkdv_launch(problem, dout, lse, delta, dk, dv, tile=None) -> Launch:
    """The call that fills `dk` and `dv` from the `delta` of dq_launch."""
    operands = (*problem[:3], dout, dk, dv)
    tile = tile or _tile("dkdv", problem)
    return _launch(dkdv_kernel, problem, tile, operands, (lse, delta), over_keys=True)


def dbias_launch(problem, dout, lse, delta, dbias, tile=None) -> Launch:
    """The call that fills `dbias`, of attn_bias's shape."""
    tile = tile or _tile("tiles", problem)
    rows_q, rows_k, batch = _counts(problem)
    nheads, nheads_k = problem.q.shape[-2], problem.k.shape[-2]
    dbias_batch, dbias_heads, dbias_rows, cols = dbias.shape
    tiles = triton.cdiv(dbias_rows, tile.block_m) * triton.cdiv(cols, tile.block_n)
    args = (
        *map(_operand, (*problem[:3], dout)), lse, delta, dbias, *problem.lengths(),
        rows_q, rows_k, batch, nheads, nheads // nheads_k, dbias_batch, dbias_heads, dbias_rows,
        _mods(problem),
    )  # fmt: skip
    grid = (tiles * dbias_batch * dbias_heads,)
    return Launch(dbias_kernel, grid, args, _options(tile, _spec(problem)))


def probs_launch(problem, lse, probs, tile=None) -> Launch:
    """The call that fills `probs` [batch, nheads, rows, cols]."""
    tile = tile or _tile("tiles", problem)
    rows_q, rows_k, batch = _counts(problem)
    nheads, nheads_k = problem.q.shape[-2], problem.k.shape[-2]
    rows, cols = probs.shape[2:]
    tiles = triton.cdiv(rows, tile.block_m) * triton.cdiv(cols, tile.block_n)
    args = (
        *map(_operand, problem[:2]), lse, probs, *problem.lengths(),
        rows_q, rows_k, batch, nheads, nheads // nheads_k, rows, cols, _mods(problem),
    )  # fmt: skip
    grid = (tiles * batch * nheads,)
    return Launch(probs_kernel, grid, args, _options(tile, _spec(problem)))


class Plan(NamedTuple):
    """A launch without its tensors and its scale, for calls of the same signature."""

    compiled: Any  # None: nothing to launch
    grid: int
    strides: tuple  # of each operand
    counts: tuple  # rows_q, rows_k, batch, num_tiles, group_size
    constexprs: tuple


_plans = {}


def _layout(tensor):
    """What of a tensor a compiled kernel or a launch depends on, beyond its shape."""
    return None if tensor is None else (tensor.stride(), tensor.data_ptr() & 15)


def _signature(problem, *more) -> tuple:
    """Everything that Triton specialises on or a launch is computed from."""
    q, k, v = problem[:3]
    key = (
        q.shape, k.shape, v.shape, q.stride(), k.stride(), v.stride(),
        q.data_ptr() & 15, k.data_ptr() & 15, v.data_ptr() & 15, q.dtype, q.device, problem.causal,
        problem.softmax_scale > 0, *map(_layout, more),
    )  # fmt: skip
    if problem.cu_seqlens_q is not None:
        key += (problem.cu_seqlens_q.shape[0],)
    if problem.has_mods():
        tensors = problem.tensors()[3:]
        scalars = problem[-6:]  # causal to dropout_p
        key += (scalars, *((t.shape, t.dtype, _layout(t)) if t is not None else t for t in tensors))
    return key


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
            *problem.lengths(), *plan.counts, tuple(_mods(problem)), *plan.constexprs,
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


def _run(launch: Launch):
    """Make a call that is not worth a plan."""
    if launch.grid[0] > 0:
        launch.kernel[launch.grid](*launch.args, **launch.options)


def _on_device(function):
    """Run with the device of the first argument, a problem or a tensor, current: Triton launches on
    the current device's stream."""

    @functools.wraps(function)
    def guarded(problem, *args):
        device = problem.q.device if isinstance(problem, tuple) else problem.device
        if device.type == "cpu":  # the interpreter
            return function(problem, *args)
        module = torch.cuda if device.type == "cuda" else torch.get_device_module(device)
        if device.index == module.current_device():
            return function(problem, *args)
        with module.device(device):
            return function(problem, *args)

    return guarded


def _by_rows(tensor):
    """The tensor, copied if its columns lie apart in memory, as flash_attn copies it.

    Random tests under Triton 3.6 ended in illegal accesses on an H200 in three processes of
    fourteen, each with such a K among its first cases, although the addresses are right (the
    interpreter checked them): products from a tile that is transposed in memory are not trusted.
    """
    return tensor.contiguous() if tensor.stride(-1) > 1 else tensor


def _readable(problem):
    """The problem with q, k and v by rows."""
    q, k, v = problem[:3]
    if q.stride(-1) <= 1 and k.stride(-1) <= 1 and v.stride(-1) <= 1:
        return problem
    return problem._replace(q=_by_rows(q), k=_by_rows(k), v=_by_rows(v))


@_on_device
def forward(problem, tile: Optional[TileConfig] = None):
    """-> (out, lse)"""
    out, lse = problem.empty_out(), problem.empty_lse()
    if problem.seqused_q is not None:  # rows that no program writes
        out.zero_()
        lse.fill_(float("inf"))
    problem = _readable(problem)
    key = (forward_kernel, tile, *_signature(problem))
    operands = (*problem[:3], out)
    _call(key, problem, operands, (lse,), lambda: forward_launch(problem, out, lse, tile))
    return out, lse


@_on_device
def backward(
    problem, dout, dlse, out, lse, pack=1, wanted=(False,) * 3, dq_tile=None, kv_tile=None
):
    """-> the gradients of the op schema: of q, k and v, packed as `pack` says, then of those of
    attn_bias, alibi_slopes and s_aux that are `wanted`."""
    grads, (dq, dk, dv) = problem.empty_grads(pack)
    want_bias, want_slopes, want_sink = wanted
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    delta = torch.empty_like(lse)
    dslope = torch.empty_like(lse) if want_slopes else None
    unwritten = [t for t in (dq, delta, dslope) if t is not None and problem.seqused_q is not None]
    if problem.seqused_k is not None or problem.leftpad_k is not None:
        unwritten += [dk, dv]
    for tensor in unwritten:
        tensor.zero_()
    problem = _readable(problem)
    dout = _by_rows(dout)
    signature = _signature(problem, dout, out, lse, dlse, dq, dk, dslope)
    _call(
        (dq_kernel, dq_tile, *signature),
        problem,
        (*problem[:3], out, dout, dq),
        (lse, dlse, delta, dslope),
        lambda: dq_launch(problem, dout, dlse, out, lse, dq, delta, dslope, dq_tile),
    )
    _call(
        (dkdv_kernel, kv_tile, *signature),
        problem,
        (*problem[:3], dout, dk, dv),
        (lse, delta),
        lambda: dkdv_launch(problem, dout, lse, delta, dk, dv, kv_tile),
    )
    if want_bias:
        dbias = torch.zeros_like(problem.attn_bias, memory_format=torch.contiguous_format)
        if dbias.numel():
            _run(dbias_launch(problem, dout, lse, delta, dbias, dq_tile))
        grads.append(dbias)
    if want_slopes:
        grads.append(problem.slopes_grad(dslope))
    if want_sink:
        grads.append(problem.sink_grad(lse, delta))
    return grads


@_on_device
def probabilities(problem, lse, max_seqlen_q, max_seqlen_k, tile: Optional[TileConfig] = None):
    """-> [batch, nheads, max_seqlen_q, max_seqlen_k] in q's dtype; negative where dropped"""
    probs = problem.empty_probs(max_seqlen_q, max_seqlen_k)
    if probs.numel():
        _run(probs_launch(problem, lse.contiguous(), probs, tile))
    return probs


@_on_device
def rotary(x, out, cos, sin, cu_seqlens, offsets, offset, interleaved, conjugate):
    """Turn x by its positions' angles into `out`, which may be x; see rotary.py."""
    rotary_dim = 2 * cos.shape[-1]
    if cu_seqlens is None:
        batch, rows = x.shape[:2]
    else:
        batch, rows = cu_seqlens.shape[0] - 1, x.shape[0]
    block_d = max(block_dim(rotary_dim), 2)
    block_m = max(2048 // block_d, 1)  # 8 elements a thread
    tiles = num_tiles(Lengths(cu_seqlens, None, None, rows, batch), block_m)
    grid = (tiles * x.shape[-2],)
    args = (
        _operand(x), _operand(out), cos, sin, cu_seqlens, offsets, offset, cos.shape[0], rows,
        batch, tiles,
    )  # fmt: skip
    options = {
        "ROTARY_DIM": rotary_dim,
        "INTERLEAVED": interleaved,
        "CONJUGATE": conjugate,
        "BLOCK_M": block_m,
        "BLOCK_D": block_d,
    }
    if rotary_dim and x.numel():
        rotary_kernel[grid](*args, **options)
    return out

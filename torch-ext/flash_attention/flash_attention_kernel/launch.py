"""Kernel calls made: buffers, which kernels, and the order of their launches."""

import functools
import logging
from typing import Optional

import torch
import triton
from triton.errors import TritonError

from . import cache_calls, calls
from .append_kv import OVERFLOW
from .cache_calls import Splits
from .config import TileConfig, architecture
from .plans import call, fresh, layout, memo_of, run, signature

logger = logging.getLogger(__name__)

_counters_of_stream = {}  # (device, stream) -> zeros
_warned = set()


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

    On an H200 under Triton 3.6 a case of the random tests (FA_FUZZ_SEED=4) whose K is such ended in
    an illegal access, and in another run never, although the interpreter finds every address of it
    right; with the copy it passes. The cause is not known.
    """
    return tensor.contiguous() if tensor.stride(-1) > 1 else tensor


def _readable(problem, memo):
    """The problem with q, k and v by rows."""
    if "is_by_rows" not in memo:
        memo["is_by_rows"] = all(tensor.stride(-1) <= 1 for tensor in problem[:3])
    if memo["is_by_rows"]:
        return problem
    q, k, v = map(_by_rows, problem[:3])
    return problem._replace(q=q, k=k, v=v)


def _captured(device) -> bool:
    """Whether a CUDA graph is being captured."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _counters(device):
    """[2] int32 zeros for a kernel that leaves zeros behind: those of the current stream, or, while
    it is captured, new ones, as a graph may run beside other work of the stream."""
    if _captured(device):
        return torch.zeros(2, dtype=torch.int32, device=device)
    key = (device.index, triton.runtime.driver.active.get_current_stream(device.index))
    counters = _counters_of_stream.get(key)
    if counters is None:
        counters = _counters_of_stream[key] = torch.zeros(2, dtype=torch.int32, device=device)
    return counters


@_on_device
def forward(problem, tile: Optional[TileConfig] = None, splits: Optional[Splits] = None, memo=None):
    """-> (out, lse); by decode_kernel if `splits` are given, or else as cache_calls.decodes says.

    memo: a dict for this call and those like it in everything but their data, or None.
    """
    given = memo is not None
    if not given:
        memo = memo_of((tile, splits, *signature(problem)))
    if problem.is_float8() and (tile is not None or not _takes_float8(memo, problem)):
        problem = problem.dequantized(torch.bfloat16)
    out, lse = problem.empty_out(), fresh(memo, "lse", problem.empty_lse)
    if problem.seqused_q is not None:  # rows that no program writes
        out.zero_()
        lse.fill_(float("inf"))
    problem = _readable(problem, memo)
    splits = splits or _splits_of(memo, problem, tile)
    paging = memo.get("paging") or _paging(problem, memo)
    others = (*paging, memo.get("mods") or _mods(problem, memo, given))
    if splits is not None:
        _decode(memo, problem, out, lse, others, splits, tile)
        return out, lse
    takes_hopper = tile is None and _takes_hopper(memo, problem)
    if takes_hopper and _by_hopper(memo, problem, out, lse, others):
        return out, lse
    if problem.is_float8():  # the kernel did not compile
        problem = problem.dequantized(torch.bfloat16)
    call(
        memo, "forward", problem.q.device, (*problem[:3], out), (lse,), problem.lengths(), others,
        lambda: calls.forward_launch(problem, out, lse, tile),
    )  # fmt: skip
    return out, lse


@functools.lru_cache(maxsize=None)
def _hopper_calls():
    """hopper_calls, imported at the first call that wants it; None: not under this Triton."""
    try:
        from . import hopper_calls
    except Exception as error:  # Gluon is experimental: whatever may have moved
        _without_hopper(error)
        return None
    return hopper_calls


def _without_hopper(error):
    """Say, once, that the kernel for sm_90 is not to be had."""
    if not _warned:
        _warned.add("hopper")
        logger.warning(
            "the Hopper kernel does not work under Triton %s, the portable one takes its place: %s",
            triton.__version__, str(error).strip().rpartition("\n")[2],
        )  # fmt: skip


def _takes_hopper(memo, problem) -> bool:
    """Whether the kernel for sm_90 serves this problem."""
    if "takes_hopper" not in memo:
        on_hopper = architecture(problem.q.device) == "sm_90"
        hopper_calls = _hopper_calls() if on_hopper else None
        memo["takes_hopper"] = hopper_calls is not None and hopper_calls.serves(problem)
    return memo["takes_hopper"]


def _takes_float8(memo, problem) -> bool:
    """Whether a kernel reads float8 itself: not the one for few queries."""
    return _takes_hopper(memo, problem) and not cache_calls.decodes(problem)


def _by_hopper(memo, problem, out, lse, others) -> bool:
    """Whether the kernel for sm_90 has been called; not where it does not compile."""
    device, lengths = problem.q.device, problem.lengths()
    counters = _counters(device)
    try:
        if problem.is_float8():
            _by_hopper_8(memo, problem, out, lse, counters, others)
            return True
        call(
            memo, "hopper", device, (*problem[:3], *problem[:3], out, out), (lse, counters, None),
            lengths, others,
            lambda: _hopper_calls().forward_launch(problem, out, lse, counters),
        )  # fmt: skip
    except (TritonError, RuntimeError) as error:
        if "hopper" in memo:  # it has run: this is another error
            raise
        _without_hopper(error)
        memo["takes_hopper"] = False
    return memo["takes_hopper"]


def _by_hopper_8(memo, problem, out, lse, counters, others):
    """The forward of float8, after the call that transposes V for it."""
    hopper_calls, device, (q, k, v) = _hopper_calls(), problem.q.device, problem[:3]
    values = fresh(memo, "transposed", lambda: hopper_calls.empty_values(problem))
    bytes_of_values = values.view(torch.int8)
    call(
        memo, "values", device, (v.view(torch.int8),), (bytes_of_values,),
        (problem.cu_seqlens_k, problem.seqused_k, problem.leftpad_k), (),
        lambda: hopper_calls.values_launch(problem, values),
    )  # fmt: skip
    gains = problem.gains()
    call(
        memo, "hopper", device, (q, k, values, q, k, None, out, None), (lse, counters, gains),
        problem.lengths(), others,
        lambda: hopper_calls.forward_launch(problem, out, lse, counters, None, values, gains),
    )  # fmt: skip


def _splits_of(memo, problem, tile):
    """Over how many programs decode_kernel divides a sequence's keys; None: it is not for it."""
    if "splits" not in memo:
        memo["splits"] = None
        if cache_calls.decodes(problem):
            tile = tile or cache_calls.decode_tile(problem)
            memo["splits"] = cache_calls.splits_for(problem, tile)
    return memo["splits"]


def _paging(problem, memo):
    """The kernels' paging; kept in `memo` where it has no tensor."""
    paging = calls.paging_of(problem.k, *problem.pages())
    if paging.table is paging.batch_idx is None:
        memo["paging"] = paging
    return paging


def _mods(problem, memo, given):
    """The kernels' mods; kept in `memo` where they are numbers alone, those of all calls that the
    memo is `given` for."""
    mods = tuple(calls.mods_of(problem))
    if given and not any(isinstance(value, torch.Tensor) for value in mods):
        memo["mods"] = mods
    return mods


def _parts_of(whole, splits) -> torch.Tensor:
    """A tensor like `whole` of each split, uninitialised."""
    return torch.empty((splits.num, *whole.shape), dtype=torch.float32, device=whole.device)


def _decode(memo, problem, out, lse, others, splits: Splits, tile):
    """decode_kernel, and the merge of its parts if there are any."""
    to_out, to_lse, device = out, lse, problem.q.device
    if splits.num > 1:
        to_out = fresh(memo, "out_parts", lambda: _parts_of(out, splits))
        to_lse = fresh(memo, "lse_parts", lambda: _parts_of(lse, splits))
        if problem.seqused_q is not None:
            to_lse.fill_(float("-inf"))
    call(
        memo, "decode", device, (*problem[:3], to_out), (to_lse,), problem.lengths(), others,
        lambda: cache_calls.decode_launch(problem, to_out, to_lse, splits, tile),
    )  # fmt: skip
    if splits.num > 1:
        parts = (to_out, to_lse, out, lse)
        call(
            memo, "combine", device, parts, (), (), (),
            lambda: cache_calls.merge_launch(*parts),
        )  # fmt: skip


@_on_device
def combine(out_partial, lse_partial, dtype):
    """-> (out, lse [(batch,) seqlen, nheads], -inf for a row without keys)"""
    if out_partial.stride(-1) != 1:
        out_partial = out_partial.contiguous()
    out = torch.empty(out_partial.shape[1:], dtype=dtype, device=out_partial.device)
    lse = torch.empty(lse_partial.shape[1:], dtype=torch.float32, device=out_partial.device)
    run(cache_calls.combine_launch(out_partial, lse_partial, out, lse, float("-inf")))
    return out, lse


@_on_device
def append(
    q, k, v, k_cache, v_cache, cos, sin, cu_seqlens, cache_seqlens, block_table, batch_idx,
    interleaved, turn_each,
):  # fmt: skip
    """-> (seqused, q turned, or nothing of it without cos); see append_kv.py"""
    tensors = (
        q, k, v, k_cache, v_cache, cos, sin, cu_seqlens, cache_seqlens, block_table, batch_idx,
    )  # fmt: skip
    seqused = torch.empty_like(cache_seqlens)
    q_out = q if cos is None else torch.empty_like(q)

    def build():
        return cache_calls.append_launch(*tensors, q_out, seqused, interleaved, turn_each)

    shapes = ((t.shape, t.dtype, layout(t)) if t is not None else t for t in tensors)
    call(
        memo_of((q.device, interleaved, turn_each, *shapes)), "append", q.device,
        (q, q_out, k, v, k_cache, v_cache), (cos, sin), (cu_seqlens, cache_seqlens, seqused),
        calls.paging_of(k_cache, block_table, batch_idx), build,
    )  # fmt: skip
    if not _captured(q.device) and OVERFLOW.value in seqused.tolist():
        where = "the cache" if block_table is None else "block_table"
        raise RuntimeError(
            f"{where} has no room for all of k and v after cache_seqlens; what has none was not "
            "written: give it more rows, or pages"
        )
    return seqused, q.new_empty(0) if q_out is q else q_out


def _takes_hopper_backward(memo, problem, dout, ordered) -> bool:
    """Whether the kernels for sm_90 serve this problem's gradients."""
    key = "takes_hopper_backward", ordered
    if key not in memo:
        takes = _takes_hopper(memo, problem)
        memo[key] = takes and _hopper_calls().serves_backward(problem, dout, ordered)
    return memo[key] and memo["takes_hopper"]


def _backward_by_hopper(memo, problem, rows, delta, ordered, mods, dq, dk, dv) -> bool:
    """Whether the kernels for sm_90 have been called; not where they do not compile. rows: out,
    dout, lse and dlse; delta: None unless it is wanted; ordered: bitwise repeatable."""
    hopper_calls, device = _hopper_calls(), problem.q.device
    plan = memo.get("backward_plan")
    if plan is None:
        plan = memo["backward_plan"] = hopper_calls.backward_plan(problem)
    tile, parts = plan[:2]
    stats, sums, turns = hopper_calls.workspace(problem, plan)
    name = "hopper_ordered" if ordered else "hopper_backward"
    counters, lengths = _counters(device), problem.lengths()
    of_q = (problem.cu_seqlens_q, problem.seqused_q)
    to_dk, to_dv = dk, dv
    if parts > 1:
        to_dk, to_dv = hopper_calls.partial_grads(problem, parts)
    out, dout, lse, dlse = rows
    try:
        call(
            memo, f"prepare_{name}", device, (out, dout), (lse, dlse, delta, stats, sums, turns),
            of_q, (),
            lambda: hopper_calls.prepare_launch(problem, *rows, delta, stats, sums, turns, tile),
        )  # fmt: skip
        call(
            memo, name, device, (*problem[:3], dout, sums, stats, to_dk, to_dv, to_dk, to_dv),
            (counters, turns), lengths, (mods,),
            lambda: hopper_calls.backward_launch(
                problem, dout, stats, sums, to_dk, to_dv, counters, turns, tile, ordered
            ),
        )  # fmt: skip
    except (TritonError, RuntimeError) as error:
        if name in memo:  # it has run: this is another error
            raise
        _without_hopper(error)
        memo["takes_hopper"] = False
        return False
    call(
        memo, "finish", device, (dq,), (sums, turns), of_q, mods[:1],
        lambda: hopper_calls.finish_launch(problem, sums, turns, dq, tile),
    )  # fmt: skip
    if parts > 1:
        for name, grad, partial in (("sum_dk", dk, to_dk), ("sum_dv", dv, to_dv)):
            call(
                memo, name, device, (grad,), (partial,), (), (),
                lambda grad=grad, partial=partial: hopper_calls.sum_parts_launch(grad, partial),
            )  # fmt: skip
    return True


def _backward_portable(memo, problem, rows, delta, dslope, mods, dq, dk, dv, dq_tile, kv_tile):
    """dq_kernel and dkdv_kernel. rows: out, dout, lse and dlse."""
    device, lengths, others = problem.q.device, problem.lengths(), (mods,)
    out, dout, lse, dlse = rows
    call(
        memo, "dq", device, (*problem[:3], out, dout, dq), (lse, dlse, delta, dslope), lengths,
        others, lambda: calls.dq_launch(problem, dout, dlse, out, lse, dq, delta, dslope, dq_tile),
    )  # fmt: skip
    call(
        memo, "dkdv", device, (*problem[:3], dout, dk, dv), (lse, delta), lengths,
        others, lambda: calls.dkdv_launch(problem, dout, lse, delta, dk, dv, kv_tile),
    )  # fmt: skip


@_on_device
def backward(
    problem, dout, dlse, out, lse, pack=1, wanted=(False,) * 3, dq_tile=None, kv_tile=None,
    memo=None,
):  # fmt: skip
    """-> the gradients of the op schema: of q, k and v, packed as `pack` says, then of those of
    attn_bias, alibi_slopes and s_aux that are `wanted`. memo: that of the forward, or None."""
    grads, (dq, dk, dv) = problem.empty_grads(pack)
    want_bias, want_slopes, want_sink = wanted
    lse = lse.contiguous()
    dlse = None if dlse is None else dlse.contiguous()
    if problem.seqused_q is not None:
        dq.zero_()
    if problem.seqused_k is not None or problem.leftpad_k is not None:
        dk.zero_()
        dv.zero_()
    new = torch.empty_like if problem.seqused_q is None else torch.zeros_like
    delta = new(lse) if want_sink else None
    dout = _by_rows(dout)
    rows = (out, dout, lse, dlse)
    given = memo is not None
    if given:
        memo = memo.setdefault((wanted, layout(dout), dlse is None), {})
    else:
        memo = memo_of((dq_tile, kv_tile, *wanted, *signature(problem, *rows, dq, dk, dv)))
    problem = _readable(problem, memo)
    mods = memo.get("mods") or _mods(problem, memo, given)
    ordered = problem.deterministic or torch.are_deterministic_algorithms_enabled()
    if (
        dq_tile is not None
        or want_bias
        or want_slopes
        or not _takes_hopper_backward(memo, problem, dout, ordered)
        or not _backward_by_hopper(memo, problem, rows, delta, ordered, mods, dq, dk, dv)
    ):
        delta = new(lse) if delta is None else delta
        dslope = new(lse) if want_slopes else None
        _backward_portable(memo, problem, rows, delta, dslope, mods, dq, dk, dv, dq_tile, kv_tile)
    if want_bias:
        dbias = torch.zeros_like(problem.attn_bias, memory_format=torch.contiguous_format)
        if dbias.numel():
            run(calls.dbias_launch(problem, dout, lse, delta, dbias, dq_tile))
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
        run(calls.probs_launch(problem, lse.contiguous(), probs, tile))
    return probs


@_on_device
def rotary(x, out, cos, *options):
    """Turn x by its positions' angles into `out`, which may be x; see rotary.py."""
    if cos.shape[-1] and x.numel():
        run(calls.rotary_launch(x, out, cos, *options))
    return out

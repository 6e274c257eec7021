"""Options: what a public function was asked for beyond its tensors, and the checks of it."""

import math
import numbers
from typing import Any, NamedTuple, Tuple

import torch
from torch import Tensor

from .checks import FLOAT8

ALIGNMENTS = ("bottom-right", "top-left")


class Options(NamedTuple):
    """The options of a public function as the user gave them, unchecked."""

    dropout_p: Any = 0.0
    softmax_scale: Any = None
    causal: Any = False
    window_size: Any = (-1, -1)
    softcap: Any = 0.0
    alibi_slopes: Any = None
    s_aux: Any = None
    learnable_sink: Any = None
    attn_bias: Any = None
    causal_alignment: Any = "bottom-right"
    descales: Tuple[Any, Any, Any] = (None, None, None)
    num_splits: Any = 0
    batch_invariant: Any = False
    deterministic: Any = False


PLAIN = Options()


def checked_fields(q, options: Options, sizes, rng_state, nheads_k):
    """AttentionProblem's fields from attn_bias on; raises what is wrong with the options.

    sizes: batch, nheads, seqlen_q, seqlen_k (None: unknown).
    """
    o = options
    scale = _scale(o.softmax_scale, q.shape[-1])
    if _is_plain(o):  # 4 us of host time sooner
        return (
            None,
            None,
            None,
            None,
            None,
            scale,
            bool(o.causal),
            -1,
            -1,
            False,
            0.0,
            0.0,
            0,
            False,
            bool(o.deterministic),
        )
    batch, nheads = sizes[:2]
    causal, left, right = _window(o.window_size, bool(o.causal))
    if o.causal_alignment not in ALIGNMENTS:
        raise ValueError(f"causal_alignment must be one of {ALIGNMENTS}, got {o.causal_alignment}")
    if o.s_aux is not None and o.learnable_sink is not None:
        raise ValueError("s_aux and learnable_sink are one argument: give one of them")
    dropout_p = _number("dropout_p", o.dropout_p)
    if not 0.0 <= dropout_p < 1.0:
        raise ValueError(f"dropout_p must be at least 0 and less than 1, got {dropout_p}")
    softcap = _number("softcap", o.softcap)
    if not 0.0 <= softcap < math.inf:
        raise ValueError(f"softcap must be at least 0 (0: none) and finite, got {softcap}")
    sink = o.s_aux if o.learnable_sink is None else o.learnable_sink
    if dropout_p > 0.0 and rng_state is None:
        rng_state = torch.randint(-(2**63), 2**63 - 1, (1,), dtype=torch.int64, device=q.device)
    return (
        _attn_bias(o.attn_bias, q, sizes),
        _alibi_slopes(o.alibi_slopes, q, batch, nheads),
        _sink("s_aux" if o.learnable_sink is None else "learnable_sink", sink, q, nheads),
        rng_state if dropout_p > 0.0 else None,
        _descale(o.descales, q, batch, nheads_k),
        scale,
        causal,
        left,
        right,
        o.causal_alignment == "top-left",
        softcap,
        dropout_p,
        _num_splits(o, dropout_p),
        bool(o.batch_invariant),
        bool(o.deterministic),
    )


def _is_plain(options: Options) -> bool:
    """Whether all but softmax_scale, causal and deterministic are as they are by default."""
    o = options
    return (
        type(o.dropout_p) is float and o.dropout_p == 0.0
        and type(o.softcap) is float and o.softcap == 0.0
        and type(o.window_size) is tuple and o.window_size == (-1, -1)
        and o.alibi_slopes is None and o.s_aux is None and o.learnable_sink is None
        and o.attn_bias is None and o.causal_alignment == "bottom-right"
        and not o.num_splits and not o.batch_invariant
        and o.descales[0] is o.descales[1] is o.descales[2] is None
    )  # fmt: skip


def _num_splits(o: Options, dropout_p) -> int:
    if not isinstance(o.num_splits, numbers.Integral) or o.num_splits < 0:
        raise ValueError(f"num_splits must be 0 (as fits) or more, got {o.num_splits}")
    if o.num_splits > 1:
        if dropout_p > 0.0 or o.attn_bias is not None:
            raise NotImplementedError(
                "num_splits over 1 is not implemented with dropout_p or attn_bias; leave it at 0"
            )
        if o.batch_invariant:
            raise ValueError(
                f"batch_invariant chooses the splits itself; num_splits must be 0 or 1, got "
                f"{o.num_splits}"
            )
    return int(o.num_splits)


def _number(name, value):
    if not isinstance(value, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    return float(value)


def _scale(softmax_scale, head_dim) -> float:
    """softmax_scale as a float; None is 1 / sqrt(head_dim)."""
    if softmax_scale is None:
        return head_dim**-0.5
    if isinstance(softmax_scale, Tensor):
        if softmax_scale.numel() != 1:
            raise ValueError(
                f"softmax_scale must be one number, got shape {tuple(softmax_scale.shape)}"
            )
        softmax_scale = softmax_scale.item()
    softmax_scale = _number("softmax_scale", softmax_scale)
    if not torch.compiler.is_compiling() and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return softmax_scale


def _window(window_size, causal):
    """-> (causal, left, right): causal bounds the right by 0 whatever `right` is, and a right bound
    of 0 is causal; -1 where there is no bound."""
    if window_size is None:
        return causal, -1, -1
    if isinstance(window_size, Tensor):
        if window_size.device.type != "cpu":
            raise ValueError(f"window_size must be numbers or on the CPU, got {window_size.device}")
        window_size = window_size.tolist()
    if not isinstance(window_size, (tuple, list)) or len(window_size) != 2:
        raise ValueError(f"window_size must be (left, right), got {window_size}")
    sides = [-1 if side is None else side for side in window_size]
    if not all(isinstance(side, (numbers.Integral, torch.SymInt)) for side in sides):
        raise TypeError(f"window_size must be two integers or None, got {window_size}")
    left, right = (-1 if side < 0 else min(side, 2**30) for side in sides)
    if causal or right == 0:
        return True, left, -1
    return False, left, right


def _on_q_device(name, tensor, q):
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.device != q.device:
        raise ValueError(f"{name} must be on q's device {q.device}, got {tensor.device}")


def _alibi_slopes(slopes, q, batch, nheads):
    if slopes is None:
        return None
    _on_q_device("alibi_slopes", slopes, q)
    if slopes.dtype != torch.float32:
        raise TypeError(f"alibi_slopes must be float32, got {slopes.dtype}")
    shapes = ((nheads,), (batch, nheads))
    if tuple(slopes.shape) not in shapes:
        raise ValueError(
            f"alibi_slopes must have shape (nheads,) or (batch, nheads), {shapes[0]} or "
            f"{shapes[1]}, got {tuple(slopes.shape)}"
        )
    return slopes.contiguous()


def _sink(name, sink, q, nheads):
    if sink is None:
        return None
    _on_q_device(name, sink, q)
    if not sink.is_floating_point():
        raise TypeError(f"{name} must have a floating-point dtype, got {sink.dtype}")
    if tuple(sink.shape) != (nheads,):
        raise ValueError(f"{name} must have shape (nheads,) = ({nheads},), got {tuple(sink.shape)}")
    return sink.contiguous()


def _descale(descales, q, batch, nheads_k):
    """AttentionProblem's from q_descale, k_descale and v_descale."""
    shape = (batch, nheads_k)
    for name, given in zip(("q_descale", "k_descale", "v_descale"), descales):
        if given is None:
            continue
        if q.dtype != FLOAT8:
            raise ValueError(
                f"{name} is for float8 inputs, and q is {q.dtype}: multiply the tensor by it"
            )
        _on_q_device(name, given, q)
        if given.dtype != torch.float32:
            raise TypeError(f"{name} must be float32, got {given.dtype}")
        if tuple(given.shape) != shape:
            raise ValueError(
                f"{name} must have shape (batch, nheads_k) = {shape}, got {tuple(given.shape)}"
            )
    if descales[0] is descales[1] is descales[2] is None:
        return None
    q_scale, k_scale, v_scale = (1.0 if given is None else given for given in descales)
    gains = torch.stack(
        [
            torch.as_tensor(s, dtype=torch.float32, device=q.device).expand(shape)
            for s in (q_scale * k_scale, v_scale)
        ]
    )
    gains[0].clamp_(min=1e-30)  # of a tensor of zeros it may be 0, and 0 times a masked -inf is NaN
    return gains


def _attn_bias(bias, q, sizes):
    """attn_bias with four dimensions, those that are broadcast of size 1; booleans as bytes."""
    if bias is None:
        return None
    _on_q_device("attn_bias", bias, q)
    if bias.dtype != torch.bool and not bias.is_floating_point():
        raise TypeError(f"attn_bias must be floating-point or boolean, got {bias.dtype}")
    names = ("batch", "nheads", "seqlen_q", "seqlen_k")
    if not 1 <= bias.dim() <= 4 or any(
        have != 1 and need is not None and have != need
        for have, need in zip(bias.shape[::-1], sizes[::-1])
    ):
        raise ValueError(
            f"attn_bias must be broadcastable to [{', '.join(names)}] = "
            f"{[n if s is None else s for n, s in zip(names, sizes)]}, got {tuple(bias.shape)}"
        )
    bias = bias[(None,) * (4 - bias.dim())]
    seqlen_k = sizes[3]
    if bias.shape[3] == 1 and seqlen_k != 1:
        if seqlen_k is None:
            raise ValueError(
                "attn_bias must have max_seqlen_k columns, got 1 and a tensor's length"
            )
        bias = bias.expand(-1, -1, -1, seqlen_k)
    return bias.view(torch.uint8) if bias.dtype == torch.bool else bias

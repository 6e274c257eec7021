"""AttentionProblem: one attention call, validated, with its defaults filled in."""

import math
import numbers
from typing import NamedTuple, Optional

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = ("cuda", "xpu", "cpu", "meta")
MAX_HEAD_DIM = 256


class AttentionProblem(NamedTuple):
    """Everything a kernel must know, in the order of the op schemas (torch_binding.h).

    Dense: q [batch, seqlen_q, nheads, head_dim], k [batch, seqlen_k, nheads_k, head_dim],
    v [batch, seqlen_k, nheads_k, head_dim_v]. Packed (varlen): the first two dimensions are one,
    and sequence b lies in rows cu_seqlens[b] to cu_seqlens[b + 1].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Optional[Tensor]
    cu_seqlens_k: Optional[Tensor]
    softmax_scale: float
    causal: bool

    @classmethod
    def dense(cls, q, k, v, softmax_scale=None, causal=False):
        """A batch of sequences of one length each side; raises what is wrong with it."""
        _check_tensors(q, k, v, rank=4, layout="[batch, seqlen, nheads, head_dim]")
        q_shape, k_shape = q.shape, k.shape
        if k_shape[0] != q_shape[0]:
            raise ValueError(f"k must have q's batch size {q_shape[0]}, got {k_shape[0]}")
        return cls(q, k, v, None, None, _scale(softmax_scale, q_shape[-1]), bool(causal))

    @classmethod
    def varlen(cls, q, k, v, cu_seqlens_q, cu_seqlens_k, softmax_scale=None, causal=False):
        """Sequences packed along the rows; cu_seqlens are read on the device, never here."""
        _check_tensors(q, k, v, rank=3, layout="[total, nheads, head_dim]")
        cu_seqlens_q = _cu_seqlens("cu_seqlens_q", cu_seqlens_q, q.device)
        cu_seqlens_k = _cu_seqlens("cu_seqlens_k", cu_seqlens_k, q.device)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                "cu_seqlens_k must have cu_seqlens_q's length, batch + 1 = "
                f"{cu_seqlens_q.shape[0]}, got {cu_seqlens_k.shape[0]}"
            )
        scale = _scale(softmax_scale, q.shape[-1])
        return cls(q, k, v, cu_seqlens_q, cu_seqlens_k, scale, bool(causal))

    def needs_grad(self) -> bool:
        """Whether autograd must record this call."""
        return torch.is_grad_enabled() and (
            self.q.requires_grad or self.k.requires_grad or self.v.requires_grad
        )

    def empty_out(self) -> Tensor:
        """Uninitialised out: q's shape with head_dim_v columns, q's order of dimensions."""
        q, head_dim_v = self.q, self.v.shape[-1]
        if head_dim_v == q.shape[-1]:
            return torch.empty_like(q)
        if q.dim() == 4 and q.stride(2) > q.stride(1):  # heads first in memory
            batch, seqlen, nheads, _ = q.shape
            return q.new_empty((batch, nheads, seqlen, head_dim_v)).transpose(1, 2)
        return q.new_empty((*q.shape[:-1], head_dim_v))

    def empty_lse(self) -> Tensor:
        """Uninitialised lse, float32: [batch, nheads, seqlen_q], packed [nheads, total_q]."""
        *batch, seqlen, nheads, _ = self.q.shape
        return torch.empty((*batch, nheads, seqlen), dtype=torch.float32, device=self.q.device)

    def empty_grads(self):
        """Uninitialised (dq, dk, dv), each like its tensor."""
        return torch.empty_like(self.q), torch.empty_like(self.k), torch.empty_like(self.v)


def _check_tensors(q, k, v, rank, layout):
    """Types, dtypes, devices and shapes that do not depend on dense or packed."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
        if tensor.dim() != rank:
            raise ValueError(
                f"{name} must be {rank}-dimensional {layout}, got shape {tuple(tensor.shape)}"
            )
    dtype, device = q.dtype, q.device
    if dtype not in DTYPES:
        raise TypeError(f"q must be float16, bfloat16 or float32, got {dtype}")
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(f"q, k and v must have one dtype, got {dtype}, {k.dtype} and {v.dtype}")
    if k.device != device or v.device != device:
        raise ValueError(
            f"q, k and v must be on one device, got {device}, {k.device} and {v.device}; "
            "move them with .to()"
        )
    if device.type not in DEVICES:
        raise NotImplementedError(f"q must be on {', '.join(DEVICES)}, got {device}; use .cpu()")
    _check_shapes(q.shape, k.shape, v.shape)
    if not torch.compiler.is_compiling():
        _check_plain(q, k, v)


def _check_shapes(q_shape, k_shape, v_shape):
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(
            "k and v must agree in all but head_dim, got shapes "
            f"{tuple(k_shape)} and {tuple(v_shape)}"
        )
    if k_shape[-1] != q_shape[-1]:
        raise ValueError(f"k must have q's head_dim {q_shape[-1]}, got {k_shape[-1]}")
    for name, shape in (("q", q_shape), ("v", v_shape)):
        if not 1 <= shape[-1] <= MAX_HEAD_DIM:
            raise ValueError(f"{name}'s head_dim must be 1 to {MAX_HEAD_DIM}, got {shape[-1]}")
    nheads, nheads_k = q_shape[-2], k_shape[-2]
    if nheads_k < 1 or nheads < 1 or nheads % nheads_k:
        raise ValueError(
            f"q's number of heads must be a multiple of k's, got {nheads} and {nheads_k}"
        )


def _check_plain(q, k, v):
    """Refuse what would compute something else than was meant: nested, DTensor, vmapped."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.is_nested:
            raise NotImplementedError(
                f"{name} is a nested tensor; pass its values() and offsets() to "
                "flash_attn_varlen_func"
            )
        if type(tensor).__name__ == "DTensor":
            raise NotImplementedError(
                f"{name} is a DTensor; pass to_local() of tensors sharded by batch or heads"
            )
    if torch._C._functorch.peek_interpreter_stack() is not None and any(
        torch._C._functorch.is_batchedtensor(tensor) for tensor in (q, k, v)
    ):
        raise NotImplementedError(
            "flash attention has no vmap rule; fold the mapped dimension into the batch"
        )


def _cu_seqlens(name, cu_seqlens, device):
    """cu_seqlens as the kernels read it: int32, contiguous, on `device`."""
    if not isinstance(cu_seqlens, Tensor):
        raise TypeError(f"{name} must be an int32 tensor, got {type(cu_seqlens).__name__}")
    if cu_seqlens.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {cu_seqlens.dtype}")
    if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] < 1:
        raise ValueError(f"{name} must have shape (batch + 1,), got {tuple(cu_seqlens.shape)}")
    if cu_seqlens.device != device and cu_seqlens.device.type != "cpu":
        raise ValueError(f"{name} must be on {device}, got {cu_seqlens.device}")
    return cu_seqlens.to(device, torch.int32, non_blocking=True).contiguous()


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
    if not isinstance(softmax_scale, (numbers.Real, torch.SymFloat)):
        raise TypeError(f"softmax_scale must be a number, got {type(softmax_scale).__name__}")
    if not torch.compiler.is_compiling() and not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)

"""AttentionProblem: one attention call, validated, with its defaults filled in."""

from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .options import PLAIN, checked_fields

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
DEVICES = ("cuda", "xpu", "cpu", "meta")
MAX_HEAD_DIM = 512


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
    seqused_q: Optional[Tensor]  # (batch,) int32: rows of each sequence that count
    seqused_k: Optional[Tensor]
    leftpad_k: Optional[Tensor]  # (batch,) int32: rows of each sequence of k to skip
    attn_bias: Optional[Tensor]  # [batch | 1, nheads | 1, seqlen_q | 1, seqlen_k]; bytes: boolean
    alibi_slopes: Optional[Tensor]  # (nheads,) or (batch, nheads) float32
    s_aux: Optional[Tensor]  # (nheads,): each row's score without a value
    rng_state: Optional[Tensor]  # (1,) int64: dropout's seed
    softmax_scale: float
    causal: bool  # keys beyond the diagonal are not seen
    window_left: int  # keys before the diagonal that are seen; -1: all
    window_right: int  # keys beyond it; -1: all, or as causal says
    top_left: bool  # the diagonal begins at key 0, not at seqlen_k - seqlen_q
    softcap: float  # 0: none
    dropout_p: float

    @classmethod
    def dense(cls, q, k, v, options=PLAIN, rng_state=None):
        """A batch of sequences of one length each side; raises what is wrong with it."""
        _check_tensors(q, k, v, rank=4, layout="[batch, seqlen, nheads, head_dim]")
        q_shape, k_shape = q.shape, k.shape
        if k_shape[0] != q_shape[0]:
            raise ValueError(f"k must have q's batch size {q_shape[0]}, got {k_shape[0]}")
        lengths = (None,) * 5
        sizes = (q_shape[0], q_shape[2], q_shape[1], k_shape[1])
        return cls(q, k, v, *lengths, *checked_fields(q, options, sizes, rng_state))

    @classmethod
    def varlen(
        cls, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None,
        options=PLAIN, seqused_q=None, seqused_k=None, leftpad_k=None, rng_state=None,
    ):  # fmt: skip
        """Sequences packed along the rows; cu_seqlens are read on the device, never here."""
        _check_tensors(q, k, v, rank=3, layout="[total, nheads, head_dim]")
        cu_seqlens_q = _lengths("cu_seqlens_q", cu_seqlens_q, q.device)
        cu_seqlens_k = _lengths("cu_seqlens_k", cu_seqlens_k, q.device)
        if cu_seqlens_q.shape != cu_seqlens_k.shape:
            raise ValueError(
                "cu_seqlens_k must have cu_seqlens_q's length, batch + 1 = "
                f"{cu_seqlens_q.shape[0]}, got {cu_seqlens_k.shape[0]}"
            )
        batch = cu_seqlens_q.shape[0] - 1
        per_sequence = [
            None if lengths is None else _lengths(name, lengths, q.device, batch)
            for name, lengths in (
                ("seqused_q", seqused_q), ("seqused_k", seqused_k), ("leftpad_k", leftpad_k),
            )
        ]  # fmt: skip
        sizes = (batch, q.shape[1], _known(max_seqlen_q), _known(max_seqlen_k))
        fields = checked_fields(q, options, sizes, rng_state)
        return cls(q, k, v, cu_seqlens_q, cu_seqlens_k, *per_sequence, *fields)

    def tensors(self):
        """The fields that are tensors or None."""
        return self[:12]

    def lengths(self):
        """cu_seqlens_q to leftpad_k."""
        return self[3:8]

    def differentiable(self):
        """attn_bias, alibi_slopes and s_aux: what besides q, k and v may want a gradient."""
        return self[8:11]

    def weight(self) -> str:
        """How many registers the options take, for the choice of tiles: '', 'bias', 'dropout', or
        'mods' for these with another one; softcap and ALiBi take few, but for softcap in float32,
        which is more precise (compile report)."""
        bias, dropout = self.attn_bias is not None, self.dropout_p > 0.0
        if not (bias or dropout):
            precise = self.softcap > 0.0 and self.q.dtype == torch.float32
            return "mods" if precise else ""
        if (bias and dropout) or self.softcap > 0.0 or self.alibi_slopes is not None:
            return "mods"
        return "bias" if bias else "dropout"

    def has_mods(self) -> bool:
        """Whether any option is set that plain full and causal attention have not."""
        return (
            self.window_left >= 0
            or self.window_right >= 0
            or self.top_left
            or self.s_aux is not None
            or self.seqused_q is not None
            or self.seqused_k is not None
            or self.leftpad_k is not None
            or self.softcap > 0.0
            or self.dropout_p > 0.0
            or self.alibi_slopes is not None
            or self.attn_bias is not None
        )

    def needs_grad(self) -> bool:
        """Whether autograd must record this call."""
        return torch.is_grad_enabled() and (
            self.q.requires_grad
            or self.k.requires_grad
            or self.v.requires_grad
            or (self.attn_bias is not None and self.attn_bias.requires_grad)
            or (self.alibi_slopes is not None and self.alibi_slopes.requires_grad)
            or (self.s_aux is not None and self.s_aux.requires_grad)
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

    def empty_probs(self, max_seqlen_q, max_seqlen_k) -> Tensor:
        """Uninitialised probabilities [batch, nheads, max_seqlen_q, max_seqlen_k]."""
        cu = self.cu_seqlens_q
        batch = self.q.shape[0] if cu is None else cu.shape[0] - 1
        return self.q.new_empty((batch, self.q.shape[-2], max_seqlen_q, max_seqlen_k))

    def empty_grads(self, pack=1):
        """Uninitialised -> ([dq, dk, dv], [dq, dkv] or [dqkv], (dq, dk, dv) as views of them)."""
        q, k, v = self[:3]
        if pack == 3:
            dqkv = q.new_empty((*q.shape[:-2], 3, *q.shape[-2:]))
            return [dqkv], dqkv.unbind(-3)
        if pack == 2:
            dkv = k.new_empty((*k.shape[:-2], 2, *k.shape[-2:]))
            dq = torch.empty_like(q)
            return [dq, dkv], (dq, *dkv.unbind(-3))
        grads = [torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)]
        return grads, tuple(grads)

    def empty_mod_grads(self, wanted):
        """Uninitialised gradients of those of `differentiable` that are wanted."""
        return [
            torch.empty_like(tensor, memory_format=torch.contiguous_format)
            for tensor, flag in zip(self.differentiable(), wanted)
            if flag
        ]

    def slopes_grad(self, dslope) -> Tensor:
        """alibi_slopes' gradient from each row's part of it, shaped like lse."""
        if self.cu_seqlens_q is None:
            grad = dslope.sum(2)  # [batch, nheads]
        elif self.alibi_slopes.dim() == 1:
            return dslope.sum(1)
        else:
            ends = self.cu_seqlens_q.long().clamp(0, dslope.shape[1])
            rows = dslope.t().contiguous()
            grad = torch.segment_reduce(rows, "sum", offsets=ends, axis=0, initial=0.0)
        return grad.sum(0) if self.alibi_slopes.dim() == 1 else grad

    def sink_grad(self, lse, delta) -> Tensor:
        """s_aux's gradient: the sink's probability, exp(s_aux - lse), has no value to add, so that
        each row gives -exp(s_aux - lse) * delta, delta = rowsum(dO * O) - dlse."""
        heads = self.s_aux.float().unsqueeze(-1)  # [nheads, 1]: lse ends in [nheads, rows]
        parts = -(torch.exp(heads - lse) * delta).sum(-1)
        return (parts if self.cu_seqlens_q is not None else parts.sum(0)).to(self.s_aux.dtype)


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
        if "float8" in str(dtype):
            raise NotImplementedError(f"q is {dtype}, not implemented yet; cast it to bfloat16")
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


def _lengths(name, lengths, device, batch=None):
    """cu_seqlens (batch + 1,), or one length per sequence if `batch` is given, as the kernels read
    them: int32, contiguous, on `device`."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be an int32 tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {lengths.dtype}")
    if batch is not None and tuple(lengths.shape) != (batch,):
        raise ValueError(
            f"{name} must have shape (batch,) = ({batch},), got {tuple(lengths.shape)}"
        )
    if batch is None and (lengths.dim() != 1 or lengths.shape[0] < 1):
        raise ValueError(f"{name} must have shape (batch + 1,), got {tuple(lengths.shape)}")
    if lengths.device != device and lengths.device.type != "cpu":
        raise ValueError(f"{name} must be on {device}, got {lengths.device}")
    return lengths.to(device, torch.int32, non_blocking=True).contiguous()


def _known(max_seqlen):
    """max_seqlen if it is a number that can be had without waiting for a device."""
    return max_seqlen if isinstance(max_seqlen, (int, torch.SymInt)) else None

"""AttentionProblem: one attention call, validated, with its defaults filled in."""

import numbers
from typing import NamedTuple, Optional

import torch
from torch import Tensor

from .checks import (
    FLOAT8,
    MAX_CACHE_HEAD_DIM,
    MAX_HEAD_DIM,
    check_cache,
    check_no_grad,
    check_tensors,
    int32_lengths,
    int32_table,
    known,
)
from .options import PLAIN, checked_fields


class AttentionProblem(NamedTuple):
    """Everything a kernel must know, in the order of the op schemas (torch_binding.h).

    Dense: q [batch, seqlen_q, nheads, head_dim], k [batch, seqlen_k, nheads_k, head_dim],
    v [batch, seqlen_k, nheads_k, head_dim_v]. Packed (varlen): the first two dimensions are one,
    and sequence b lies in rows cu_seqlens[b] to cu_seqlens[b + 1]. A cache of k and v is dense
    whatever q is; paged, k is [pages, page_size, nheads_k, head_dim].
    """

    q: Tensor
    k: Tensor
    v: Tensor
    cu_seqlens_q: Optional[Tensor]
    cu_seqlens_k: Optional[Tensor]
    seqused_q: Optional[Tensor]  # (batch,) int32: rows of each sequence that count
    seqused_k: Optional[Tensor]
    leftpad_k: Optional[Tensor]  # (batch,) int32: rows of each sequence of k to skip
    block_table: Optional[Tensor]  # [batch, columns] int32: the pages of k and v of each sequence
    cache_batch_idx: Optional[Tensor]  # (batch,) int32: which k[i], v[i] are a sequence's
    attn_bias: Optional[Tensor]  # [batch | 1, nheads | 1, seqlen_q | 1, seqlen_k]; bytes: boolean
    alibi_slopes: Optional[Tensor]  # (nheads,) or (batch, nheads) float32
    s_aux: Optional[Tensor]  # (nheads,): each row's score without a value
    rng_state: Optional[Tensor]  # (1,) int64: dropout's seed
    descale: Optional[Tensor]  # [2, batch, nheads_k] float32: float8's products, and values, times
    softmax_scale: float
    causal: bool  # keys beyond the diagonal are not seen
    window_left: int  # keys before the diagonal that are seen; -1: all
    window_right: int  # keys beyond it; -1: all, or as causal says
    top_left: bool  # the diagonal begins at key 0, not at seqlen_k - seqlen_q
    softcap: float  # 0: none
    dropout_p: float
    num_splits: int  # parts of the keys that are computed apart; 0: as fills the device
    batch_invariant: bool  # no bit of a sequence's result depends on the others
    deterministic: bool  # every gradient is bitwise repeatable
    max_seqlen_q: int  # packed: the longest sequence, as the caller says; 0: unknown

    @classmethod
    def dense(cls, q, k, v, options=PLAIN, rng_state=None):
        """A batch of sequences of one length each side; raises what is wrong with it."""
        check_tensors(q, k, v, rank=4, layout="[batch, seqlen, nheads, head_dim]")
        q_shape, k_shape = q.shape, k.shape
        if k_shape[0] != q_shape[0]:
            raise ValueError(f"k must have q's batch size {q_shape[0]}, got {k_shape[0]}")
        lengths = (None,) * 7
        sizes = (q_shape[0], q_shape[2], q_shape[1], k_shape[1])
        fields = checked_fields(q, options, sizes, rng_state, k_shape[2])
        problem = cls(q, k, v, *lengths, *fields, 0)
        return problem if q.dtype != FLOAT8 else problem.checked_float8()

    @classmethod
    def varlen(
        cls, q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q=None, max_seqlen_k=None,
        options=PLAIN, seqused_q=None, seqused_k=None, leftpad_k=None, rng_state=None,
        block_table=None,
    ):  # fmt: skip
        """Sequences packed along the rows; cu_seqlens are read on the device, never here."""
        if block_table is None:
            check_tensors(q, k, v, rank=3, layout="[total, nheads, head_dim]")
        else:
            check_cache(q, k, v, ("k", "v"), 3, "[total, nheads, head_dim]", MAX_HEAD_DIM)
        device = q.device
        cu_seqlens_q = int32_lengths("cu_seqlens_q", cu_seqlens_q, device)
        batch = cu_seqlens_q.shape[0] - 1
        if cu_seqlens_k is not None or block_table is None or seqused_k is None:
            cu_seqlens_k = int32_lengths("cu_seqlens_k", cu_seqlens_k, device)
            if cu_seqlens_q.shape != cu_seqlens_k.shape:
                raise ValueError(
                    "cu_seqlens_k must have cu_seqlens_q's length, batch + 1 = "
                    f"{batch + 1}, got {cu_seqlens_k.shape[0]}"
                )
        per_sequence = [
            None if lengths is None else int32_lengths(name, lengths, device, batch)
            for name, lengths in (
                ("seqused_q", seqused_q), ("seqused_k", seqused_k), ("leftpad_k", leftpad_k),
            )
        ]  # fmt: skip
        if block_table is not None:
            block_table = int32_table("block_table", block_table, device, batch)
        sizes = (batch, q.shape[1], known(max_seqlen_q), known(max_seqlen_k))
        fields = checked_fields(q, options, sizes, rng_state, k.shape[-2])
        cu_seqlens = (cu_seqlens_q, cu_seqlens_k)
        problem = cls(
            q, k, v, *cu_seqlens, *per_sequence, block_table, None, *fields, sizes[2] or 0
        )
        if block_table is not None:
            check_no_grad(problem, "block_table")
        return problem if q.dtype != FLOAT8 else problem.checked_float8()

    @classmethod
    def kvcache(
        cls, q, k_cache, v_cache, options=PLAIN, cache_seqlens=None, cache_batch_idx=None,
        cache_leftpad=None, block_table=None, cu_seqlens_q=None, max_seqlen_q=None,
        table_name="block_table",
    ):  # fmt: skip
        """Queries, dense or packed, to a cache of which sequence b fills cache_seqlens[b] rows."""
        rank, layout = (4, "[batch, seqlen, nheads, head_dim]")
        if cu_seqlens_q is not None:
            rank, layout = (3, "[total, nheads, head_dim]")
        names = ("k_cache", "v_cache")
        check_cache(q, k_cache, v_cache, names, rank, layout, MAX_CACHE_HEAD_DIM)
        device, entries = q.device, k_cache.shape[0]
        if cu_seqlens_q is not None:
            cu_seqlens_q = int32_lengths("cu_seqlens_q", cu_seqlens_q, device)
        batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
        if block_table is not None:
            if cache_batch_idx is not None:
                raise ValueError(
                    f"cache_batch_idx and {table_name} both say where the cache is: give one"
                )
            block_table = int32_table(table_name, block_table, device, batch)
        elif cache_batch_idx is not None:
            cache_batch_idx = int32_lengths("cache_batch_idx", cache_batch_idx, device, batch)
        elif entries < batch:
            raise ValueError(
                f"k_cache must have an entry per sequence, {batch}, got {entries}; or say which "
                "are theirs with cache_batch_idx"
            )
        if cache_leftpad is not None:
            cache_leftpad = int32_lengths("cache_leftpad", cache_leftpad, device, batch)
        sizes = (batch, q.shape[-2], None, None)
        fields = checked_fields(q, options, sizes, None, k_cache.shape[-2])
        lengths = (cu_seqlens_q, None, None, None, cache_leftpad)
        where = (block_table, cache_batch_idx)
        problem = cls(q, k_cache, v_cache, *lengths, *where, *fields, known(max_seqlen_q) or 0)
        check_no_grad(problem, "a KV cache")
        return problem.with_cache_seqlens(cache_seqlens)

    def checked_float8(self) -> "AttentionProblem":
        """The problem, which is float8's; raises what that cannot be asked for."""
        check_no_grad(self, "float8")
        if self.dropout_p:
            raise NotImplementedError(
                f"dropout_p must be 0.0 with float8, got {self.dropout_p}; cast q, k, v to bfloat16"
            )
        return self

    def with_cache_seqlens(self, cache_seqlens):
        """The problem of which sequence b has cache_seqlens[b] keys, or as many each, or all."""
        batch, device = self.batch(), self.q.device
        if cache_seqlens is None:
            if self.cu_seqlens_q is None:
                return self
            cache_seqlens = self.rows_k()
        if isinstance(cache_seqlens, (numbers.Integral, torch.SymInt)):
            if cache_seqlens < 0 or cache_seqlens > self.rows_k():
                raise ValueError(
                    f"cache_seqlens must be 0 to the cache's {self.rows_k()} rows, got "
                    f"{cache_seqlens}"
                )
            cache_seqlens = torch.full((batch,), cache_seqlens, dtype=torch.int32, device=device)
        return self._replace(seqused_k=int32_lengths("cache_seqlens", cache_seqlens, device, batch))

    def batch(self):
        """How many sequences there are."""
        cu_seqlens = self.cu_seqlens_q
        return self.q.shape[0] if cu_seqlens is None else cu_seqlens.shape[0] - 1

    def rows_k(self):
        """The rows that K's sequences are counted in: of one of them, packed of all."""
        if self.block_table is not None:
            return self.block_table.shape[1] * self.k.shape[1]
        return self.k.shape[1] if self.k.dim() == 4 else self.k.shape[0]

    def rows_per_kv_head(self):
        """Queries times heads of a group of the longest sequence; None if that is unknown."""
        longest = self.q.shape[1] if self.cu_seqlens_q is None else 1 << self.size_class() >> 1
        return longest * (self.q.shape[-2] // self.k.shape[-2]) or None

    def size_class(self):
        """Packed: which power of two max_seqlen_q comes next to, from 1 on; 0: unknown."""
        return (self.max_seqlen_q - 1).bit_length() + 1 if self.max_seqlen_q > 0 else 0

    def invariant(self) -> bool:
        """Whether a sequence's result must not depend on the batch, not in a bit."""
        return self.batch_invariant or self.num_splits == 1

    def is_masked(self) -> bool:
        """Whether some queries see other keys than others."""
        return self.causal or self.window_left >= 0 or self.window_right >= 0

    def tensors(self):
        """The fields that are tensors or None."""
        return self[:15]

    def lengths(self):
        """cu_seqlens_q to leftpad_k."""
        return self[3:8]

    def pages(self):
        """block_table and cache_batch_idx."""
        return self[8:10]

    def differentiable(self):
        """attn_bias, alibi_slopes and s_aux: what besides q, k and v may want a gradient."""
        return self[10:13]

    def modifiers(self):
        """The scalars from causal on."""
        return self[16:]

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
            or self.block_table is not None
            or self.cache_batch_idx is not None
            or self.num_splits > 0
            or self.batch_invariant
            or self.softcap > 0.0
            or self.dropout_p > 0.0
            or self.alibi_slopes is not None
            or self.attn_bias is not None
            or self.descale is not None
        )

    def is_float8(self) -> bool:
        """Whether q, k and v are eight-bit numbers."""
        return self.q.dtype == FLOAT8

    def gains(self) -> Tensor:
        """descale of every query head: [2, batch, nheads] float32, 1 where it is not given."""
        nheads, nheads_k = self.q.shape[-2], self.k.shape[-2]
        if self.descale is None:
            sizes = (2, self.batch(), nheads)
            return torch.ones(sizes, dtype=torch.float32, device=self.q.device)
        group = nheads // nheads_k
        return self.descale if group == 1 else self.descale.repeat_interleave(group, 2)

    def dequantized(self, dtype) -> "AttentionProblem":
        """float8's problem in another dtype, its k and v times descale."""
        q, k, v = (tensor.float() for tensor in self[:3])
        if self.descale is not None:
            gains = self.descale.unsqueeze(-1)  # [2, batch, nheads_k, 1]
            if self.cu_seqlens_k is None:
                gains = gains.unsqueeze(2)
            else:
                rows = torch.arange(k.shape[0], device=k.device, dtype=torch.int32)
                seqs = torch.searchsorted(self.cu_seqlens_k[1:], rows, right=True)
                gains = gains[:, seqs.clamp(max=gains.shape[1] - 1)]
            k, v = k * gains[0], v * gains[1]
        return self._replace(q=q.to(dtype), k=k.to(dtype), v=v.to(dtype), descale=None)

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
        """Uninitialised out: q's shape with head_dim_v columns; in memory q's order of dimensions,
        but for the columns, which lie next to each other."""
        q, head_dim_v = self.q, self.v.shape[-1]
        if self.is_float8():
            return q.new_empty((*q.shape[:-1], head_dim_v), dtype=torch.bfloat16)
        if q.stride(-1) > 1:
            return q.new_empty((*q.shape[:-1], head_dim_v))
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
        sizes = (self.batch(), self.q.shape[-2], max_seqlen_q, max_seqlen_k)
        return self.q.new_empty(sizes)

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

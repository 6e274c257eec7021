"""The CPU implementation: the same blockwise algorithm in torch, O(seqlen) memory.

Tensors are taken apart into sequences, a sequence into blocks of queries and keys; a block is one
batched product over the KV heads, with the query heads of a group stacked along its rows. All
arithmetic is float32.
"""

from typing import NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from . import cpu_cache

BLOCK_M = 256  # query rows per step
BLOCK_N = 512  # keys per step; 256 x 512 scores per head stay in a core's L2
MAX_HEADS = 256  # of all the sequences taken at once: bounds the scores at 128 MiB
PHILOX_ROUNDS = 7
WORD = 0xFFFFFFFF


class Part(NamedTuple):
    """The sequences taken at once: packed, one; dense, as many as MAX_HEADS allows."""

    seqs: slice  # which sequences
    rows_q: slice  # of q's first dimension
    rows_k: slice


def _parts(problem):
    packed = problem.cu_seqlens_q is not None
    if not packed and not _cached(problem):
        batch, _, nheads, _ = problem.q.shape
        return [Part(seqs, seqs, seqs) for seqs in _blocks(batch, max(MAX_HEADS // nheads, 1))]
    batch = problem.batch()
    bounds_q = [(b, b + 1) for b in range(batch)]
    if packed:
        ends = problem.cu_seqlens_q.clamp(0, problem.q.shape[0]).tolist()
        bounds_q = zip(ends, ends[1:])
    parts = []
    for b, (bounds, (first, last)) in enumerate(zip(bounds_q, _bounds_k(problem))):
        rows_q = _used(*bounds, problem.seqused_q, None, b)
        rows_k = _used(first, last, problem.seqused_k, problem.leftpad_k, b)
        parts.append(Part(slice(b, b + 1), rows_q, rows_k))
    return parts


def _cached(problem):
    """Whether K is a cache, whose sequences are counted each from its row 0."""
    return problem.k.dim() == 4 and (
        problem.q.dim() == 3
        or problem.seqused_k is not None
        or problem.leftpad_k is not None
        or problem.block_table is not None
        or problem.cache_batch_idx is not None
    )


def _bounds_k(problem):
    """The rows of K, or of a sequence's cache, that each sequence has at most."""
    batch, rows_k = problem.batch(), problem.rows_k()
    if problem.cu_seqlens_k is None:
        return [(0, rows_k)] * batch
    ends = problem.cu_seqlens_k.tolist()
    if _cached(problem):
        return [(0, min(max(last - first, 0), rows_k)) for first, last in zip(ends, ends[1:])]
    ends = [min(max(end, 0), rows_k) for end in ends]
    return list(zip(ends, ends[1:]))


def _used(first, last, seqused, leftpad, b):
    """The rows [first, last) of sequence b, less those that do not count."""
    if seqused is not None:
        last = min(last, first + max(int(seqused[b]), 0))
    if leftpad is not None:
        first = min(last, first + max(int(leftpad[b]), 0))
    return slice(first, last)


def _keys_by_kv_head(problem, tensor, part):
    """K's or V's rows of a Part -> [batch, nheads_k, 1, seqlen, d]"""
    nheads_k = problem.k.shape[-2]
    if not _cached(problem):
        return _by_kv_head(tensor, part.rows_k, nheads_k)
    rows = cpu_cache.rows_of(problem, tensor, part.seqs.start, part.rows_k)
    return _by_kv_head(rows, slice(None), nheads_k)


def _by_kv_head(tensor, rows, nheads_k):
    """[..., seqlen, heads, d] -> view [batch, nheads_k, group, seqlen, d] of the given rows."""
    tensor = tensor[rows] if tensor.dim() == 4 else tensor[rows].unsqueeze(0)
    return tensor.unflatten(2, (nheads_k, -1)).permute(0, 2, 3, 1, 4)


def _rows_by_kv_head(tensor, rows, nheads_k):
    """[batch, heads, seqlen] or [heads, total] -> view [batch, nheads_k, group, seqlen]."""
    tensor = tensor[rows] if tensor.dim() == 3 else tensor[:, rows].unsqueeze(0)
    return tensor.unflatten(1, (nheads_k, -1))


def _blocks(seqlen, block):
    return [slice(start, min(start + block, seqlen)) for start in range(0, seqlen, block)]


def _stack(tensor):
    """[batch, nheads_k, group, m, d] -> float32 [batch, nheads_k, group * m, d]"""
    return tensor.float().flatten(2, 3)


class Scores:
    """The scores of one Part, block by block, with everything that changes them."""

    def __init__(self, problem, part, seqlen_q, seqlen_k):
        self.problem = problem
        self.part = part
        self.seqlen_k = seqlen_k
        self.shift = 0 if problem.top_left else seqlen_k - seqlen_q
        self.heads = (problem.k.shape[-2], problem.q.shape[-2] // problem.k.shape[-2])
        self.right = 0 if problem.causal else problem.window_right
        self.slopes = self.by_head(problem.alibi_slopes)

    def by_head(self, tensor):
        """(nheads,) or (batch, nheads) -> [batch or 1, nheads_k, group, 1, 1]"""
        if tensor is None:
            return None
        tensor = tensor[self.part.seqs] if tensor.dim() == 2 else tensor[None]
        return tensor.float().unflatten(1, self.heads)[..., None, None]

    def kv_blocks(self, rows):
        """The blocks of keys that the query block `rows` sees."""
        begin, end = 0, self.seqlen_k
        if self.right >= 0:
            end = max(min(end, rows.stop + self.shift + self.right), 0)
        if self.problem.window_left >= 0:
            begin = max(rows.start + self.shift - self.problem.window_left, 0)
        begin = begin // BLOCK_N * BLOCK_N
        return [slice(start, min(start + BLOCK_N, end)) for start in range(begin, end, BLOCK_N)]

    def distance(self, rows, cols):
        """i + shift - j, [m, n]"""
        i = torch.arange(rows.start, rows.stop).unsqueeze(1)
        return i + self.shift - torch.arange(cols.start, cols.stop)

    def products(self, q_rows, k_cols, rows):
        """softmax_scale * QKᵀ, [batch, nheads_k, group, m, n]"""
        products = (q_rows @ k_cols.transpose(-1, -2)).mul_(self.problem.softmax_scale)
        return products.unflatten(2, (-1, rows.stop - rows.start))

    def __call__(self, products, rows, cols):
        """Products -> scores in natural-log units, -inf where the mask hides the key."""
        scores, softcap = products, self.problem.softcap
        distance = self.distance(rows, cols)
        if softcap:
            scores = torch.tanh(scores / softcap) * softcap
        if self.slopes is not None:
            scores = scores - self.slopes * distance.abs()
        if self.problem.attn_bias is not None:
            scores = self.add_bias(scores, rows, cols)
        hidden = torch.zeros_like(distance, dtype=torch.bool)
        if self.right >= 0:
            hidden |= distance < -self.right
        if self.problem.window_left >= 0:
            hidden |= distance > self.problem.window_left
        return scores.masked_fill(hidden, float("-inf")) if hidden.any() else scores

    def bias_index(self, rows, cols):
        """Where in attn_bias a block lies; dimensions of size 1 are shared."""
        sizes = self.problem.attn_bias.shape
        full = (self.part.seqs, slice(None), rows, cols)
        return tuple(slice(None) if size == 1 else index for size, index in zip(sizes, full))

    def add_bias(self, scores, rows, cols):
        bias = self.problem.attn_bias[self.bias_index(rows, cols)]
        missing = [0, cols.stop - cols.start - bias.shape[3], 0, 0]  # past its end it is 0, or True
        if bias.shape[2] != 1:
            missing[3] = rows.stop - rows.start - bias.shape[2]
        bias = F.pad(bias, missing, value=int(bias.dtype == torch.uint8))
        heads = self.heads if bias.shape[1] != 1 else (1, 1)
        bias = bias.unflatten(1, heads)
        if bias.dtype == torch.uint8:
            return scores.masked_fill(bias == 0, float("-inf"))
        return scores + bias.float()

    def product_grad(self, ds, products):
        """Gradient of the products from that of the scores."""
        if not self.problem.softcap:
            return ds
        return ds * (1.0 - torch.tanh(products / self.problem.softcap) ** 2)

    def dropout(self, values, rows, cols):
        """`values` where dropout keeps the pair, divided by the chance of that, and 0 elsewhere."""
        p = self.problem.dropout_p
        if not p:
            return values
        return values * self.kept(rows, cols) * (1.0 / (1.0 - p))

    def kept(self, rows, cols):
        """Which pairs dropout keeps: Philox on (query, key, head, sequence), as in scores.py."""
        q = torch.arange(rows.start, rows.stop).unsqueeze(1)
        k = torch.arange(cols.start, cols.stop)
        head = torch.arange(self.problem.q.shape[-2]).view(*self.heads, 1, 1)
        seq = torch.arange(self.part.seqs.start, self.part.seqs.stop).view(-1, 1, 1, 1, 1)
        words = torch.stack(_philox(self.problem.rng_state, q & ~8, k & ~8, head, seq))
        which = ((q & 8) // 4 + (k & 8) // 8).expand(words.shape[1:])
        word = words.gather(0, which.unsqueeze(0))[0]
        below = min(round(self.problem.dropout_p * 2**32), WORD) - 2**31
        return ((word + 2**31) & WORD) - 2**31 >= below  # the word as int32


def _philox(seed, *counters):
    """Philox4x32 (Salmon et al. 2011) of four counters -> four 32-bit numbers in int64."""
    c0, c1, c2, c3 = torch.broadcast_tensors(*counters)
    key0, key1 = seed[0] & WORD, (seed[0] >> 32) & WORD
    for _ in range(PHILOX_ROUNDS):
        low, high = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wrap around, which leaves all 64 bits right
        c0, c2 = ((high >> 32) & WORD) ^ c1 ^ key0, ((low >> 32) & WORD) ^ c3 ^ key1
        c1, c3 = high & WORD, low & WORD
        key0, key1 = (key0 + 0x9E3779B9) & WORD, (key1 + 0xBB67AE85) & WORD
    return c0, c1, c2, c3


@torch.autocast("cpu", enabled=False)  # the caller's autocast would take the float32 products
def forward(problem):
    """-> (out, lse), as the op schema says."""
    out, lse = problem.empty_out().zero_(), problem.empty_lse().fill_(float("inf"))
    nheads_k = problem.k.shape[-2]
    for part in _parts(problem):
        _forward_part(
            problem,
            part,
            _by_kv_head(problem.q, part.rows_q, nheads_k),
            _keys_by_kv_head(problem, problem.k, part),
            _keys_by_kv_head(problem, problem.v, part),
            _by_kv_head(out, part.rows_q, nheads_k),
            _rows_by_kv_head(lse, part.rows_q, nheads_k),
        )
    return out, lse


def _forward_part(problem, part, q, k, v, out, lse):
    seqlen_q, seqlen_k = q.shape[3], k.shape[3]
    score = Scores(problem, part, seqlen_q, seqlen_k)
    sink = score.by_head(problem.s_aux)
    for rows in _blocks(seqlen_q, BLOCK_M):
        q_rows = _stack(q[:, :, :, rows])
        m_i = lse.new_full(lse[..., rows].shape, float("-inf"))  # [batch, nheads_k, group, m]
        l_i = torch.zeros_like(m_i)
        if sink is not None:
            m_i.copy_(sink[..., 0].expand_as(m_i))
            l_i += (m_i != float("-inf")).float()
        acc = torch.zeros((*m_i.shape, v.shape[-1]))
        for cols in score.kv_blocks(rows):
            products = score.products(q_rows, _stack(k[:, :, :, cols]), rows)
            scores = score(products, rows, cols)
            m_new = torch.maximum(m_i, scores.amax(-1))
            m_ref = m_new.masked_fill(m_new == float("-inf"), 0.0)  # no key yet: no -inf - -inf
            p = (scores - m_ref.unsqueeze(-1)).exp_()
            alpha = (m_i - m_ref).exp_()
            l_i = l_i.mul_(alpha).add_(p.sum(-1))
            p = score.dropout(p, rows, cols)
            update = p.flatten(2, 3) @ _stack(v[:, :, :, cols])
            acc = acc.mul_(alpha.unsqueeze(-1)).add_(update.view_as(acc))
            m_i = m_new
        empty = l_i == 0.0
        out[:, :, :, rows] = (acc / l_i.masked_fill(empty, 1.0).unsqueeze(-1)).to(out.dtype)
        lse[..., rows] = (m_i + l_i.log()).masked_fill_(empty, float("inf"))


class RowSums(NamedTuple):
    """What backward leaves per row, shaped like lse."""

    delta: Tensor
    dslope: Optional[Tensor]


@torch.autocast("cpu", enabled=False)
def backward(problem, dout, dlse, out, lse, pack=1, wanted=(False,) * 3):
    """-> the gradients, as the op schema says."""
    grads, views = problem.empty_grads(pack)
    for grad in grads:
        grad.zero_()
    want_bias, want_slopes, want_sink = wanted
    dbias = torch.zeros(problem.attn_bias.shape) if want_bias else None
    sums = RowSums(torch.zeros_like(lse), torch.zeros_like(lse) if want_slopes else None)
    nheads_k = problem.k.shape[-2]
    for part in _parts(problem):
        q, dout_, out_, dq = (
            _by_kv_head(tensor, part.rows_q, nheads_k)
            for tensor in (problem.q, dout, out, views[0])
        )
        k, v, dk, dv = (
            _by_kv_head(tensor, part.rows_k, nheads_k)[:, :, 0]  # one head per group: drop `group`
            for tensor in (problem.k, problem.v, *views[1:])
        )
        rows = [
            None if tensor is None else _rows_by_kv_head(tensor, part.rows_q, nheads_k)
            for tensor in (lse, dlse, *sums)
        ]
        _backward_part(
            problem, part, (q, k, v), (out_, dout_), rows[:2], RowSums(*rows[2:]), (dq, dk, dv),
            dbias,
        )  # fmt: skip
    if want_bias:
        grads.append(dbias.to(problem.attn_bias.dtype))
    if want_slopes:
        grads.append(problem.slopes_grad(sums.dslope))
    if want_sink:
        grads.append(problem.sink_grad(lse, sums.delta))
    return grads


def _backward_part(problem, part, qkv, outs, lses, sums, grads, dbias):
    """q, out, dout, dq [batch, nheads_k, group, seqlen_q, d]; k, v, dk, dv [.., seqlen_k, d]."""
    (q, k, v), (out, dout), (lse, dlse), (dq, dk, dv) = qkv, outs, lses, grads
    seqlen_q, seqlen_k = q.shape[3], k.shape[2]
    score = Scores(problem, part, seqlen_q, seqlen_k)
    dk_acc, dv_acc = torch.zeros(dk.shape), torch.zeros(dv.shape)
    for rows in _blocks(seqlen_q, BLOCK_M):
        q_rows, dout_rows = _stack(q[:, :, :, rows]), _stack(dout[:, :, :, rows])
        lse_rows = lse[..., rows].unsqueeze(-1)
        delta = (dout_rows * _stack(out[:, :, :, rows])).sum(-1).view(lse_rows.shape)
        if dlse is not None:
            delta -= dlse[..., rows].unsqueeze(-1)
        delta.masked_fill_(lse_rows == float("inf"), 0.0)
        sums.delta[..., rows] = delta[..., 0]
        dq_acc = torch.zeros_like(q_rows)
        for cols in score.kv_blocks(rows):
            k_cols, v_cols = k[:, :, cols].float(), v[:, :, cols].float()
            products = score.products(q_rows, k_cols, rows)
            p = (score(products, rows, cols) - lse_rows).exp_()
            dp = score.dropout((dout_rows @ v_cols.transpose(-1, -2)).view_as(p), rows, cols)
            dropped = score.dropout(p, rows, cols).flatten(2, 3)
            dv_acc[:, :, cols] += dropped.transpose(-1, -2) @ dout_rows
            ds = (dp - delta).mul_(p)
            if sums.dslope is not None:
                sums.dslope[..., rows] -= (ds * score.distance(rows, cols).abs()).sum(-1)
            if dbias is not None:
                _add_to_bias(dbias, score.bias_index(rows, cols), ds.flatten(1, 2))
            ds = score.product_grad(ds, products).flatten(2, 3)
            dq_acc += ds @ k_cols
            dk_acc[:, :, cols] += ds.transpose(-1, -2) @ q_rows
        dq_acc *= problem.softmax_scale
        dq[:, :, :, rows] = dq_acc.view(dq[:, :, :, rows].shape).to(dq.dtype)
    dk.copy_(dk_acc.mul_(problem.softmax_scale))
    dv.copy_(dv_acc)


def _add_to_bias(dbias, index, ds):
    """Add ds [batch, nheads, m, n] to dbias[index], summed over what is shared."""
    for dim in range(4):
        if dbias.shape[dim] == 1:
            ds = ds.sum(dim, keepdim=True)
    target = dbias[index]
    target += ds[:, :, : target.shape[2], : target.shape[3]]


@torch.autocast("cpu", enabled=False)
def probabilities(problem, lse, max_seqlen_q, max_seqlen_k):
    """-> [batch, nheads, max_seqlen_q, max_seqlen_k] in q's dtype; negative where dropped"""
    probs = problem.empty_probs(max_seqlen_q, max_seqlen_k).zero_()
    nheads_k = problem.k.shape[-2]
    for part in _parts(problem):
        q = _by_kv_head(problem.q, part.rows_q, nheads_k)
        k = _keys_by_kv_head(problem, problem.k, part)
        lse_rows = _rows_by_kv_head(lse, part.rows_q, nheads_k).unsqueeze(-1)
        score = Scores(problem, part, q.shape[3], k.shape[3])
        rows, cols = slice(0, q.shape[3]), slice(0, k.shape[3])
        if not (rows.stop and cols.stop):
            continue
        products = score.products(_stack(q), _stack(k), rows)
        p = (score(products, rows, cols) - lse_rows).exp_()
        if problem.dropout_p:
            p = torch.where(score.kept(rows, cols), p, -p)
        target = probs[part.seqs, :, : rows.stop, : cols.stop]
        target.copy_(p.flatten(1, 2)[:, :, : target.shape[2], : target.shape[3]])
    return probs

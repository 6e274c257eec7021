"""The CPU implementation: the same blockwise algorithm in torch, O(seqlen) memory.

Tensors are taken apart into sequences, a sequence into blocks of queries and keys; a block is one
batched product over the KV heads, with the query heads of a group stacked along its rows. All
arithmetic is float32.
"""

import torch

BLOCK_M = 256  # query rows per step
BLOCK_N = 512  # keys per step; 256 x 512 scores per head stay in a core's L2
MAX_HEADS = 256  # of all the sequences taken at once: bounds the scores at 128 MiB


def _sequences(problem):
    """-> (slice of q's first dimension, of k's) for every step: packed, one sequence; dense, as
    many as MAX_HEADS allows."""
    if problem.cu_seqlens_q is None:
        batch, _, nheads, _ = problem.q.shape
        return [(rows, rows) for rows in _blocks(batch, max(MAX_HEADS // nheads, 1))]
    rows_q = problem.cu_seqlens_q.clamp(0, problem.q.shape[0]).tolist()
    rows_k = problem.cu_seqlens_k.clamp(0, problem.k.shape[0]).tolist()
    return [
        (slice(*ends_q), slice(*ends_k))
        for ends_q, ends_k in zip(zip(rows_q, rows_q[1:]), zip(rows_k, rows_k[1:]))
    ]


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


def _kv_blocks(problem, rows, seqlen_q, seqlen_k):
    """The blocks of keys that the query block `rows` sees, and whether each needs a mask."""
    if not problem.causal:
        return [(cols, False) for cols in _blocks(seqlen_k, BLOCK_N)]
    shift = seqlen_k - seqlen_q
    end = max(min(seqlen_k, rows.stop + shift), 0)
    return [(cols, cols.stop > rows.start + shift + 1) for cols in _blocks(end, BLOCK_N)]


def _stack(tensor):
    """[batch, nheads_k, group, m, d] -> float32 [batch, nheads_k, group * m, d]"""
    return tensor.float().flatten(2, 3)


def _scores(problem, q_rows, k_cols, rows, cols, shift, masked):
    """-> scaled, masked scores [batch, nheads_k, group, m, n] in natural-log units"""
    scores = (q_rows @ k_cols.transpose(-1, -2)).mul_(problem.softmax_scale)
    scores = scores.unflatten(2, (-1, rows.stop - rows.start))
    if masked:
        q_pos = torch.arange(rows.start, rows.stop).unsqueeze(1)
        k_pos = torch.arange(cols.start, cols.stop)
        scores.masked_fill_(k_pos > q_pos + shift, float("-inf"))
    return scores


@torch.autocast("cpu", enabled=False)  # the caller's autocast would take the float32 products
def forward(problem):
    """-> (out, lse), as the op schema says."""
    out, lse = problem.empty_out().zero_(), problem.empty_lse().fill_(float("inf"))
    nheads_k = problem.k.shape[-2]
    for rows_q, rows_k in _sequences(problem):
        _forward_sequence(
            problem,
            _by_kv_head(problem.q, rows_q, nheads_k),
            _by_kv_head(problem.k, rows_k, nheads_k),
            _by_kv_head(problem.v, rows_k, nheads_k),
            _by_kv_head(out, rows_q, nheads_k),
            _rows_by_kv_head(lse, rows_q, nheads_k),
        )
    return out, lse


def _forward_sequence(problem, q, k, v, out, lse):
    seqlen_q, seqlen_k = q.shape[3], k.shape[3]
    for rows in _blocks(seqlen_q, BLOCK_M):
        q_rows = _stack(q[:, :, :, rows])
        m_i = lse.new_full(lse[..., rows].shape, float("-inf"))  # [batch, nheads_k, group, m]
        l_i = torch.zeros_like(m_i)
        acc = torch.zeros((*m_i.shape, v.shape[-1]))
        for cols, masked in _kv_blocks(problem, rows, seqlen_q, seqlen_k):
            scores = _scores(
                problem, q_rows, _stack(k[:, :, :, cols]), rows, cols, seqlen_k - seqlen_q, masked
            )
            m_new = torch.maximum(m_i, scores.amax(-1))
            m_ref = m_new.masked_fill(m_new == float("-inf"), 0.0)  # no key yet: no -inf - -inf
            p = scores.sub_(m_ref.unsqueeze(-1)).exp_()
            alpha = (m_i - m_ref).exp_()
            l_i = l_i.mul_(alpha).add_(p.sum(-1))
            update = p.flatten(2, 3) @ _stack(v[:, :, :, cols])
            acc = acc.mul_(alpha.unsqueeze(-1)).add_(update.view_as(acc))
            m_i = m_new
        empty = l_i == 0.0
        out[:, :, :, rows] = (acc / l_i.masked_fill(empty, 1.0).unsqueeze(-1)).to(out.dtype)
        lse[..., rows] = (m_i + l_i.log()).masked_fill_(empty, float("inf"))


@torch.autocast("cpu", enabled=False)
def backward(problem, dout, dlse, out, lse):
    """-> (dq, dk, dv), as the op schema says."""
    grads = tuple(grad.zero_() for grad in problem.empty_grads())
    nheads_k = problem.k.shape[-2]
    for rows_q, rows_k in _sequences(problem):
        q, dout_, out_, dq = (
            _by_kv_head(tensor, rows_q, nheads_k) for tensor in (problem.q, dout, out, grads[0])
        )
        k, v, dk, dv = (
            _by_kv_head(tensor, rows_k, nheads_k)[:, :, 0]  # one head per group: drop `group`
            for tensor in (problem.k, problem.v, grads[1], grads[2])
        )
        lse_ = _rows_by_kv_head(lse, rows_q, nheads_k)
        dlse_ = None if dlse is None else _rows_by_kv_head(dlse, rows_q, nheads_k)
        _backward_sequence(problem, q, k, v, out_, lse_, dout_, dlse_, dq, dk, dv)
    return grads


def _backward_sequence(problem, q, k, v, out, lse, dout, dlse, dq, dk, dv):
    """q, out, dout, dq [batch, nheads_k, group, seqlen_q, d]; k, v, dk, dv [.., seqlen_k, d]."""
    seqlen_q, seqlen_k = q.shape[3], k.shape[2]
    dk_acc, dv_acc = torch.zeros(dk.shape), torch.zeros(dv.shape)
    for rows in _blocks(seqlen_q, BLOCK_M):
        q_rows, dout_rows = _stack(q[:, :, :, rows]), _stack(dout[:, :, :, rows])
        lse_rows = lse[..., rows].unsqueeze(-1)
        delta = (dout_rows * _stack(out[:, :, :, rows])).sum(-1).view(lse_rows.shape)
        if dlse is not None:
            delta -= dlse[..., rows].unsqueeze(-1)
        delta.masked_fill_(lse_rows == float("inf"), 0.0)
        dq_acc = torch.zeros_like(q_rows)
        for cols, masked in _kv_blocks(problem, rows, seqlen_q, seqlen_k):
            k_cols, v_cols = k[:, :, cols].float(), v[:, :, cols].float()
            scores = _scores(problem, q_rows, k_cols, rows, cols, seqlen_k - seqlen_q, masked)
            p = scores.sub_(lse_rows).exp_()
            dp = (dout_rows @ v_cols.transpose(-1, -2)).view_as(p)
            dv_acc[:, :, cols] += p.flatten(2, 3).transpose(-1, -2) @ dout_rows
            ds = dp.sub_(delta).mul_(p).flatten(2, 3)
            dq_acc += ds @ k_cols
            dk_acc[:, :, cols] += ds.transpose(-1, -2) @ q_rows
        dq_acc *= problem.softmax_scale
        dq[:, :, :, rows] = dq_acc.view(dq[:, :, :, rows].shape).to(dq.dtype)
    dk.copy_(dk_acc.mul_(problem.softmax_scale))
    dv.copy_(dv_acc)

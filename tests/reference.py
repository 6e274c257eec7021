"""The oracle: attention as its definition reads, in float64, with dense masks and autograd.

Written apart from every implementation: nothing of the package is imported here, nothing is
blocked, and gradients come from differentiating the definition.
"""

import torch


def visible(seqlen_q, seqlen_k, causal, device):
    """[seqlen_q, seqlen_k] bool: query i sees key j."""
    i = torch.arange(seqlen_q, device=device)[:, None]
    j = torch.arange(seqlen_k, device=device)[None, :]
    everything = torch.ones(seqlen_q, seqlen_k, dtype=torch.bool, device=device)
    return j <= i + seqlen_k - seqlen_q if causal else everything


def attend(q, k, v, causal, softmax_scale):
    """One sequence: q [seqlen_q, h, d], k, v [seqlen_k, h_k, d] -> out, lse [h, seqlen_q]."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    scores = torch.einsum("ihd,jhd->hij", q, k) * softmax_scale
    scores = scores.masked_fill(~visible(q.shape[0], k.shape[0], causal, q.device), -torch.inf)
    empty = (scores == -torch.inf).all(-1)
    if not k.shape[0]:
        return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(scores.shape[:2], torch.inf)
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), -1)
    p = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
    out = torch.einsum("hij,jhd->ihd", p, v)
    return out, lse.masked_fill(empty, torch.inf)


def attention(q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, *, causal=False, softmax_scale=None):
    """Dense or packed attention in the dtype of q -> (out, lse), laid out as the package's."""
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    if cu_seqlens_q is None:
        pairs = [attend(*sequence, causal, scale) for sequence in zip(q, k, v)]
        if not pairs:
            return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(0, q.shape[2], q.shape[1])
        return torch.stack([out for out, _ in pairs]), torch.stack([lse for _, lse in pairs])
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), torch.inf)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for (q0, q1), (k0, k1) in zip(zip(ends_q, ends_q[1:]), zip(ends_k, ends_k[1:])):
        part, part_lse = attend(q[q0:q1], k[k0:k1], v[k0:k1], causal, scale)
        out = torch.cat([out[:q0], part, out[q1:]])
        lse = torch.cat([lse[:, :q0], part_lse, lse[:, q1:]], 1)
    return out, lse


def attention_with_grads(q, k, v, dout, dlse=None, dtype=torch.float64, **options):
    """(out, lse, dq, dk, dv) computed in `dtype`; in the inputs' own it is eager's error."""
    q, k, v = (t.detach().to(dtype).requires_grad_() for t in (q, k, v))
    out, lse = attention(q, k, v, **options)
    loss = (out * dout.to(dtype)).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse == torch.inf, 0.0) * dlse.to(dtype)).sum()
    grads = (None, None, None)  # nothing depends on the inputs if there is no sequence
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, (q, k, v), allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip((q, k, v), grads)]
    return (out.detach(), lse.detach(), *grads)

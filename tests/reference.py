"""The oracle: attention as its definition reads, in float64, with dense masks and autograd.

Written apart from every implementation: nothing of the package is imported here, nothing is
blocked, and gradients come from differentiating the definition. Only dropout's mask is told to it.
"""

import torch

DIFFERENTIABLE = ("attn_bias", "alibi_slopes", "s_aux")


def visible(i, j, causal=False, window_size=(-1, -1)):
    """Bool, as broadcast: a query on the diagonal at key i sees key j."""
    left, right = window_size
    right = 0 if causal else right
    keep = torch.ones_like(i + j, dtype=torch.bool)
    if left >= 0:
        keep &= j >= i - left
    if right >= 0:
        keep &= j <= i + right
    return keep


def attend(
    q, k, v, softmax_scale, causal, window_size=(-1, -1), softcap=0.0, alibi_slopes=None,
    s_aux=None, attn_bias=None, causal_alignment="bottom-right", keep=None, dropout_p=0.0,
    round_weights=None,
):  # fmt: skip
    """One sequence: q [seqlen_q, h, d], k, v [seqlen_k, h_k, d], alibi_slopes and s_aux (h,),
    attn_bias broadcastable to [h, seqlen_q, seqlen_k], keep [h, seqlen_q, seqlen_k] -> out, lse
    [h, seqlen_q]. round_weights: what is done to the weights before they meet v."""
    group = q.shape[1] // k.shape[1]
    k, v = k.repeat_interleave(group, 1), v.repeat_interleave(group, 1)
    seqlen_q, seqlen_k = q.shape[0], k.shape[0]
    i = torch.arange(seqlen_q, device=q.device)[:, None]
    if causal_alignment == "bottom-right":
        i = i + seqlen_k - seqlen_q
    j = torch.arange(seqlen_k, device=q.device)[None, :]
    scores = torch.einsum("ihd,jhd->hij", q, k) * softmax_scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None] * (i - j).abs()
    hidden = ~visible(i, j, causal, window_size)
    if attn_bias is not None and attn_bias.dtype == torch.bool:
        hidden = hidden | ~attn_bias
    elif attn_bias is not None:
        scores = scores + attn_bias
    scores = scores.masked_fill(hidden, -torch.inf)
    if s_aux is not None:
        scores = torch.cat([scores, s_aux[:, None, None].expand(-1, seqlen_q, 1)], -1)
        v = torch.cat([v, v.new_zeros(1, *v.shape[1:])])
        keep = None if keep is None else torch.cat([keep, keep.new_ones(*keep.shape[:2], 1)], -1)
    if not scores.shape[-1]:
        return q.new_zeros(*q.shape[:2], v.shape[-1]), q.new_full(scores.shape[:2], torch.inf)
    empty = (scores == -torch.inf).all(-1)
    lse = torch.logsumexp(scores.masked_fill(empty[..., None], 0.0), -1)
    p = torch.exp(scores - lse[..., None]).masked_fill(empty[..., None], 0.0)
    if dropout_p:
        p = p * keep / (1.0 - dropout_p)
    if round_weights is not None:
        p = round_weights(p)
    out = torch.einsum("hij,jhd->ihd", p, v)
    return out, lse.masked_fill(empty, torch.inf)


def attention(
    q, k, v, cu_seqlens_q=None, cu_seqlens_k=None, *, softmax_scale=None, causal=False,
    seqused_q=None, seqused_k=None, leftpad_k=None, keep=None, **options,
):  # fmt: skip
    """Dense or packed attention in the dtype of q -> (out, lse), laid out as the package's.

    keep: dropout's mask, [batch, seqlen_q, h, seqlen_k] or [total_q, h, total_k].
    """
    scale = q.shape[-1] ** -0.5 if softmax_scale is None else float(softmax_scale)
    per_batch = {name: options.pop(name, None) for name in DIFFERENTIABLE}

    def options_of(b, seqlen_q, seqlen_k):
        bias, slopes = per_batch["attn_bias"], per_batch["alibi_slopes"]
        if bias is not None:
            bias = bias[(None,) * (4 - bias.dim())]
            bias = bias[b if bias.shape[0] > 1 else 0][:, :seqlen_q, :seqlen_k]
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[b]
        return {**options, "attn_bias": bias, "alibi_slopes": slopes, "s_aux": per_batch["s_aux"]}

    if cu_seqlens_q is None:
        if not q.shape[0]:
            return q.new_zeros(*q.shape[:-1], v.shape[-1]), q.new_zeros(0, q.shape[2], q.shape[1])
        pairs = []
        for b in range(q.shape[0]):
            part = None if keep is None else keep[b].transpose(0, 1)
            more = options_of(b, q.shape[1], k.shape[1])
            pairs.append(attend(q[b], k[b], v[b], scale, causal, keep=part, **more))
        return torch.stack([out for out, _ in pairs]), torch.stack([lse for _, lse in pairs])
    out = q.new_zeros(*q.shape[:-1], v.shape[-1])
    lse = q.new_full((q.shape[1], q.shape[0]), torch.inf)
    ends_q, ends_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for b, (q0, q1, k0, k1) in enumerate(zip(ends_q, ends_q[1:], ends_k, ends_k[1:])):
        if seqused_q is not None:
            q1 = min(q1, q0 + int(seqused_q[b]))
        if seqused_k is not None:
            k1 = min(k1, k0 + int(seqused_k[b]))
        if leftpad_k is not None:
            k0 = min(k1, k0 + int(leftpad_k[b]))
        part = None if keep is None else keep[q0:q1, :, k0:k1].transpose(0, 1)
        more = options_of(b, q1 - q0, k1 - k0)
        part, part_lse = attend(q[q0:q1], k[k0:k1], v[k0:k1], scale, causal, keep=part, **more)
        out = torch.cat([out[:q0], part, out[q1:]])
        lse = torch.cat([lse[:, :q0], part_lse, lse[:, q1:]], 1)
    return out, lse


def attention_with_grads(q, k, v, dout, dlse=None, dtype=torch.float64, **options):
    """(out, lse, dq, dk, dv, then the gradients of those of DIFFERENTIABLE that are given and
    floating-point) computed in `dtype`; in the inputs' own it is eager's error."""
    leaves = [t.detach().to(dtype).requires_grad_() for t in (q, k, v)]
    for name in DIFFERENTIABLE:
        if options.get(name) is not None and options[name].is_floating_point():
            options[name] = options[name].detach().to(dtype).requires_grad_()
            leaves.append(options[name])
    out, lse = attention(*leaves[:3], **options)
    loss = (out * dout.to(dtype)).sum()
    if dlse is not None:
        loss = loss + (lse.masked_fill(lse == torch.inf, 0.0) * dlse.to(dtype)).sum()
    grads = (None,) * len(leaves)  # nothing depends on the inputs if there is no sequence
    if loss.requires_grad:
        grads = torch.autograd.grad(loss, leaves, allow_unused=True)
    grads = [torch.zeros_like(t) if g is None else g for t, g in zip(leaves, grads)]
    return (out.detach(), lse.detach(), *grads)

"""A KV cache on the CPU, and what surrounds it: pages, the append of new keys and values, rotary
embedding, the merge of partial results."""

import torch


def rows_of(problem, tensor, b, rows):
    """Rows [rows.start, rows.stop) of sequence b's part of a cache: [1, seqlen, nheads_k, d]"""
    if problem.block_table is None:
        entry = b if problem.cache_batch_idx is None else int(problem.cache_batch_idx[b])
        return tensor[entry : entry + 1, rows]
    pages = _pages(problem.block_table, b, rows, tensor)
    first = rows.start // tensor.shape[1] * tensor.shape[1]
    found = tensor[pages].flatten(0, 1)[rows.start - first : rows.stop - first]
    return found.unsqueeze(0)


def _pages(block_table, b, rows, cache):
    """The pages that hold rows of sequence b, checked."""
    size = cache.shape[1]
    pages = block_table[b, rows.start // size : -(-rows.stop // size)].long()
    if rows.stop <= rows.start:
        pages = pages[:0]
    if pages.numel() and not 0 <= int(pages.min()) <= int(pages.max()) < cache.shape[0]:
        raise RuntimeError(
            f"block_table must name pages 0 to {cache.shape[0] - 1} for rows {rows.start} to "
            f"{rows.stop - 1} of sequence {b}, got {pages.tolist()}"
        )
    return pages


@torch.autocast("cpu", enabled=False)
def append(
    q, k, v, k_cache, v_cache, cos, sin, cu_seqlens, cache_seqlens, block_table, batch_idx,
    interleaved, turn_each,
):  # fmt: skip
    """-> (seqused, q turned, or nothing of it without cos). Raises before anything is written."""
    lengths = cache_seqlens.tolist()
    batch = len(lengths)
    ends = list(range(batch + 1)) if cu_seqlens is None else cu_seqlens.tolist()
    news = [k.shape[1]] * batch if cu_seqlens is None else [b - a for a, b in zip(ends, ends[1:])]
    places = [
        _places(k_cache, block_table, batch_idx, b, length, new)
        for b, (length, new) in enumerate(zip(lengths, news))
    ]
    q_out = q.new_empty(0)
    if cos is not None:
        k = rotary(k, k.clone(), cos, sin, cu_seqlens, cache_seqlens, 0, interleaved, False)
        first = cache_seqlens
        if turn_each:
            q_out = rotary(q, q.clone(), cos, sin, cu_seqlens, first, 0, interleaved, False)
        else:  # every query as the first: as if each were a sequence of its own
            counts = torch.full((batch,), q.shape[1]) if cu_seqlens is None else cu_seqlens.diff()
            rows = q.reshape(-1, 1, *q.shape[-2:])
            first = torch.repeat_interleave(first, counts)
            first = torch.cat([first, first.new_full((rows.shape[0] - len(first),), -1)])
            turned = rotary(rows, rows.clone(), cos, sin, None, first, 0, interleaved, False)
            q_out = turned.view(q.shape)
    for b, (entries, rows, skipped) in enumerate(places):
        new_k, new_v = (t[b] if cu_seqlens is None else t[ends[b] : ends[b + 1]] for t in (k, v))
        k_cache[entries, rows] = new_k[skipped:]
        v_cache[entries, rows] = new_v[skipped:]
    seqused = cache_seqlens + torch.tensor(news, dtype=torch.int32)
    return seqused, q_out


def _places(cache, block_table, batch_idx, b, length, new):
    """-> (first index into the cache, row, how many new rows have a position under 0) of the new
    rows of sequence b."""
    size = cache.shape[1]
    capacity = size if block_table is None else size * block_table.shape[1]
    if length + new > capacity:
        name = "the cache" if block_table is None else "block_table"
        raise RuntimeError(
            f"{name} has room for {capacity} rows of sequence {b}, but cache_seqlens is {length} "
            f"and k has {new} more: give it more rows, or pages"
        )
    skipped = min(max(-length, 0), new)
    pos = torch.arange(length + skipped, length + new)
    if block_table is None:
        entry = b if batch_idx is None else int(batch_idx[b])
        return torch.full_like(pos, entry), pos, skipped
    first, last = length + skipped, length + new
    pages = _pages(block_table, b, slice(first, last), cache)
    return pages[pos // size - first // size], pos % size, skipped


def combine(out_partial, lse_partial, dtype):
    """Partial results [splits, ...] merged by their lse; lse -inf where no split has keys."""
    lses = lse_partial.float()
    lses = lses.masked_fill(lses == float("inf"), float("-inf"))
    top = lses.amax(0)
    weights = (lses - top.masked_fill(top == float("-inf"), 0.0)).exp_()  # [splits, ...]
    total = weights.sum(0)
    parts = out_partial.float() * weights.unsqueeze(-1)
    parts = parts.masked_fill((weights == 0.0).unsqueeze(-1), 0.0)  # 0 * NaN is NaN
    out = parts.sum(0) / total.masked_fill(total == 0.0, 1.0).unsqueeze(-1)
    return out.to(dtype).contiguous(), (top + total.log()).contiguous()


def rotary(x, out, cos, sin, cu_seqlens, offsets, offset, interleaved, conjugate):
    """Turn x [batch, seqlen, nheads, d] or [total, nheads, d] by its positions' angles into `out`,
    which may be x: its first 2 * cos.shape[1] columns, as kernels/rotary.py."""
    if cu_seqlens is None:
        first = torch.zeros(x.shape[0]) if offsets is None else offsets
        pos = torch.arange(x.shape[1]) + first.long().unsqueeze(1) + offset  # [batch, seqlen]
        none = torch.zeros_like(pos, dtype=torch.bool)
    else:
        row = torch.arange(x.shape[0])
        seq = torch.searchsorted(cu_seqlens, row, right=True) - 1
        none = seq >= cu_seqlens.shape[0] - 1  # rows of no sequence
        seq = seq.clamp(max=max(cu_seqlens.shape[0] - 2, 0))
        first = 0 if offsets is None or not offsets.numel() else offsets[seq]
        pos = row - cu_seqlens[seq] + first + offset  # [total]
    none |= (pos < 0) | (pos >= cos.shape[0])
    pos, none = pos.masked_fill(none, 0), none[..., None, None]
    if not cos.shape[0]:
        return out.copy_(x)
    c = cos[pos].unsqueeze(-2).float().masked_fill(none, 1.0)  # [.., 1, rotary_dim / 2]
    s = sin[pos].unsqueeze(-2).float().masked_fill(none, 0.0)
    s = -s if conjugate else s
    dim = cos.shape[1]
    halves = (slice(0, 2 * dim, 2), slice(1, 2 * dim, 2))
    if not interleaved:
        halves = (slice(0, dim), slice(dim, 2 * dim))
    x0, x1 = (x[..., half].float() for half in halves)
    turned = (x0 * c - x1 * s, x0 * s + x1 * c)
    for half, values in zip(halves, turned):
        out[..., half] = values.to(out.dtype)
    return out

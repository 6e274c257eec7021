"""A cache case called, and held to the oracle."""

import torch
from cache_cases import expected


def call(kernel, cache, **changes):
    words = {**cache.keywords, **changes}
    return kernel.flash_attn_with_kvcache(
        cache.q, cache.k_cache, cache.v_cache, return_softmax_lse=True, **words
    )


def close(got, exact, eager, rounding=False):
    """Error at most three times that of same-dtype eager, float32 to 1e-5. rounding: leave room for
    what eager is by luck free of where a softmax has one or two terms."""
    error = (got.double() - exact).abs().max().item()
    size = max(exact.abs().max().item(), 1.0)
    bound = 3 * (eager.double() - exact).abs().max().item() + 1e-5
    if got.dtype == torch.float32:
        bound = 1e-5 * size
    elif rounding:
        bound += torch.finfo(got.dtype).eps * size
    assert error <= bound, f"error {error:.3e}, bound {bound:.3e}"


def check(case, cache, out, lse, rounding=False):
    """out, lse and the caches' contents against the oracle."""
    exact, eager = expected(case, cache, torch.float64), expected(case, cache, cache.q.dtype)
    start, device = 0, cache.q.device
    stored = torch.zeros(cache.k_cache.shape[:2], dtype=torch.bool, device=device)
    for b, count in enumerate(case.counts):
        want_out, want_lse, keys, values = exact[b]
        rows = slice(start, start + count)
        got_out, got_lse = (out[rows], lse[:, rows]) if case.lens_q else (out[b], lse[b])
        start += count
        entry, row = (t[: len(keys)].to(device) for t in cache.places[b])
        stored[entry, row] = True
        assert torch.equal(cache.v_cache[entry, row].double(), values)
        got_keys = cache.k_cache[entry, row].double()
        eps = torch.finfo(cache.q.dtype).eps if case.rotary_dim else 0.0  # turned: one rounding
        assert torch.allclose(got_keys, keys, rtol=eps, atol=4e-6 if case.rotary_dim else 0.0)
        if not count:
            continue
        close(got_out, want_out, eager[b][0], rounding)
        assert torch.equal(torch.isinf(got_lse), torch.isinf(want_lse))
        turned = 8 * torch.finfo(cache.q.dtype).eps if case.rotary_dim else 0.0  # q and k rounded
        torch.testing.assert_close(got_lse.double(), want_lse, rtol=1e-4, atol=1e-4 + turned)
    for tensor in (cache.k_cache, cache.v_cache):  # nothing is written anywhere else
        assert tensor[~stored].isnan().all()

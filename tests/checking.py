"""FA2's rule: an error at most twice that of same-dtype PyTorch, both against the oracle."""

import torch
from reference import attention_with_grads

NAMES = ("out", "lse", "dq", "dk", "dv")
FLOOR = 1e-5  # absolute slack, for results that eager happens to get exactly


def run(kernel, q, k, v, dout, dlse, options):
    """(out, lse, dq, dk, dv) of the package's public functions."""
    q, k, v = (t.detach().requires_grad_() for t in (q, k, v))
    options = dict(options)
    lengths = [options.pop(f"cu_seqlens_{side}", None) for side in "qk"]
    if lengths[0] is None:
        out, lse, _ = kernel.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    else:
        out, lse, _ = kernel.flash_attn_varlen_func(
            q, k, v, *lengths, q.shape[0], k.shape[0],
            return_attn_probs=True, **options,
        )  # fmt: skip
    outputs, grads = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    return (out.detach(), lse.detach(), *torch.autograd.grad(outputs, (q, k, v), grads))


def check(results, q, k, v, dout, dlse, options):
    """Hold (out, lse, dq, dk, dv) to FA2's rule, float32 to 1e-5 of the oracle, relative."""
    exact = attention_with_grads(q, k, v, dout, dlse, **options)
    eager = attention_with_grads(q, k, v, dout, dlse, dtype=q.dtype, **options)
    for name, got, want, same_dtype in zip(NAMES, results, exact, eager):
        assert got.shape == want.shape, f"{name}: {got.shape} for {want.shape}"
        assert got.dtype == (torch.float32 if name == "lse" else q.dtype), name
        if not want.numel():
            continue
        infinite = torch.isinf(want)
        assert torch.equal(torch.isinf(got), infinite), f"{name}: other rows without keys"
        got, want, same_dtype = (
            t.double().masked_fill(infinite, 0.0) for t in (got, want, same_dtype)
        )
        error = (got - want).abs().max().item()
        size = max(want.abs().max().item(), 1.0)
        if q.dtype == torch.float32:
            bound = 1e-5 * size
        elif name == "lse":  # float32 whatever the inputs are, and eager's is not
            bound = 1e-4 * size
        else:
            factor = 2 if name == "out" else 3
            bound = factor * (same_dtype - want).abs().max().item() + FLOOR
        assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}"

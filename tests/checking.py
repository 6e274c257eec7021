"""FA2's rule: an error at most twice that of same-dtype PyTorch, both against the oracle."""

import torch
from reference import DIFFERENTIABLE, attention_with_grads

NAMES = ("out", "lse", "dq", "dk", "dv")
FLOOR = 1e-5  # absolute slack, for results that eager happens to get exactly
SEED = 7  # of torch, before every call with dropout


def call(kernel, q, k, v, options, **more):
    """(out, lse, S_dmask) of the public function that fits."""
    options = {**options, **more}
    lengths = [options.pop(f"cu_seqlens_{side}", None) for side in "qk"]
    torch.manual_seed(SEED)
    if lengths[0] is None:
        return kernel.flash_attn_func(q, k, v, return_attn_probs=True, **options)
    longest = [max(ends.diff().tolist(), default=0) for ends in lengths]
    return kernel.flash_attn_varlen_func(
        q, k, v, *lengths, *longest, return_attn_probs=True, **options
    )


def run(kernel, q, k, v, dout, dlse, options):
    """(out, lse, dq, dk, dv, ...) of the package's public functions, as attention_with_grads."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    options = dict(options)
    for name in names_of(options)[len(NAMES) :]:
        options[name] = options[name].detach().requires_grad_()
        leaves.append(options[name])
    out, lse, _ = call(kernel, *leaves[:3], options)
    outputs, grads = ((out,), (dout,)) if dlse is None else ((out, lse), (dout, dlse))
    return (out.detach(), lse.detach(), *torch.autograd.grad(outputs, leaves, grads))


def problem_of(module, case, q, k, v, options):
    """The AttentionProblem of a case, for what is beneath the public functions."""
    AttentionProblem, Options = module("problem").AttentionProblem, module("options").Options
    lengths = {n: options[n] for n in ("seqused_q", "seqused_k", "leftpad_k") if n in options}
    chosen = Options(**{n: options[n] for n in Options._fields if n in options})
    torch.manual_seed(SEED)
    if not case.varlen:
        return AttentionProblem.dense(q, k, v, chosen)
    cu_seqlens = (options["cu_seqlens_q"], options["cu_seqlens_k"])
    return AttentionProblem.varlen(q, k, v, *cu_seqlens, None, None, chosen, **lengths)


def names_of(options):
    """What `run` returns."""
    given = [name for name in DIFFERENTIABLE if options.get(name) is not None]
    return (*NAMES, *(name for name in given if options[name].is_floating_point()))


def dropout_mask(kernel, q, k, options):
    """Which pairs `call` keeps, [..., rows of q, heads, rows of k] bool: with Q and K of zeros and
    the unit vectors for V, an output is the probability of one pair, 0 where it is dropped."""
    names = ("cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k", "dropout_p")
    options = {name: options[name] for name in names if name in options}
    rows = k.shape[-3]
    zeros = [torch.zeros_like(t, dtype=torch.float16) for t in (q, k)]
    parts = [zeros[0].new_zeros(*q.shape[:-1], 0)]
    for start in range(0, rows, 256):
        eye = torch.eye(rows, device=k.device, dtype=torch.float16)[:, start : start + 256]
        v = eye[:, None].expand(rows, k.shape[-2], -1).expand(*k.shape[:-1], -1)
        parts.append(call(kernel, *zeros, v, options)[0])
    return torch.cat(parts, -1) != 0


def check(results, q, k, v, dout, dlse, options, kernel=None, rounding=False):
    """Hold `run`'s results to FA2's rule, float32 to 1e-5 of the oracle, relative.

    rounding: leave room for what eager is by luck free of where a softmax has one or two terms, the
    rounding of the results and that of the output of which delta = rowsum(dO * O) is formed.
    """
    if options.get("dropout_p"):
        options = {**options, "keep": dropout_mask(kernel, q, k, options)}
    exact = attention_with_grads(q, k, v, dout, dlse, **options)
    eager = attention_with_grads(q, k, v, dout, dlse, dtype=q.dtype, **options)
    eps = torch.finfo(q.dtype).eps
    slack = [0.0] * len(exact)
    if rounding:  # an error in delta acts as a gradient of lse would
        delta_error = eps * (dout * exact[0]).abs().sum(-1).transpose(-1, -2)
        effects = attention_with_grads(q, k, v, torch.zeros_like(dout), delta_error, **options)
        slack = [0.0, 0.0, *(t.abs().max().item() if t.numel() else 0.0 for t in effects[2:])]
    for name, got, want, same_dtype, room in zip(
        names_of(options), results, exact, eager, slack, strict=True
    ):
        assert got.shape == want.shape, f"{name}: {got.shape} for {want.shape}"
        dtypes = {"lse": torch.float32, "alibi_slopes": torch.float32}
        assert got.dtype == dtypes.get(name, q.dtype), name
        if not want.numel():
            continue
        infinite = torch.isinf(want)
        assert torch.equal(torch.isinf(got), infinite), f"{name}: other rows without keys"
        got, want, same_dtype = (
            t.double().masked_fill(infinite, 0.0) for t in (got, want, same_dtype)
        )
        error = (got - want).abs().max().item()
        size = max(want.abs().max().item(), 1.0)
        eager_error = (same_dtype - want).abs().max().item()
        if q.dtype == torch.float32:
            bound = max(1e-5 * size, 3 * eager_error + 4 * room if rounding else 0.0)
        elif name == "lse":  # float32 whatever the inputs are, and eager's is not
            bound = 1e-4 * size
        else:
            factor = 2 if name == "out" else 3
            bound = factor * eager_error + FLOOR
            bound += 4 * room + eps * size if rounding else 0.0
        assert error <= bound, f"{name}: error {error:.3e}, bound {bound:.3e}"

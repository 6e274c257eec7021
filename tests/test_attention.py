"""All cases against the oracle: the CPU op here, the kernels where there is a GPU."""

import pytest
import torch
from cases import BY_NAME, CASES, Case, make
from checking import check, run

CI = {"full", "causal", "causal-more-queries", "gqa", "dim-64", "dim-192-128", "varlen", "no-keys"}
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


ROWS = [
    pytest.param(case, id=case.name, marks=[pytest.mark.kernels_ci] if case.name in CI else [])
    for case in CASES
]


@pytest.mark.parametrize("dtype", DTYPES, ids=("fp16", "bf16", "fp32"))
@pytest.mark.parametrize("case", ROWS)
def test_case(kernel, device, case, dtype):
    inputs = make(case, dtype, device)
    check(run(kernel, *inputs), *inputs, kernel=kernel)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=("fp16", "bf16"))
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("seqlen", (512, 1000, 1023))
def test_larger(kernel, device, dtype, head_dim, causal, seqlen):
    """Many tiles of every shipped shape, and lengths that do not fill the last one."""
    case = Case("larger", seqlen, seqlen + 24, head_dim=head_dim, causal=causal)
    inputs = make(case, dtype, device)
    check(run(kernel, *inputs), *inputs, kernel=kernel)


@pytest.mark.parametrize("case", ("causal", "varlen", "gqa"))
def test_packed_variants(kernel, device, case):
    """qkv- and kv-packed calls equal the separate ones, gradients included."""
    case = BY_NAME[case]
    if case.varlen:
        case = case._replace(lens_k=case.lens_q)
    else:
        case = case._replace(seqlen_k=case.seqlen_q)
    q, k, v, dout, _, options = make(case, torch.float16, device)
    causal = options["causal"]
    want = run(kernel, q, k, v, dout, None, options)
    longest = max(case.lens_q or (0,))
    ends = [options.get(f"cu_seqlens_{side}") for side in "qk"]
    lengths = (*ends, longest, longest) if case.varlen else ()
    prefix = "flash_attn_varlen_" if case.varlen else "flash_attn_"

    kv = torch.stack([k, v], -3).requires_grad_()
    q_ = q.detach().requires_grad_()
    out = getattr(kernel, prefix + "kvpacked_func")(q_, kv, *lengths, causal=causal)
    dq, dkv = torch.autograd.grad(out, (q_, kv), dout)
    for got, expected in zip((out, dq, *dkv.unbind(-3)), (want[0], *want[2:])):
        torch.testing.assert_close(got, expected, rtol=0, atol=0)

    if case.nheads == case.nheads_k:
        qkv = torch.stack([q, k, v], -3).requires_grad_()
        lengths = (ends[0], longest) if case.varlen else ()
        out = getattr(kernel, prefix + "qkvpacked_func")(qkv, *lengths, causal=causal)
        (dqkv,) = torch.autograd.grad(out, qkv, dout)
        for got, expected in zip((out, *dqkv.unbind(-3)), (want[0], *want[2:])):
            torch.testing.assert_close(got, expected, rtol=0, atol=0)


@pytest.mark.kernels_ci
def test_classic_layout(kernel, device):
    """[batch, heads, seqlen, head_dim] functions equal the FA2 ones; one records no gradient."""
    q, k, v, dout, _, _ = make(BY_NAME["gqa"], torch.float16, device)
    want = run(kernel, q, k, v, dout, None, {"causal": True, "softmax_scale": 0.2})
    heads_first = [t.transpose(1, 2).contiguous().requires_grad_() for t in (q, k, v)]
    out = kernel.flash_attention(*heads_first, causal=True, softmax_scale=0.2)
    grads = torch.autograd.grad(out, heads_first, dout.transpose(1, 2))
    for got, expected in zip((out, *grads), (want[0], *want[2:])):
        torch.testing.assert_close(got.transpose(1, 2), expected, rtol=0, atol=0)
    out = kernel.flash_attention_forward(*heads_first, causal=True)
    assert not out.requires_grad
    torch.testing.assert_close(
        out.transpose(1, 2), kernel.flash_attn_func(q, k, v, causal=True), rtol=0, atol=0
    )


def test_repeatable(kernel, device):
    """The results are bitwise the same on every run, and the gradients if that is asked for."""
    inputs = make(BY_NAME["gqa"], torch.bfloat16, device)
    inputs[-1]["deterministic"] = True
    first = run(kernel, *inputs)
    for _ in range(5):
        for got, want in zip(run(kernel, *inputs), first):
            assert torch.equal(got, want)

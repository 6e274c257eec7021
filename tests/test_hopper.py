"""The Gluon kernels for sm_90: that they run where they should, and what takes their place."""

import logging
import sys

import pytest
import torch
from cases import BY_NAME, CASES, Case, make
from checking import call, check, run

SERVED = [
    case
    for case in CASES
    if case.dropout_p == 0.0
    and case.bias is None
    and case.head_dim % 8 == 0
    and case.head_dim <= 256
    and (case.head_dim_v or 8) % 8 == 0
]


def memos_of(launch):
    """Signature -> the names of the kernels that ran, among others."""
    return sys.modules[f"{launch.__package__}.plans"].memos


@pytest.fixture
def launch(module, device):
    if device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    launch = module("flash_attention_kernel.launch")
    memos_of(launch).clear()
    return launch


def hopper_ran(launch, name="hopper"):
    return any(name in memo for memo in memos_of(launch).values())


@pytest.mark.gpu
@pytest.mark.parametrize("case", SERVED, ids=[case.name for case in SERVED])
def test_served_cases(kernel, launch, device, case):
    """test_attention.py's cases take this path: but for few queries, and nothing."""
    q, k, v, _, _, options = make(case, torch.float16, device)
    out, _, _ = call(kernel, q, k, v, options)
    few = hopper_ran(launch, "decode")
    assert hopper_ran(launch) or few or q.numel() == 0 or k.numel() == 0
    assert out.shape == (*q.shape[:-1], v.shape[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("case", SERVED, ids=[case.name for case in SERVED])
def test_served_gradients(kernel, launch, device, case):
    """test_attention.py's cases take this path back: but for some head_dims, options with the
    smaller ones, the gradient of ALiBi's slopes, and nothing."""
    inputs = q, k, _, _, _, _ = make(case, torch.bfloat16, device)
    run(kernel, *inputs)
    one_dim = case.head_dim_v in (None, case.head_dim) and case.head_dim <= 128
    plain = case.window == (-1, -1) and not case.softcap and not case.alibi
    there = one_dim and not case.alibi and (plain or case.head_dim > 64)
    wanted = there and q.numel() > 0 and k.numel() > 0
    assert hopper_ran(launch, "hopper_backward") == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("dropout", "bias", "dim-59-causal"))
def test_portable_cases(kernel, launch, device, name):
    inputs = make(BY_NAME[name], torch.float16, device)
    run(kernel, *inputs)
    assert memos_of(launch) and not hopper_ran(launch)
    assert not hopper_ran(launch, "hopper_backward")


@pytest.mark.gpu
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("head_dim", (96, 128))
def test_fixed_slopes(kernel, launch, device, head_dim, causal):
    """ALiBi, whose slopes seldom want a gradient, with softcap; beside the portable kernels."""
    shape = (2, 450, 4, head_dim)
    leaves = [
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
    ]
    options = {"alibi_slopes": torch.rand(4, device=device), "softcap": 20.0, "causal": causal}
    grads = []
    for deterministic in (True, False):
        out = kernel.flash_attn_func(*leaves, **options, deterministic=deterministic)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
        assert hopper_ran(launch, "hopper_backward") != deterministic
    for got, want in zip(grads[1], grads[0]):
        assert (got - want).float().norm() < 5e-3 * want.float().norm()


@pytest.mark.gpu
def test_deterministic(kernel, launch, device):
    """dQ is summed in any order here: whoever wants it repeatable gets the portable kernels."""
    *inputs, options = make(BY_NAME["gqa"], torch.bfloat16, device)
    run(kernel, *inputs, {**options, "deterministic": True})
    assert hopper_ran(launch, "dkdv") and not hopper_ran(launch, "hopper_backward")


LONG = [
    Case("long", 1000, 1100, batch=3, nheads=3, nheads_k=3, head_dim=128),
    Case("long-full-tiles", 512, 512, nheads=4, nheads_k=4, head_dim=128),
    Case("long-full-tiles-64", 768, 1024, nheads=4, nheads_k=4, head_dim=64),
    Case("long-causal", 1500, 1500, nheads=4, nheads_k=1, head_dim=128, causal=True),
    Case("long-64", 1500, 1300, nheads=4, nheads_k=2, head_dim=64),
    Case("long-64-window", 1500, 1500, nheads=4, nheads_k=4, head_dim=64, window=(200, 70)),
    Case("long-96", 700, 900, nheads=4, nheads_k=2, head_dim=96, causal=True),
    Case(
        "long-varlen", nheads=8, nheads_k=2, head_dim=128, causal=True,
        lens_q=(700, 1, 130, 0, 1100, 64), lens_k=(700, 90, 130, 5, 1100, 300),
    ),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG, ids=[case.name for case in LONG])
def test_many_tiles(kernel, launch, device, case):
    """Several tiles for each program, which draws them; the counters are zero again after."""
    inputs = make(case, torch.bfloat16, device)
    first = run(kernel, *inputs)
    check(first, *inputs, kernel=kernel)
    assert hopper_ran(launch)
    assert hopper_ran(launch, "hopper_backward") == (case.name != "long-64-window")
    for _ in range(3):
        again = run(kernel, *inputs)
        assert torch.equal(again[0], first[0])
        for got, want in zip(again[3:5], first[3:5]):  # dK and dV; dQ is summed in any order
            assert torch.equal(got, want)
    torch.cuda.synchronize()
    assert all(not counters.any() for counters in launch._counters_of_stream.values())


@pytest.mark.gpu
def test_strided(kernel, launch, device):
    """Packed QKV and heads-first tensors are read where they lie; what TMA cannot read is not."""
    qkv = torch.randn(2, 300, 3, 4, 64, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.unbind(2)
    want = kernel.flash_attn_func(*(t.contiguous() for t in (q, k, v)), causal=True)
    memos_of(launch).clear()
    assert torch.equal(kernel.flash_attn_func(q, k, v, causal=True), want)
    heads_first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    assert torch.equal(kernel.flash_attn_func(*heads_first, causal=True), want)
    assert all("hopper" in memo for memo in memos_of(launch).values())
    memos_of(launch).clear()
    room = torch.empty(2, 300, 4, 65, device=device, dtype=torch.bfloat16)[..., 1:]
    torch.testing.assert_close(
        kernel.flash_attn_func(room.copy_(q), k, v, causal=True), want, rtol=0, atol=2e-2
    )
    assert not hopper_ran(launch)


@pytest.mark.gpu
def test_cuda_graph(kernel, launch, device):
    """A graph has counters of its own, and may be replayed beside other calls."""
    q = torch.randn(2, 500, 4, 128, device=device, dtype=torch.bfloat16)
    want = kernel.flash_attn_func(q, q, q, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.flash_attn_func(q, q, q, causal=True)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(kernel.flash_attn_func(q, q, q, causal=True), want)


@pytest.mark.gpu
def test_falls_back(kernel, launch, device, monkeypatch, caplog):
    """Where the kernel does not compile the portable one serves, and one warning says so."""
    calls = launch._hopper_calls()
    monkeypatch.setattr(launch, "_warned", set())

    def broken(*args):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(calls, "forward_launch", broken)
    monkeypatch.setattr(calls, "backward_launch", broken)
    q = torch.randn(2, 300, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = kernel.flash_attn_func(q, q, q)
            (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.isfinite().all() and grad.isfinite().all() and not hopper_ran(launch)
    assert len([r for r in caplog.records if "Hopper" in r.message]) == 1

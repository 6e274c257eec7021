"""float8: e4m3 q, k and v, with a scale for each head of each sequence."""

import pytest
import torch
from cases import BY_NAME, CASES, Case, make
from checking import call
from reference import attention

SIDES = ("q_descale", "k_descale", "v_descale")
SERVED = [case for case in CASES if case.dropout_p == 0.0]


def make_float8(case, device):
    """-> q, k, v, their descales, options"""
    q, k, v, _, _, options = make(case, torch.bfloat16, device)
    eight = [t.to(torch.float8_e4m3fn) for t in (q, k, v)]
    cu_seqlens = options.get("cu_seqlens_q")
    batch = q.shape[0] if cu_seqlens is None else len(cu_seqlens) - 1
    descales = [torch.rand(batch, k.shape[-2], device=device) + 0.5 for _ in SIDES]
    return (*eight, descales, options)


def times(tensor, gains, cu_seqlens):
    """A float64 tensor, of each sequence's heads times gains [batch, nheads_k]."""
    gains = gains.double().repeat_interleave(tensor.shape[-2] // gains.shape[1], 1)[..., None]
    if cu_seqlens is None:
        return tensor.double() * gains[:, None]
    lengths = cu_seqlens.diff()
    rows = gains.repeat_interleave(lengths, 0)
    rest = gains.new_ones(tensor.shape[0] - len(rows), *rows.shape[1:])  # of no sequence
    return tensor.double() * torch.cat([rows, rest])


def eager_weights(p):
    """Weights as float8: those of a row relative to its greatest, which is 2^8 then."""
    top = p.amax(-1, keepdim=True).clamp_min(1e-30)
    return (p / top * 256.0).to(torch.float8_e4m3fn).to(p.dtype) * top / 256.0


def check_float8(kernel, q, k, v, descales, options):
    """FA2's rule; eager: inputs, times their gains, in bfloat16, and weights in float8."""
    ends = [options.get(f"cu_seqlens_{side}") for side in "qkk"]
    exact = [times(t, gains, cu) for t, gains, cu in zip((q, k, v), descales, ends)]
    want, want_lse = attention(*exact, **options)
    rounded = (t.to(torch.bfloat16).float() for t in exact)
    eager, eager_lse = attention(*rounded, round_weights=eager_weights, **options)
    error = (eager.to(torch.bfloat16).double() - want).abs()
    out, lse, _ = call(kernel, q, k, v, options, **dict(zip(SIDES, descales)))
    assert out.dtype == torch.bfloat16 and out.shape == want.shape
    lse_error = (eager_lse.double() - want_lse).nan_to_num(posinf=0.0, neginf=0.0).abs()
    atol = 2.0 * lse_error.max().item() + 5e-3 if lse.numel() else 0.0
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-3, atol=atol)
    if out.numel():
        assert (out.double() - want).abs().max() <= 2.0 * error.max() + 1e-3
        assert (out.double() - want).abs().mean() <= 1.2 * error.mean() + 1e-4


@pytest.mark.parametrize("case", SERVED, ids=[case.name for case in SERVED])
def test_cases(kernel, device, case):
    check_float8(kernel, *make_float8(case, device))


LONG = [
    Case("full", 700, 1300, nheads=4, nheads_k=2, head_dim=128),
    Case("causal", 1300, 1300, nheads=4, nheads_k=4, head_dim=128, causal=True),
    Case("64", 1000, 900, nheads=4, nheads_k=2, head_dim=64),
    Case("64-causal", 900, 1000, nheads=4, nheads_k=2, head_dim=64, causal=True),
    Case("96-v-64", 500, 700, nheads=4, nheads_k=2, head_dim=96, head_dim_v=64, causal=True),
    Case("window", 900, 900, nheads=4, nheads_k=2, head_dim=128, window=(200, 30)),
    Case("softcap", 500, 700, nheads=4, nheads_k=2, head_dim=128, causal=True, softcap=20.0),
    Case("alibi", 500, 700, nheads=4, nheads_k=2, head_dim=64, causal=True, alibi="head"),
    Case("sink", 500, 700, nheads=4, nheads_k=2, head_dim=64, window=(100, 0), sink=True),
    Case(
        "varlen", nheads=8, nheads_k=2, head_dim=128, causal=True,
        lens_q=(300, 1, 0, 517), lens_k=(300, 400, 20, 700),
    ),
]  # fmt: skip


@pytest.mark.parametrize("case", LONG, ids=[case.name for case in LONG])
def test_long(kernel, device, case):
    check_float8(kernel, *make_float8(case, device))


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG, ids=[case.name for case in LONG])
def test_path(kernel, launch, device, case):
    """These take sm_90's kernel."""
    q, k, v, descales, options = make_float8(case, device)
    for given in ({}, dict(zip(SIDES, descales))):
        call(kernel, q, k, v, options, **given)
        call(kernel, q, k, v, options, **given)
    assert launch.ran == {"values", "hopper"}


@pytest.mark.gpu
def test_falls_back(kernel, launch, device, monkeypatch):
    """Where sm_90's kernel does not compile, bfloat16 serves."""

    def broken(*args):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(launch._hopper_calls(), "forward_launch", broken)
    given = make_float8(LONG[1], device)
    for _ in range(2):
        check_float8(kernel, *given)
    assert "hopper" not in launch.ran and "forward" in launch.ran


def test_one_descale(kernel, device):
    """Those that are not given are 1; a view of one number will do."""
    q, k, v, descales, options = make_float8(BY_NAME["causal"], device)
    ones = torch.ones_like(descales[0])
    for i, name in enumerate(SIDES):
        gains = [descales[0] if i == j else ones for j in range(3)]
        want, _, _ = call(kernel, q, k, v, options, **dict(zip(SIDES, gains)))
        got, _, _ = call(kernel, q, k, v, options, **{name: descales[0]})
        assert torch.equal(got, want)
    half = torch.full((1, 1), 0.5, device=device).expand_as(ones)
    got, _, _ = call(kernel, q, k, v, options, v_descale=half)
    want, _, _ = call(kernel, q, k, v, options)
    torch.testing.assert_close(got, want / 2)


def test_zeros(kernel, device):
    """Keys that are all 0, and so is their scale: every query takes the mean of what it sees."""
    q, k, v = (torch.randn(1, 300, 2, 64, device=device).to(torch.float8_e4m3fn) for _ in "qkv")
    none = torch.zeros(1, 2, device=device)
    out = kernel.flash_attn_func(q, torch.zeros_like(k), v, causal=True, k_descale=none)
    counts = torch.arange(1, 301, device=device)[None, :, None, None]
    want = v.float().cumsum(1) / counts
    torch.testing.assert_close(out.float(), want, rtol=0.02, atol=0.01)


def test_nan_of_another_sequence(kernel, device):
    """0 * NaN is NaN: none reaches the sequence before."""
    lens = torch.tensor([0, 130, 260], dtype=torch.int32, device=device)
    q, k, v = (torch.randn(260, 2, 64, device=device).to(torch.float8_e4m3fn) for _ in "qkv")
    for tensor in (k, v):
        tensor[130:] = torch.nan
    out = kernel.flash_attn_varlen_func(q, k, v, lens, lens, 130, 130)
    assert torch.isfinite(out[:130]).all() and torch.isnan(out[130:]).all()


@pytest.mark.parametrize(
    "change, error, match",
    (
        ({"q_descale": torch.ones(2, 6)}, ValueError, r"q_descale must have shape.*\(2, 2\)"),
        ({"k_descale": torch.ones(2, 2).half()}, TypeError, "k_descale must be float32"),
        ({"v_descale": 0.5}, TypeError, "v_descale must be a tensor"),
        ({"dropout_p": 0.1}, NotImplementedError, "dropout_p must be 0.0 with float8.*bfloat16"),
    ),
    ids=("shape", "dtype", "number", "dropout"),
)
def test_errors(kernel, device, change, error, match):
    q, k, v = (
        torch.zeros(2, 40, heads, 32, device=device).to(torch.float8_e4m3fn) for heads in (6, 2, 2)
    )
    change = {n: x.to(device) if isinstance(x, torch.Tensor) else x for n, x in change.items()}
    with pytest.raises(error, match=match):
        kernel.flash_attn_func(q, k, v, **change)


def test_no_gradient(kernel, device):
    q, k, v, _, _ = make_float8(BY_NAME["causal"], device)
    with pytest.raises(NotImplementedError, match="no gradient through float8"):
        kernel.flash_attn_func(q.requires_grad_(), k, v)
    with torch.no_grad():
        assert not kernel.flash_attn_func(q, k, v).requires_grad

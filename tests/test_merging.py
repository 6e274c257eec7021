"""flash_attn_combine and merge_attention_states: attention over parts of the keys, merged."""

import pytest
import torch
from conftest import HAS_GPU
from reference import attend


def parts_of(splits, packed, device, dtype=torch.float64):
    """Attention of 7 queries to 40 keys over `splits` parts of them -> (outs, lses, out, lse)."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(n, 3, 16, dtype=torch.float64, device=device) for n in (7, 40, 40))
    ends = [40 * s // splits for s in range(splits + 1)]
    parts = [attend(q, k[a:b], v[a:b], 0.25, False) for a, b in zip(ends, ends[1:])]
    outs = torch.stack([out for out, _ in parts]).to(dtype)
    lses = torch.stack([lse.T for _, lse in parts]).float()
    out, lse = attend(q, k, v, 0.25, False)
    if not packed:
        outs, lses, out, lse = outs[:, None], lses[:, None], out[None], lse[None]
    return outs, lses, out, lse.transpose(-1, -2)


@pytest.fixture(autouse=True, params=("op", "interpreter") if not HAS_GPU else ("op",))
def _interpreted(request, module, monkeypatch):
    """Without a GPU, every test twice: by the CPU op, and by the kernel in Triton's interpreter."""
    if request.param == "interpreter":
        launch = module("flash_attention_kernel.launch")
        monkeypatch.setattr(module("ops"), "combine", launch.combine)


@pytest.mark.parametrize("splits", (1, 2, 5, 40))
@pytest.mark.parametrize("packed", (False, True))
@pytest.mark.parametrize("out_dtype", (None, torch.float16))
def test_combine(kernel, device, splits, packed, out_dtype):
    outs, lses, want, want_lse = parts_of(splits, packed, device, torch.float32)
    out, lse = kernel.flash_attn_combine(outs, lses, out_dtype=out_dtype)
    assert out.dtype == (out_dtype or torch.float32)
    tolerance = 1e-5 if out_dtype is None else 1e-2
    torch.testing.assert_close(out.double(), want, rtol=tolerance, atol=tolerance)
    torch.testing.assert_close(lse.double(), want_lse, rtol=1e-5, atol=1e-5)
    target = torch.empty_like(out)
    same, _ = kernel.flash_attn_combine(outs, lses, out=target)
    assert same is target and torch.equal(target, out)


@pytest.mark.parametrize("infinity", (float("inf"), float("-inf")))
def test_parts_without_keys(kernel, device, infinity):
    """Their out is not read; a row without any keys gives 0 and +inf."""
    outs, lses, want, _ = parts_of(3, False, device, torch.float32)
    empty = torch.full_like(outs[:1], torch.nan)
    outs, lses = torch.cat([empty, outs]), torch.cat([torch.full_like(lses[:1], infinity), lses])
    lses[:, 0, 2] = infinity
    out, lse = kernel.flash_attn_combine(outs, lses)
    assert not out[0, 2].any() and (lse[0, 2] == float("inf")).all()
    rows = [0, 1, 3, 4, 5, 6]
    torch.testing.assert_close(out[0, rows].double(), want[0, rows], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("packed", (False, True))
def test_merge(kernel, device, packed):
    """Two halves of the keys, as flash_attn_func returns them, with gradients through both."""
    torch.manual_seed(0)
    shape = (9, 2, 32) if packed else (2, 9, 2, 32)
    leaves = [torch.randn(shape, device=device, requires_grad=True) for _ in range(3)]
    dout = torch.randn(shape, device=device)
    ends = torch.tensor([0, 9], dtype=torch.int32, device=device)

    def attention(q, k, v, part):
        if not packed:
            return kernel.flash_attn_func(q, k[:, part], v[:, part], return_attn_probs=True)[:2]
        rows = k[part].shape[0]
        cu_k = ends if rows == 9 else torch.tensor([0, rows], dtype=torch.int32, device=device)
        return kernel.flash_attn_varlen_func(
            q, k[part], v[part], ends, cu_k, 9, rows, return_attn_probs=True
        )[:2]

    whole = attention(*leaves, slice(0, 9))
    merged = kernel.merge_attention_states(
        *attention(*leaves, slice(0, 4)), *attention(*leaves, slice(4, 9))
    )
    dlse = torch.randn_like(whole[1])
    for got, want in zip(merged, whole):
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)
    grads = [torch.autograd.grad(results, leaves, (dout, dlse)) for results in (merged, whole)]
    for got, want in zip(*grads):
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4)


def test_errors(kernel, device):
    outs, lses, _, _ = parts_of(3, False, device, torch.float32)
    with pytest.raises(ValueError, match="lse_partial"):
        kernel.flash_attn_combine(outs, lses[:2])
    with pytest.raises(ValueError, match="out_partial"):
        kernel.flash_attn_combine(outs[0, 0], lses[0, 0])
    with pytest.raises(TypeError, match="out_dtype"):
        kernel.flash_attn_combine(outs, lses, out_dtype=torch.int32)
    with pytest.raises(ValueError, match="out must"):
        kernel.flash_attn_combine(outs, lses, out=outs)
    with pytest.raises(ValueError, match="out_b"):
        kernel.merge_attention_states(outs[0], lses[0], outs[0, :, :2], lses[0])

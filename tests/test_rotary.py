"""apply_rotary_emb against complex multiplication, and its kernel in the interpreter."""

import pytest
import torch
from cases import cumulative
from conftest import HAS_GPU


def tables(rows, half, device, dtype=torch.float32):
    angles = torch.rand(rows, half, device=device) * 6.28
    return angles.cos().to(dtype), angles.sin().to(dtype)


def turned(x, cos, sin, pos, interleaved):
    """x [rows, heads, d] times exp(i angle), float64, at positions `pos` [rows]."""
    half = cos.shape[1]
    known = (pos >= 0) & (pos < cos.shape[0])
    at = pos.clamp(0, cos.shape[0] - 1)
    turn = torch.complex(cos.double()[at], sin.double()[at])
    turn = torch.where(known[:, None], turn, 1.0)[:, None]  # [rows, 1, half]
    part = x[..., : 2 * half].double()
    if interleaved:
        pairs = torch.view_as_complex(part.unflatten(-1, (half, 2)).contiguous()) * turn
        part = torch.view_as_real(pairs).flatten(-2)
    else:
        pairs = torch.complex(part[..., :half], part[..., half:]) * turn
        part = torch.cat([pairs.real, pairs.imag], -1)
    return torch.cat([part, x[..., 2 * half :].double()], -1)


CASES = [  # head_dim, rotary_dim, offsets
    (64, 64, 0),
    (64, 32, 5),
    (40, 24, "each"),
    (128, 2, 60),  # past the tables' end
]


@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("head_dim, rotary_dim, offset", CASES)
@pytest.mark.parametrize("packed", (False, True))
def test_rotary(kernel, device, interleaved, head_dim, rotary_dim, offset, packed):
    cos, sin = tables(70, rotary_dim // 2, device)
    batch, seqlen, lens = 3, 33, (40, 0, 59)
    starts = [7, 20, 0] if offset == "each" else [offset] * batch
    offsets = torch.tensor(starts, device=device) if offset == "each" else offset
    x = torch.randn(batch * seqlen, 3, head_dim, device=device)
    options = {"interleaved": interleaved, "seqlen_offsets": offsets}
    if packed:
        pos = torch.cat([torch.arange(n) + s for n, s in zip(lens, starts)])
        options.update(cu_seqlens=cumulative(lens, device), max_seqlen=59)
    else:
        pos = torch.cat([torch.arange(seqlen) + s for s in starts])
        x = x.view(batch, seqlen, 3, head_dim)
    x.requires_grad_()
    pos = pos.to(device)
    want = turned(x.reshape(-1, 3, head_dim), cos, sin, pos, interleaved).view(x.shape)
    out = kernel.apply_rotary_emb(x, cos, sin, **options)
    torch.testing.assert_close(out.double(), want, rtol=1e-5, atol=1e-5)
    weight = torch.randn_like(out)
    (got,) = torch.autograd.grad(out, x, weight)
    (expected,) = torch.autograd.grad(want, x, weight.double())
    torch.testing.assert_close(got, expected.float(), rtol=1e-5, atol=1e-5)
    y = x.detach().clone()
    assert kernel.apply_rotary_emb(y, cos, sin, inplace=True, **options) is y
    torch.testing.assert_close(y, out.detach(), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_strided_half_precision(kernel, device, dtype):
    """q and k inside a packed projection, turned in place; its v stays."""
    qkv = torch.randn(2, 20, 3, 4, 64, device=device).to(dtype)
    cos, sin = tables(20, 32, device, dtype)
    before = qkv.clone()
    kernel.apply_rotary_emb(qkv[:, :, 1], cos, sin, inplace=True)
    assert torch.equal(qkv[:, :, (0, 2)], before[:, :, (0, 2)])
    pos = torch.arange(20, device=device).repeat(2)
    want = turned(before[:, :, 1].reshape(40, 4, 64), cos, sin, pos, False).view(2, 20, 4, 64)
    torch.testing.assert_close(qkv[:, :, 1].double(), want, rtol=1e-2, atol=1e-2)


@pytest.mark.skipif(HAS_GPU, reason="the kernel is compiled where there is a GPU")
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("packed", (False, True))
def test_interpreted_kernel(module, packed, interleaved):
    """The Triton kernel equals the CPU op."""
    x = torch.randn(2, 37, 2, 24) if not packed else torch.randn(74, 2, 24)
    cu_seqlens = cumulative((30, 0, 40), "cpu") if packed else None
    offsets = torch.tensor([3, 0, 9][: 3 if packed else 2], dtype=torch.int32)
    options = (*tables(45, 10, "cpu"), cu_seqlens, offsets, 1, interleaved, True)
    want = module("cpu_cache").rotary(x, x.clone(), *options)
    got = module("flash_attention_kernel.launch").rotary(x, x.clone(), *options)
    torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_compile(kernel, device):
    x = torch.randn(1, 12, 2, 16, device=device).requires_grad_()
    cos, sin = tables(20, 8, device)
    step = torch.compile(kernel.apply_rotary_emb, backend="aot_eager", fullgraph=True)
    out = step(x, cos, sin)
    torch.testing.assert_close(out, kernel.apply_rotary_emb(x, cos, sin))
    (got,) = torch.autograd.grad(out.sum(), x)
    (want,) = torch.autograd.grad(kernel.apply_rotary_emb(x, cos, sin).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize(
    "change, error, match",
    (
        ({"cos": torch.ones(9, 20)}, ValueError, "cos and sin"),
        ({"cos": torch.ones(9, 9), "sin": torch.ones(9, 9)}, ValueError, "at most.*8 columns"),
        ({"x": torch.ones(2, 9, 16)}, ValueError, "x must be"),
        ({"seqlen_offsets": torch.ones(3).int()}, ValueError, "seqlen_offsets"),
        ({"seqlen_offsets": 1.5}, TypeError, "seqlen_offsets must be an integer, got float"),
        ({"cu_seqlens": torch.ones(3)}, ValueError, "cu_seqlens"),
    ),
    ids=("shape", "width", "rank", "offsets", "float", "cu"),
)
def test_errors(kernel, change, error, match):
    arguments = {"x": torch.ones(2, 9, 1, 16), "cos": torch.ones(9, 8), "sin": torch.ones(9, 8)}
    with pytest.raises(error, match=match):
        kernel.apply_rotary_emb(**{**arguments, **change})

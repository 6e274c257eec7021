"""nn.Modules and Hub layers against the functions and the oracle."""

import pytest
import torch
from cases import cumulative
from conftest import ROOT
from reference import attention
from torch import nn


@pytest.fixture(autouse=True)
def _float32_products():
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


def test_self_attention(kernel, device):
    slopes = torch.tensor(kernel.get_alibi_slopes(4), device=device)
    module = kernel.FlashSelfAttention(
        causal=True, softmax_scale=0.2, window_size=(20, 0), alibi_slopes=slopes
    )
    options = {"causal": True, "softmax_scale": 0.2, "window_size": (20, 0)}
    qkv = torch.randn(2, 50, 3, 4, 32, device=device)
    want, _ = attention(*qkv.unbind(2), alibi_slopes=slopes, **options)
    torch.testing.assert_close(module(qkv), want, rtol=1e-4, atol=1e-5)
    full, _ = attention(*qkv.unbind(2), alibi_slopes=slopes, **{**options, "causal": False})
    torch.testing.assert_close(module(qkv, causal=False), full, rtol=1e-4, atol=1e-5)
    cu = cumulative((50, 50), device)
    packed = module(qkv.flatten(0, 1), cu_seqlens=cu, max_seqlen=50)
    torch.testing.assert_close(packed, want.flatten(0, 1), rtol=1e-4, atol=1e-5)
    assert not module.state_dict()


def test_cross_attention_and_dropout(kernel, device):
    q, kv = torch.randn(2, 30, 4, 32, device=device), torch.randn(2, 70, 2, 2, 32, device=device)
    module = kernel.FlashCrossAttention(attention_dropout=0.5)
    torch.manual_seed(1)
    dropped = module(q, kv)
    torch.manual_seed(1)
    assert torch.equal(dropped, kernel.flash_attn_kvpacked_func(q, kv, dropout_p=0.5))
    want, _ = attention(q, *kv.unbind(2))
    torch.testing.assert_close(module.eval()(q, kv), want, rtol=1e-4, atol=1e-5)


def test_flash_attention_1(kernel, device):
    """The module of flash_attn 1: padding in, zeros out."""
    module = kernel.FlashAttention().eval()
    qkv = torch.randn(2, 20, 3, 2, 16, device=device)
    mask = torch.arange(20, device=device) < torch.tensor([[20], [7]], device=device)
    out, weights = module(qkv, key_padding_mask=mask, causal=True)
    assert weights is None
    want, _ = attention(*qkv[1:, :7].unbind(2), causal=True)
    torch.testing.assert_close(out[1:, :7], want, rtol=1e-4, atol=1e-5)
    assert (out[1, 7:] == 0).all()
    with pytest.raises(NotImplementedError, match="need_weights"):
        module(qkv, need_weights=True)


def plain_mha(mha, x, x_kv, causal, base=10000.0):
    """MHA from its definition, with the module's weights, for one unpadded batch."""
    if mha.cross_attn:
        q, kv = mha.Wq(x), mha.Wkv(x_kv)
    else:
        q, kv = mha.Wqkv(x).tensor_split((x.shape[-1],), -1)
    q = q.unflatten(-1, (mha.num_heads, mha.head_dim))
    k, v = kv.unflatten(-1, (2, mha.num_heads_kv, mha.head_dim)).unbind(-3)
    if mha.rotary_emb is not None:
        dim = mha.rotary_emb.dim
        freq = base ** -(torch.arange(0, dim, 2, device=x.device) / dim)
        turn = (
            torch.polar(torch.ones(1, device=x.device), freq)[None]
            ** (torch.arange(x.shape[1], device=x.device)[:, None])
        )

        def rotate(t):
            pairs = torch.complex(t[..., : dim // 2], t[..., dim // 2 : dim]) * turn[:, None]
            return torch.cat([pairs.real, pairs.imag, t[..., dim:]], -1)

        q, k = rotate(q), rotate(k)
    slopes = mha.inner_attn.alibi_slopes
    out, _ = attention(q, k, v, causal=causal, alibi_slopes=slopes)
    return mha.out_proj(out.flatten(-2))


OPTIONS = {
    "plain": {"causal": True},
    "gqa-rotary": {"num_heads_kv": 2, "rotary_emb_dim": 16, "causal": True},
    "alibi": {"use_alibi": True, "causal": True},
    "rotary": {"rotary_emb_dim": 8},
    "cross": {"cross_attn": True},
    "cross-gqa": {"cross_attn": True, "num_heads_kv": 1, "qkv_proj_bias": False},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_mha(kernel, device, name):
    options = OPTIONS[name]
    mha = kernel.MHA(64, 4, device=device, **options)
    x = torch.randn(2, 30, 64, device=device, requires_grad=True)
    x_kv = torch.randn(2, 45, 64, device=device) if mha.cross_attn else None
    want = plain_mha(mha, x, x_kv, options.get("causal", False))
    got = mha(x, x_kv)
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)
    parameters = [x, *mha.parameters()]
    for a, b in zip(*(torch.autograd.grad(t.square().sum(), parameters) for t in (got, want))):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)
    if not mha.cross_attn:
        mask = torch.arange(30, device=device) < torch.tensor([[30], [11]], device=device)
        short = plain_mha(mha, x[1:, :11], None, options.get("causal", False))
        padded = mha(x, key_padding_mask=mask)
        torch.testing.assert_close(padded[1:, :11], short, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("heads_k", (4, 2))
@pytest.mark.parametrize("by_sample", (False, True))
@torch.no_grad()
def test_mha_with_a_cache(kernel, device, heads_k, by_sample):
    """A prompt, then a token at a time, equals all at once."""
    torch.manual_seed(0)
    mha = kernel.MHA(
        64, 4, heads_k, causal=True, rotary_emb_dim=16, use_alibi=True, window_size=(9, 0),
        layer_idx=3, device=device,
    ).eval()  # fmt: skip
    x = torch.randn(2, 14, 64, device=device)
    params = kernel.InferenceParams(max_seqlen=20, max_batch_size=5, batch_size_offset=2)
    parts = []
    for rows in (slice(0, 9), *(slice(i, i + 1) for i in range(9, 14))):
        params.seqlen_offset = rows.start
        if by_sample:
            params.lengths_per_sample = torch.full((2,), rows.start, device=device).int()
        parts.append(mha(x[:, rows], inference_params=params))
    torch.testing.assert_close(torch.cat(parts, 1), mha(x), rtol=1e-4, atol=1e-5)
    assert params.key_value_memory_dict[3].shape == (5, 20, 2, heads_k, 16)
    with pytest.raises(NotImplementedError, match="inference_params"):
        mha(x, cu_seqlens=torch.zeros(1), inference_params=params)
    with pytest.raises(ValueError, match="layer_idx"):
        kernel.MHA(64, 4, device=device)(x, inference_params=params)


def test_mha_errors(kernel):
    with pytest.raises(ValueError, match="embed_dim"):
        kernel.MHA(63, 4)
    with pytest.raises(ValueError, match="num_heads_kv"):
        kernel.MHA(64, 4, 3)
    with pytest.raises(ValueError, match="x_kv"):
        kernel.MHA(64, 4, cross_attn=True)(torch.ones(1, 2, 64))


def test_alibi_slopes(kernel):
    """The values of the paper, and of its reference code for a number that is no power of two."""
    assert kernel.get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    twelve = [2.0**-i for i in range(1, 9)] + [2.0 ** -(i + 0.5) for i in range(4)]
    assert kernel.get_alibi_slopes(12) == pytest.approx(twelve)


def test_kernelize(kernel, device):
    """A module of the user's gets the layer's forward, and keeps its own attributes."""
    from kernels import (
        LocalLayerRepository,
        Mode,
        kernelize,
        register_kernel_mapping,
        use_kernel_forward_from_hub,
    )

    @use_kernel_forward_from_hub("TestSelfAttention")
    class SelfAttention(nn.Module):
        def __init__(self):
            super().__init__()
            self.causal, self.softmax_scale, self.drop = True, 0.3, nn.Dropout(0.0)

        def forward(self, qkv, causal=None, cu_seqlens=None, max_seqlen=None):
            raise AssertionError("the layer was not replaced")

    repository = LocalLayerRepository(ROOT, layer_name="SelfAttention")
    register_kernel_mapping({"TestSelfAttention": {device.type: repository}})
    module = kernelize(SelfAttention(), mode=Mode.TRAINING | Mode.TORCH_COMPILE, device=device.type)
    qkv = torch.randn(2, 20, 3, 2, 16, device=device)
    want = kernel.flash_attn_qkvpacked_func(qkv, softmax_scale=0.3, causal=True)
    assert torch.equal(module(qkv), want)


def test_layers_are_bare(kernel):
    """The Hub's rule: no __init__, no members beside forward and the two flags."""
    for name in ("SelfAttention", "CrossAttention"):
        members = {m for m in vars(getattr(kernel.layers, name)) if not m.startswith("__")}
        assert members == {"forward", "can_torch_compile", "has_backward"}

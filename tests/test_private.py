"""flash_attn's private functions, and a package that imports them."""

import subprocess
import sys
from importlib.util import find_spec

import pytest
import torch
from cases import BY_NAME, make
from checking import call


def public(kernel, q, k, v, dout, options):
    """(out, lse, dq, dk, dv) of the public functions: no gradient of alibi_slopes, which the
    private ones do not give, and with which other kernels may run."""
    leaves = [t.detach().requires_grad_() for t in (q, k, v)]
    out, lse, _ = call(kernel, *leaves, options, deterministic=True)
    return (out, lse, *torch.autograd.grad(out, leaves, dout))


@pytest.mark.parametrize("name", ("gqa", "window", "softcap", "alibi-batch-causal", "dropout-gqa"))
def test_dense(kernel, device, name):
    """Results and gradients equal those of the public function, bit for bit."""
    q, k, v, dout, _, options = make(BY_NAME[name], torch.float16, device)
    want = public(kernel, q, k, v, dout, options)
    p, causal = options.get("dropout_p", 0.0), options["causal"]
    shared = (*options.get("window_size", (-1, -1)), options.get("softcap", 0.0))
    slopes = options.get("alibi_slopes")
    torch.manual_seed(7)
    scale = q.shape[-1] ** -0.5
    forward = kernel._flash_attn_forward
    out, lse, probs, rng_state = forward(q, k, v, p, scale, causal, *shared, slopes, p > 0)
    assert (probs is None) == (p == 0) == (rng_state is None)
    grads = [torch.empty_like(t) for t in (q, k, v)]
    options = (p, scale, causal, *shared, slopes, True, rng_state)
    softmax_d = kernel._flash_attn_backward(dout, q, k, v, out, lse, *grads, *options)
    for got, expected in zip((out, lse, *grads), want):
        assert torch.equal(got, expected)
    want_d = (out.double() * dout).sum(-1).transpose(1, 2)
    torch.testing.assert_close(softmax_d.double(), want_d, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ("varlen", "window-varlen", "dropout-varlen"))
def test_varlen(kernel, device, name):
    q, k, v, dout, _, options = make(BY_NAME[name], torch.float16, device)
    want = public(kernel, q, k, v, dout, options)
    p, causal = options.get("dropout_p", 0.0), options["causal"]
    window = options.get("window_size", (-1, -1))
    lengths = (options["cu_seqlens_q"], options["cu_seqlens_k"], 130, 130)
    torch.manual_seed(7)
    scale = q.shape[-1] ** -0.5
    out, lse, _, rng_state = kernel._flash_attn_varlen_forward(
        q, k, v, *lengths, p, scale, causal, *window
    )
    grads = [torch.empty_like(t) for t in (q, k, v)]
    kernel._flash_attn_varlen_backward(
        dout, q, k, v, out, lse, *grads, *lengths, p, scale, causal, *window, 0.0, None, True,
        rng_state,
    )  # fmt: skip
    for got, expected in zip((out, lse, *grads), want):
        assert torch.equal(got, expected)


def test_errors(kernel, device):
    q, k, v, dout, _, options = make(BY_NAME["causal"], torch.float16, device)
    out, lse, _ = call(kernel, q, k, v, options)
    grads = (None, None, None)
    with pytest.raises(ValueError, match="rng_state"):
        kernel._flash_attn_backward(
            dout, q, k, v, out, lse, *grads, 0.1, 1.0, True, -1, -1, 0.0, None, False
        )


RING = """
import sys, torch
from types import ModuleType
import torch.distributed as dist
from kernels import get_kernel
kernel = get_kernel("org/flash-attention", version=1, backend="cpu")
flash_attn, interface = ModuleType("flash_attn"), ModuleType("flash_attn.flash_attn_interface")
for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
    setattr(interface, f"_flash_attn_{name}", getattr(kernel, f"_flash_attn_{name}"))
flash_attn.flash_attn_interface, flash_attn.__version__ = interface, "2.7.4"
adapters = ModuleType("ring_flash_attn.adapters")  # for transformers versions gone by
adapters.substitute_hf_flash_attn = adapters.update_ring_flash_attn_params = None
sys.modules.update({
    "flash_attn": flash_attn,
    "flash_attn.flash_attn_interface": interface,
    "ring_flash_attn.adapters": adapters,
})
from ring_flash_attn import ring_flash_attn_func
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
torch.manual_seed(0)
whole = [torch.randn(1, 64, 4, 32).bfloat16() for _ in range(4)]
mine = [t.chunk(2, 1)[rank].contiguous().requires_grad_() for t in whole[:3]]
dout = whole[3].chunk(2, 1)[rank].contiguous()
out = ring_flash_attn_func(*mine, causal=True)
got = (out, *torch.autograd.grad(out, mine, dout))
whole[:3] = [t.requires_grad_() for t in whole[:3]]
out = kernel.flash_attn_func(*whole[:3], causal=True)
want = (out, *torch.autograd.grad(out, whole[:3], whole[3]))
for a, b in zip(got, want):
    torch.testing.assert_close(a.float(), b.chunk(2, 1)[rank].float(), rtol=2e-2, atol=2e-2)
"""


def test_ring_flash_attn(tmp_path):
    """PyPI's ring-flash-attn, which imports these functions, over two processes."""
    pytest.importorskip("torch.distributed")
    if find_spec("ring_flash_attn") is None:
        pytest.skip("needs ring-flash-attn")
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", RING, str(rank), str(tmp_path / "store")],
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors

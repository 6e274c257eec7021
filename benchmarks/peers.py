"""The shapes that are measured, and who is measured on them: ours, SDPA's backends, flex."""

import functools
import os
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

ROOT = Path(__file__).resolve().parent.parent
REPO = "org/flash-attention"
SDPA_BACKENDS = {
    "sdpa-flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa-efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa-math": SDPBackend.MATH,
}
versions = {}  # name -> root of another checkout of ours, with its build: a peer of that name
MATH_LIMIT = 1 << 31  # sdpa-math stores the scores: skipped where they number more than this


class Shape(NamedTuple):
    """One point: every peer gets q, k, v of this shape, random or zeros. An H200 at its power limit
    slows down; zeros, which toggle no bits, it multiplies at its full clock, and figures repeat to
    0.6 %: they compare schedules, random data what is gained by them."""

    batch_size: int
    num_heads: int
    seq_len: int
    head_dim: int
    causal: bool
    dtype: str = "bfloat16"
    zeros: bool = False

    def flops(self, backward=False) -> float:
        """The usual count: 4 B H N² D forward, half if causal, 2.5 times that backward."""
        count = 4.0 * self.batch_size * self.num_heads * self.seq_len**2 * self.head_dim
        return count * (0.5 if self.causal else 1.0) * (2.5 if backward else 1.0)


# The twelve points of ANCHORS.md: 16,384 tokens, nheads x head_dim = 2,048.
ANCHORS = tuple(
    Shape(16384 // n, 2048 // d, n, d, causal)
    for d in (128, 64)
    for causal in (False, True)
    for n in (1024, 4096, 16384)
)


@functools.lru_cache(maxsize=None)
def load_kernel(version=None):
    """Our package, from the local build unless LOCAL_KERNELS says else; or one of `versions`."""
    from kernels import get_kernel

    os.environ.setdefault("LOCAL_KERNELS", f"{REPO}={ROOT}")
    if version is None:
        return get_kernel(REPO, version=1)
    os.environ["LOCAL_KERNELS"] += f":org/{version}={versions[version]}"
    return get_kernel(f"org/{version}", version=1)


def random_inputs(shape: Shape, device):
    """q, k, v, dout in [batch, seqlen, heads, head_dim], requiring grad but for dout; all zeros if
    the shape says so."""
    size = (shape.batch_size, shape.seq_len, shape.num_heads, shape.head_dim)
    new = torch.zeros if shape.zeros else torch.randn
    dtype = getattr(torch, shape.dtype)
    if dtype == torch.float8_e4m3fn:
        return (*(new(size, device=device).to(dtype) for _ in range(3)), None)
    q, k, v, dout = (new(size, device=device, dtype=dtype) for _ in range(4))
    return q.requires_grad_(), k.requires_grad_(), v.requires_grad_(), dout


def ours(q, k, v, shape: Shape, version=None, **options):
    return load_kernel(version).flash_attn_func(q, k, v, causal=shape.causal, **options)


def sdpa(q, k, v, shape: Shape, backend):
    """SDPA with one backend; raises RuntimeError where that backend cannot."""
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=shape.causal).transpose(1, 2)


@functools.lru_cache(maxsize=None)
def _compiled_flex():
    from torch.nn.attention.flex_attention import flex_attention

    torch._dynamo.config.cache_size_limit = 64  # one graph per point
    torch._functorch.config.donated_buffer = False  # its backward is timed with retain_graph
    return torch.compile(flex_attention, dynamic=False)


@functools.lru_cache(maxsize=None)
def _causal_block_mask(seq_len, device):
    from torch.nn.attention.flex_attention import create_block_mask

    def causal(b, h, q_idx, kv_idx):
        return q_idx >= kv_idx

    return create_block_mask(causal, None, None, seq_len, seq_len, device=device)


def flex(q, k, v, shape: Shape):
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    mask = _causal_block_mask(shape.seq_len, q.device) if shape.causal else None
    return _compiled_flex()(q, k, v, block_mask=mask).transpose(1, 2)


def peers(shape: Shape, device_type: str, only=None):
    """Name -> function(q, k, v) for everyone who can take part at this point."""
    who = {"ours": functools.partial(ours, shape=shape)}
    who.update((name, functools.partial(ours, shape=shape, version=name)) for name in versions)
    if only is not None:
        who["ours-deterministic"] = functools.partial(ours, shape=shape, deterministic=True)
    for name, backend in SDPA_BACKENDS.items():
        scores = shape.batch_size * shape.num_heads * shape.seq_len**2
        if name == "sdpa-math" and scores > MATH_LIMIT:
            continue
        if device_type == "cpu" and name in ("cudnn", "sdpa-efficient"):
            continue
        who[name] = functools.partial(sdpa, shape=shape, backend=backend)
    if device_type != "cpu":  # on a CPU it would spend minutes in the C++ compiler
        who["flex"] = functools.partial(flex, shape=shape)
    return {name: fn for name, fn in who.items() if only is None or name in only}

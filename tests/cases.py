"""Named rows: every shape, mask and option that an implementation must get right."""

from typing import NamedTuple, Optional, Tuple

import torch


class Case(NamedTuple):
    """A problem without its data. Packed if `lens_q` is given, else `batch` sequences."""

    name: str
    seqlen_q: int = 0
    seqlen_k: int = 0
    batch: int = 2
    nheads: int = 2
    nheads_k: int = 2
    head_dim: int = 32
    head_dim_v: Optional[int] = None
    causal: bool = False
    softmax_scale: Optional[float] = None
    lens_q: Optional[Tuple[int, ...]] = None
    lens_k: Optional[Tuple[int, ...]] = None
    tail: int = 0  # rows past cu_seqlens[-1]
    use_lse: bool = False  # a gradient reaches lse, too

    @property
    def varlen(self):
        return self.lens_q is not None


MASKS = [
    Case("full", 100, 100),
    Case("full-cross", 70, 150),
    Case("causal", 128, 128, causal=True),
    Case("causal-more-keys", 67, 200, causal=True),
    Case("causal-more-queries", 200, 67, causal=True),  # rows without keys
    Case("causal-one-query", 1, 130, causal=True),
    Case("one-key", 65, 1),
    Case("one-by-one", 1, 1),
    Case("long", 300, 1100, nheads=1, nheads_k=1),
    Case("long-causal", 600, 600, batch=1, nheads=1, nheads_k=1, causal=True),
]
HEADS = [
    Case("mqa", 90, 110, nheads=4, nheads_k=1),
    Case("gqa", 90, 110, nheads=6, nheads_k=2, causal=True),
    Case("gqa-short-keys", 40, 5, nheads=6, nheads_k=2, causal=True),
    Case("odd-heads", 50, 60, nheads=5, nheads_k=5),
]
HEAD_DIMS = [
    Case(f"dim-{d}{'-causal' if d % 2 else ''}", 45, 70, batch=1, head_dim=d, causal=bool(d % 2))
    for d in (1, 2, 3, 8, 16, 40, 59, 64, 72, 80, 96, 111, 128, 160, 192, 224, 256)
] + [
    Case(f"dim-{d}-{dv}", 45, 70, batch=1, head_dim=d, head_dim_v=dv, causal=True)
    for d, dv in ((192, 128), (64, 32), (32, 64), (59, 1), (1, 59), (128, 256), (64, 16))
]
SCALES = [
    Case("scale-0", 40, 50, softmax_scale=0.0),
    Case("scale-negative", 40, 50, softmax_scale=-0.3, causal=True),
    Case("scale-tiny", 40, 50, softmax_scale=1e-6),
    Case("scale-one", 40, 50, softmax_scale=1.0, causal=True),
]
EMPTY = [
    Case("no-queries", 0, 10),
    Case("no-keys", 10, 0),
    Case("no-keys-causal", 10, 0, causal=True),
    Case("no-batch", 10, 10, batch=0),
]
VARLEN = [
    Case("varlen", lens_q=(20, 75, 1, 130), lens_k=(20, 75, 1, 130), causal=True),
    Case("varlen-full", lens_q=(33, 64), lens_k=(90, 17)),
    Case("varlen-gqa", nheads=4, lens_q=(33, 64, 5), lens_k=(90, 17, 40), causal=True),
    Case("varlen-empty-queries", lens_q=(0, 40, 0), lens_k=(30, 40, 9)),
    Case("varlen-empty-keys", lens_q=(30, 40, 9), lens_k=(0, 40, 0), causal=True),
    Case("varlen-all-empty", lens_q=(0, 0), lens_k=(0, 0)),
    Case("varlen-no-sequence", lens_q=(), lens_k=()),
    Case("varlen-decode", nheads=4, lens_q=(1, 0, 1, 1), lens_k=(50, 0, 7, 129), causal=True),
    Case("varlen-tail", lens_q=(20, 30), lens_k=(40, 10), tail=77, causal=True),
    Case("varlen-many", lens_q=(3,) * 40, lens_k=(5,) * 40, causal=True),
    Case("varlen-dims", lens_q=(20, 31), lens_k=(25, 60), head_dim=64, head_dim_v=24),
]
LSE = [
    Case("lse-grad", 60, 70, use_lse=True),
    Case("lse-grad-rows-without-keys", 90, 40, causal=True, use_lse=True),
    Case("lse-grad-varlen", lens_q=(20, 31), lens_k=(0, 60), causal=True, use_lse=True),
]
CASES = MASKS + HEADS + HEAD_DIMS + SCALES + EMPTY + VARLEN + LSE
BY_NAME = {case.name: case for case in CASES}

# Small enough for Triton's interpreter, and one of every kind.
INTERPRETED = [
    Case("i-causal", 40, 40, batch=1, causal=True),
    Case(
        "i-cross-gqa", 20, 37, batch=1, nheads=4, nheads_k=2, head_dim=20, head_dim_v=9, causal=True
    ),
    Case("i-more-queries", 37, 20, batch=1, nheads=1, nheads_k=1, causal=True, use_lse=True),
    Case("i-scale-negative", 20, 20, batch=1, nheads=1, nheads_k=1, softmax_scale=-0.5),
    Case("i-no-keys", 5, 0, batch=1, nheads=1, nheads_k=1),
    Case(
        "i-varlen", nheads=2, nheads_k=1, lens_q=(17, 0, 20), lens_k=(20, 4, 9), tail=6, causal=True
    ),
    Case("i-varlen-empty-keys", nheads=1, nheads_k=1, lens_q=(3, 18), lens_k=(0, 18)),
]


def cumulative(lens, device):
    ends = torch.tensor([0, *lens], dtype=torch.int64).cumsum(0)
    return ends.to(torch.int32).to(device)


def make(case: Case, dtype, device, seed=0):
    """-> (q, k, v, dout, dlse, options for the oracle) on random data."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    d, dv = case.head_dim, case.head_dim_v or case.head_dim
    options = {"causal": case.causal, "softmax_scale": case.softmax_scale}
    if case.varlen:
        rows_q, rows_k = (sum(case.lens_q) + case.tail,), (sum(case.lens_k) + case.tail,)
        options["cu_seqlens_q"] = cumulative(case.lens_q, device)
        options["cu_seqlens_k"] = cumulative(case.lens_k, device)
    else:
        rows_q, rows_k = (case.batch, case.seqlen_q), (case.batch, case.seqlen_k)
    q = random(*rows_q, case.nheads, d)
    k, v = random(*rows_k, case.nheads_k, d), random(*rows_k, case.nheads_k, dv)
    dout = random(*rows_q, case.nheads, dv)
    dlse = random(*rows_q[:-1], case.nheads, rows_q[-1]).float() if case.use_lse else None
    return q, k, v, dout, dlse, options

"""Named rows: every shape, mask and option that an implementation must get right."""

from typing import NamedTuple, Optional, Tuple

import torch
from allpairspy import AllPairs


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
    window: Tuple[int, int] = (-1, -1)
    top_left: bool = False
    softcap: float = 0.0
    alibi: Optional[str] = None  # "heads" or "batch"
    sink: bool = False
    bias: Optional[str] = None  # the dimensions it has, of "bhqk", and "?" for a boolean one
    dropout_p: float = 0.0
    used: bool = False  # seqused_q, seqused_k
    leftpad: bool = False

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
    for d in (1, 2, 3, 8, 16, 40, 59, 64, 72, 80, 96, 111, 128, 160, 192, 224, 256, 257, 512)
] + [
    Case(f"dim-{d}-{dv}", 45, 70, batch=1, head_dim=d, head_dim_v=dv, causal=True)
    for d, dv in ((192, 128), (64, 32), (32, 64), (59, 1), (1, 59), (128, 256), (64, 16), (512, 64))
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
WINDOWS = [
    Case("window", 100, 100, window=(20, 10)),
    Case("window-left", 90, 150, window=(30, -1)),
    Case("window-right", 150, 90, window=(-1, 13)),
    Case("window-diagonal", 70, 70, window=(0, 0)),
    Case("window-causal", 300, 300, batch=1, window=(40, 7), causal=True),  # right counts as 0
    Case("window-empty-rows", 120, 40, window=(5, 3)),  # #11
    Case("window-right-past-the-end", 90, 40, window=(3, 60)),  # #12
    Case("window-wide", 60, 60, window=(1000, 2**40)),
    Case("window-long", 700, 900, batch=1, nheads=1, nheads_k=1, window=(130, 64)),
    Case("window-top-left", 90, 140, window=(20, 5), top_left=True),
    Case("window-varlen", lens_q=(70, 1, 40), lens_k=(90, 30, 0), window=(9, 2)),
    Case("causal-top-left", 90, 140, causal=True, top_left=True),
    Case("causal-top-left-more-queries", 140, 90, causal=True, top_left=True),
]
SCORES = [
    Case("softcap", 70, 90, softcap=2.0),
    Case("softcap-small", 70, 90, softcap=0.1, causal=True),
    Case("softcap-large", 70, 90, softcap=1e4),
    Case("alibi", 70, 90, nheads=4, alibi="heads"),
    Case("alibi-batch-causal", 90, 70, nheads=4, alibi="batch", causal=True),
    Case("alibi-top-left", 40, 70, nheads=4, alibi="heads", top_left=True),
    Case("alibi-varlen", nheads=4, lens_q=(30, 0, 50), lens_k=(60, 9, 20), alibi="batch", tail=5),
    Case("sink", 70, 90, nheads=4, sink=True),
    Case("sink-rows-without-keys", 90, 40, sink=True, causal=True, use_lse=True),
    Case("sink-varlen", nheads=4, lens_q=(30, 9, 0), lens_k=(60, 0, 9), sink=True, tail=40),
    Case("sink-no-keys", 10, 0, sink=True),
    Case("bias", 70, 90, bias="bhqk"),
    *(Case(f"bias-{b}", 70, 90, nheads=4, nheads_k=2, bias=b) for b in ("hqk", "bk", "qk", "bhq")),
    *(Case(f"bias-{b}", 50, 60, bias=b, causal=True) for b in ("k", "bqk", "?bhqk", "?bk", "?qk")),
    Case("bias-varlen", lens_q=(33, 64, 5), lens_k=(90, 17, 0), bias="bhqk"),
    Case("bias-varlen-bool", lens_q=(33, 64, 5), lens_k=(90, 17, 0), bias="?bk"),
]
DROPOUT = [
    Case("dropout", 100, 130, dropout_p=0.3),
    Case("dropout-tiny", 60, 60, dropout_p=1e-6),
    Case("dropout-most", 60, 60, dropout_p=0.9, causal=True),
    Case("dropout-gqa", 50, 140, nheads=6, nheads_k=2, dropout_p=0.5),
    Case("dropout-varlen", lens_q=(30, 9, 70), lens_k=(60, 0, 90), dropout_p=0.2, causal=True),
]
PARTS = [
    Case("used", lens_q=(30, 9, 70), lens_k=(60, 5, 90), used=True),
    Case("used-causal", lens_q=(30, 9, 70), lens_k=(60, 5, 90), used=True, causal=True, tail=9),
    Case("leftpad", lens_q=(30, 9, 70), lens_k=(60, 5, 90), leftpad=True, causal=True),
    Case("used-leftpad", nheads=4, lens_q=(30, 9, 70), lens_k=(60, 5, 90), used=True, leftpad=True),
]

LEVELS = {  # every pair of levels of two options is in some row of PAIRS
    "head_dim": (16, 32, 40, 59, 64, 80, 96, 111, 128, 160, 192, 224, 256, 512),
    "layout": ("dense", "more queries", "varlen", "parts"),
    "mask": ("full", "causal", "window", "left causal", "right", "top left"),
    "bias": (None, "bhqk", "hk", "?bqk"),
    "alibi": (None, "heads", "batch"),
    "heads": ((4, 4), (4, 2), (4, 1)),
    "softcap": (0.0, 3.0),
    "sink": (False, True),
    "dropout_p": (0.0, 0.25),
    "use_lse": (False, True),
}
LAYOUTS = {
    "dense": {"seqlen_q": 45, "seqlen_k": 83},
    "more queries": {"seqlen_q": 83, "seqlen_k": 45},
    "varlen": {"lens_q": (33, 0, 40), "lens_k": (47, 9, 21), "tail": 3},
    "parts": {"lens_q": (33, 9, 40), "lens_k": (47, 9, 21), "used": True, "leftpad": True},
}
VISIBLE = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (17, 9)},
    "left causal": {"window": (21, -1), "causal": True},
    "right": {"window": (-1, 6)},
    "top left": {"window": (30, 4), "top_left": True},
}


def pairs():
    """A pairwise cover of LEVELS."""
    for n, levels in enumerate(AllPairs([list(levels) for levels in LEVELS.values()])):
        row = dict(zip(LEVELS, levels))
        nheads, nheads_k = row.pop("heads")
        layout, mask = LAYOUTS[row.pop("layout")], VISIBLE[row.pop("mask")]
        yield Case(f"pair-{n}", nheads=nheads, nheads_k=nheads_k, **layout, **mask, **row)


PAIRS = list(pairs())
OPTIONS = WINDOWS + SCORES + DROPOUT + PARTS
CASES = MASKS + HEADS + HEAD_DIMS + SCALES + EMPTY + VARLEN + LSE + OPTIONS + PAIRS
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
    Case("i-window", 50, 40, batch=1, nheads=1, nheads_k=1, window=(9, 4)),
    Case(
        "i-window-left-causal", 40, 70, batch=1, nheads=1, nheads_k=1, window=(20, -1), causal=True
    ),
    Case("i-top-left", 20, 40, batch=1, nheads=1, nheads_k=1, top_left=True, window=(-1, 6)),
    Case("i-scores", 20, 37, nheads=2, nheads_k=1, softcap=2.0, alibi="batch", sink=True),
    Case("i-bias", 20, 37, nheads=2, nheads_k=1, bias="hqk"),
    Case("i-bias-shared-rows", 37, 20, nheads=2, nheads_k=1, bias="bk", causal=True),
    Case("i-bias-bool", 20, 20, bias="?bqk"),
    Case("i-dropout", 20, 37, batch=1, nheads=2, nheads_k=1, dropout_p=0.4, causal=True),
    Case(
        "i-parts",
        nheads=2,
        nheads_k=1,
        lens_q=(17, 5),
        lens_k=(30, 9),
        used=True,
        leftpad=True,
        alibi="heads",
        sink=True,
        causal=True,
    ),
    Case(
        "i-everything",
        nheads=2,
        nheads_k=1,
        lens_q=(17, 5),
        lens_k=(30, 9),
        tail=3,
        softcap=3.0,
        alibi="batch",
        sink=True,
        bias="bhqk",
        dropout_p=0.3,
        window=(12, 3),
        use_lse=True,
    ),
]


def cumulative(lens, device):
    ends = torch.tensor([0, *lens], dtype=torch.int64).cumsum(0)
    return ends.to(torch.int32).to(device)


def more_options(case: Case, random, device):
    """The options that a plain call has not."""
    options = {}
    batch = len(case.lens_q) if case.varlen else case.batch
    if case.window != (-1, -1):
        options["window_size"] = case.window
    if case.top_left:
        options["causal_alignment"] = "top-left"
    if case.softcap:
        options["softcap"] = case.softcap
    if case.dropout_p:
        options["dropout_p"] = case.dropout_p
    if case.alibi:
        shape = (case.nheads,) if case.alibi == "heads" else (batch, case.nheads)
        options["alibi_slopes"] = 0.3 * random(*shape).float().abs()
    if case.sink:
        options["s_aux"] = random(case.nheads)
    if case.bias:
        longest = (max(case.lens_q), max(case.lens_k)) if case.varlen else case[1:3]
        sizes = dict(zip("bhqk", (batch, case.nheads, *longest)))
        bias = random(*(size if name in case.bias else 1 for name, size in sizes.items()))
        options["attn_bias"] = bias > -0.8 if "?" in case.bias else bias
    if case.used:
        options["seqused_q"] = per_sequence([max(n - 4, 0) for n in case.lens_q], device)
        options["seqused_k"] = per_sequence([max(n - 7, 0) for n in case.lens_k], device)
    if case.leftpad:
        pads = [(3, 0, 8, 5)[b % 4] for b in range(batch)]
        options["leftpad_k"] = per_sequence(pads, device)
    return options


def per_sequence(values, device):
    return torch.tensor(values, dtype=torch.int32, device=device)


def make(case: Case, dtype, device, seed=0):
    """-> (q, k, v, dout, dlse, options for the oracle) on random data."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    d, dv = case.head_dim, case.head_dim_v or case.head_dim
    options = {"causal": case.causal, "softmax_scale": case.softmax_scale}
    options.update(more_options(case, random, device))
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

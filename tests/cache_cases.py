"""Named rows for the KV cache: every argument of flash_attn_with_kvcache, and the pairs of them."""

from typing import NamedTuple, Optional, Tuple

import torch
from allpairspy import AllPairs
from cases import cumulative, per_sequence
from reference import attend


class CacheCase(NamedTuple):
    """A call without its data. Sequence b has lens_k[b] rows in the cache before the call."""

    name: str
    queries: int = 1  # of every sequence, unless lens_q
    lens_k: Tuple[int, ...] = (70, 0, 133)
    lens_q: Optional[Tuple[int, ...]] = None  # packed
    capacity: int = 512
    nheads: int = 4
    nheads_k: int = 2
    head_dim: int = 64
    head_dim_v: Optional[int] = None
    page: int = 0
    batch_idx: bool = False
    leftpad: bool = False
    new: bool = False  # k and v are given, a row for each query
    rotary_dim: int = 0
    interleaved: bool = True
    causal: bool = False
    window: Tuple[int, int] = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    sink: bool = False
    num_splits: int = 0
    batch_invariant: bool = False

    @property
    def counts(self):
        return self.lens_q or (self.queries,) * len(self.lens_k)


MANY = tuple(n * 37 % 101 for n in range(70))

SINGLE = [
    CacheCase("one"),
    CacheCase("causal", 4, causal=True),
    CacheCase("queries-17", 17, lens_k=(70, 17, 133), causal=True),
    CacheCase("queries-64", 64, lens_k=(70, 100, 133), causal=True),
    CacheCase("queries-300", 300, lens_k=(300, 400, 512), causal=True),
    CacheCase("more-queries-than-keys", 9, lens_k=(3, 0, 8), causal=True),
    CacheCase("new", new=True),
    CacheCase("new-causal", 5, new=True, causal=True),
    CacheCase("new-fills-the-cache", 4, lens_k=(508, 0, 508), new=True, causal=True),
    CacheCase("rotary", 3, new=True, rotary_dim=64, causal=True),
    CacheCase("rotary-one-position", 3, new=True, rotary_dim=64),
    CacheCase("rotary-partial", 2, new=True, rotary_dim=16, interleaved=False, window=(40, 0)),
    CacheCase("batch-idx", 2, batch_idx=True, new=True),
    CacheCase("leftpad", 2, leftpad=True, causal=True, new=True),
    CacheCase("leftpad-is-length", 2, lens_k=(3, 0, 20), leftpad=True, causal=True),
    CacheCase("leftpad-pages", 2, leftpad=True, causal=True, page=16),
    CacheCase("page-1", page=1, capacity=160),
    CacheCase("page-16", 2, page=16, new=True, causal=True),
    CacheCase("page-256", 4, page=256, lens_k=(255, 256, 300), new=True, causal=True),
    CacheCase("page-48", page=48, new=True),  # neither a power of two nor a multiple of a tile
    CacheCase("window", 4, window=(30, 0), causal=True),
    CacheCase("window-both", 40, lens_k=(300, 41, 133), window=(25, 9)),
    CacheCase("softcap", softcap=3.0),
    CacheCase("alibi", 3, alibi=True, causal=True),
    CacheCase("sink", 3, sink=True, causal=True),
    CacheCase("splits", lens_k=(500, 0, 133), num_splits=4, sink=True),
    CacheCase("splits-more-than-blocks", lens_k=(500, 3, 133), num_splits=100, page=16),
    CacheCase("splits-window", 2, lens_k=(500, 9, 133), num_splits=3, window=(100, 0)),
    CacheCase("invariant", lens_k=(500, 0, 133), batch_invariant=True),
    CacheCase("invariant-long", lens_k=(4000, 7, 2049), capacity=4096, batch_invariant=True),
    CacheCase("many", lens_k=MANY),  # more programs than run at once: the longest go first
    CacheCase("many-pages", 2, lens_k=MANY, page=16, new=True, causal=True),
    CacheCase("packed", lens_q=(1, 5, 0), causal=True),
    CacheCase("packed-new", lens_q=(1, 70, 2), new=True, rotary_dim=32, page=16, causal=True),
    CacheCase("packed-splits", lens_q=(3, 1, 2), num_splits=2, sink=True),
    CacheCase("long", lens_k=(5000,), capacity=5120),
    CacheCase("mqa", 2, nheads=8, nheads_k=1, causal=True),
    CacheCase("mha", 2, nheads=3, nheads_k=3, causal=True),
    CacheCase("dim-80", 2, head_dim=80),
    CacheCase("dim-192-128", 2, head_dim=192, head_dim_v=128, causal=True),
    CacheCase("latent", 2, nheads=16, nheads_k=1, head_dim=576, head_dim_v=512, causal=True),
]

LEVELS = {  # every pair of levels of two arguments is in some row of PAIRS
    "queries": (1, 2, 4, 17, 64, 300, (1, 40, 3)),
    "dims": ((64, 64), (80, 80), (128, 128), (192, 128), (256, 256), (576, 512)),
    "cache": ("dense", "entries", 1, 16, 256),
    "rotary": (None, "none", "all", "part", "interleaved"),  # None: nothing is appended
    "mask": ("full", "causal", "window"),
    "heads": ((4, 4), (8, 2), (4, 1)),
    "splits": (0, 1, 3, "invariant"),
    "leftpad": (False, True),
    "softcap": (0.0, 3.0),
    "alibi": (False, True),
    "sink": (False, True),
}
VISIBLE = {"full": {}, "causal": {"causal": True}, "window": {"window": (60, 3)}}


def pairs():
    """A pairwise cover of LEVELS."""
    for n, levels in enumerate(AllPairs([list(levels) for levels in LEVELS.values()])):
        row = dict(zip(LEVELS, levels))
        queries, (d, dv), cache = row.pop("queries"), row.pop("dims"), row.pop("cache")
        (nheads, nheads_k), mask = row.pop("heads"), VISIBLE[row.pop("mask")]
        rotary, splits = row.pop("rotary"), row.pop("splits")
        most = max(queries) if isinstance(queries, tuple) else queries
        yield CacheCase(
            f"pair-{n}",
            lens_k=(150, 0, 77) if rotary else (most + 90, most, 77),
            **({"lens_q": queries} if isinstance(queries, tuple) else {"queries": queries}),
            nheads=nheads,
            nheads_k=nheads_k,
            head_dim=d,
            head_dim_v=dv,
            page=cache if isinstance(cache, int) else 0,
            batch_idx=cache == "entries",
            new=rotary is not None,
            rotary_dim={"all": d, "part": 32, "interleaved": d}.get(rotary, 0),
            interleaved=rotary == "interleaved",
            num_splits=0 if splits == "invariant" else splits,
            batch_invariant=splits == "invariant",
            **mask,
            **row,
        )


CASES = SINGLE + list(pairs())


class Cache(NamedTuple):
    """What a case is called with, and what the oracle knows of it."""

    q: torch.Tensor
    k_cache: torch.Tensor  # NaN wherever nothing is stored
    v_cache: torch.Tensor
    keywords: dict  # the other arguments
    keys: list  # of each sequence, before the call: [rows, nheads_k, head_dim]
    values: list
    places: list  # of each sequence, for every position: (entry or page, row)


def make_cache(case: CacheCase, dtype, device, seed=0) -> Cache:
    """A case on random data."""
    generator = torch.Generator().manual_seed(seed)

    def random(*shape):
        return torch.randn(shape, generator=generator).to(dtype).to(device)

    batch, d, dv = len(case.lens_k), case.head_dim, case.head_dim_v or case.head_dim
    size = case.page or case.capacity
    per_sequence_pages = -(-case.capacity // size)
    entries = batch * per_sequence_pages + 2
    k_cache = torch.full((entries, size, case.nheads_k, d), torch.nan, dtype=dtype, device=device)
    v_cache = torch.full((entries, size, case.nheads_k, dv), torch.nan, dtype=dtype, device=device)
    order = torch.arange(entries)
    if case.page or case.batch_idx:
        order = torch.randperm(entries, generator=generator)
    table = order[: batch * per_sequence_pages].view(batch, per_sequence_pages)
    positions = torch.arange(per_sequence_pages * size)
    places = [(row[positions // size], positions % size) for row in table]
    keys = [random(n, case.nheads_k, d) for n in case.lens_k]
    values = [random(n, case.nheads_k, dv) for n in case.lens_k]
    for tensor, parts in ((k_cache, keys), (v_cache, values)):
        for (entry, row), part in zip(places, parts):
            tensor[entry[: len(part)].to(device), row[: len(part)].to(device)] = part
    counts = case.counts
    rows = (sum(counts),) if case.lens_q else (batch, case.queries)
    keywords = {
        "cache_seqlens": per_sequence(case.lens_k, device),
        "causal": case.causal,
        "window_size": case.window,
        "softcap": case.softcap,
        "num_splits": case.num_splits,
        "batch_invariant": case.batch_invariant,
    }
    if case.page:
        used = [n + q * case.new for n, q in zip(case.lens_k, counts)]
        shown = table.clone().int()
        for b, n in enumerate(used):
            shown[b, -(-n // size) :] = -1
        keywords["block_table"] = shown.to(device)
    elif case.batch_idx:
        keywords["cache_batch_idx"] = table[:, 0].int().to(device)
    if case.lens_q:
        keywords.update(cu_seqlens_q=cumulative(counts, device), max_seqlen_q=max(counts))
    if case.leftpad:
        pads = [min((3, 0, 20)[b % 3], n) for b, n in enumerate(case.lens_k)]
        keywords["cache_leftpad"] = per_sequence(pads, device)
    if case.alibi:
        keywords["alibi_slopes"] = 0.3 * random(case.nheads).float().abs()
    if case.sink:
        keywords["s_aux"] = random(case.nheads)
    q = random(*rows, case.nheads, d)
    if case.new:
        keywords["k"] = random(*rows, case.nheads_k, d)
        keywords["v"] = random(*rows, case.nheads_k, dv)
    if case.rotary_dim:
        angles = 6.0 * torch.rand(len(positions), case.rotary_dim // 2, generator=generator)
        keywords["rotary_cos"], keywords["rotary_sin"] = (
            t.to(dtype).to(device) for t in (angles.cos(), angles.sin())
        )
        keywords["rotary_interleaved"] = case.interleaved
    return Cache(q, k_cache, v_cache, keywords, keys, values, places)


def rotated(x, cos, sin, positions, interleaved):
    """x [rows, heads, d] with each row turned by the angles of its position, in x's dtype."""
    half = cos.shape[1]
    c, s = (t.to(x.dtype)[positions].unsqueeze(1) for t in (cos, sin))
    first, second = slice(0, 2 * half, 2), slice(1, 2 * half, 2)
    if not interleaved:
        first, second = slice(0, half), slice(half, 2 * half)
    out = x.clone()
    out[..., first] = x[..., first] * c - x[..., second] * s
    out[..., second] = x[..., first] * s + x[..., second] * c
    return out


def expected(case: CacheCase, cache: Cache, dtype):
    """-> for each sequence (out, lse, keys, values after the call), computed in `dtype`."""
    words = cache.keywords
    starts = [sum(case.counts[:b]) for b in range(len(case.counts) + 1)]
    results = []
    for b, n in enumerate(case.lens_k):

        def of_sequence(tensor, b=b):
            part = tensor[starts[b] : starts[b + 1]] if case.lens_q else tensor[b]
            return part.to(dtype)

        q, k, v = of_sequence(cache.q), cache.keys[b].to(dtype), cache.values[b].to(dtype)
        if case.new:
            new_k = of_sequence(words["k"])
            if case.rotary_dim:
                turn = (words["rotary_cos"], words["rotary_sin"])
                pos = n + torch.arange(len(q), device=q.device)
                each = case.causal or case.window != (-1, -1)
                new_k = rotated(new_k, *turn, pos, case.interleaved)
                q = rotated(q, *turn, pos if each else n + 0 * pos, case.interleaved)
            k, v = torch.cat([k, new_k]), torch.cat([v, of_sequence(words["v"])])
        skip = int(words["cache_leftpad"][b]) if case.leftpad else 0
        options = {
            name: words[name].to(dtype) for name in ("alibi_slopes", "s_aux") if name in words
        }
        scale = case.head_dim**-0.5
        out, lse = attend(
            q, k[skip:], v[skip:], scale, case.causal, case.window, case.softcap, **options
        )
        results.append((out, lse, k, v))
    return results

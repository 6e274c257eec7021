"""Shapes, lengths, strides, options and dtypes drawn at random, against the oracle.

A bounded, repeatable number of cases; FA_FUZZ_SECONDS=540 FA_FUZZ_SEED=1 pytest -s draws new ones
for that long, and prints how many.
"""

import contextlib
import os
import time

import torch
from cache_cases import CacheCase, make_cache
from cache_checking import call
from cache_checking import check as check_cache
from cases import Case, make
from checking import check, run
from conftest import HAS_GPU
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

SECONDS = float(os.environ.get("FA_FUZZ_SECONDS", "0"))
SEED = float(os.environ.get("FA_FUZZ_SEED", "0"))
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
HEAD_DIMS = (1, 8, 16, 24, 32, 59, 64, 80, 96, 128, 160, 192, 256, 512)
BIASES = ("bhqk", "hqk", "bk", "qk", "bhq", "?bhqk", "?bk")


@st.composite
def lengths(draw):
    """What of a Case says how long its sequences are."""
    length = st.one_of(st.integers(0, 40), st.integers(0, 300), st.sampled_from((64, 128, 256)))
    if draw(st.booleans()):
        return {
            "seqlen_q": draw(length),
            "seqlen_k": draw(length),
            "batch": draw(st.integers(0, 3)),
        }
    batch = draw(st.integers(1, 5))
    lens = [tuple(draw(length) for _ in range(batch)) for _ in "qk"]
    return {
        "lens_q": lens[0],
        "lens_k": lens[1],
        "tail": draw(st.sampled_from((0, 0, 1, 70))),
        "used": draw(st.booleans()),
        "leftpad": draw(st.booleans()),
    }


@st.composite
def cases(draw):
    group, nheads_k = draw(st.sampled_from((1, 1, 2, 3, 4))), draw(st.sampled_from((1, 2, 3)))
    head_dim = draw(st.sampled_from(HEAD_DIMS))
    side = st.one_of(st.just(-1), st.integers(0, 300))
    rarely = st.sampled_from((False, False, False, True))
    shape = draw(lengths())
    empty = not (shape.get("batch", 1) and shape.get("seqlen_q", 1) and shape.get("seqlen_k", 1))
    longest = min(max(shape.get("lens_q", (1,))), max(shape.get("lens_k", (1,))))
    return Case(
        "random",
        **shape,
        nheads=group * nheads_k,
        nheads_k=nheads_k,
        head_dim=head_dim,
        head_dim_v=draw(st.sampled_from(HEAD_DIMS)) if draw(rarely) else None,
        causal=draw(st.booleans()),
        softmax_scale=draw(st.sampled_from((None, None, None, 0.05, -0.2))),
        use_lse=draw(st.booleans()),
        window=(draw(side), draw(side)) if draw(st.booleans()) else (-1, -1),
        top_left=draw(rarely),
        softcap=draw(st.sampled_from((0.0, 0.0, 0.0, 1.0, 20.0))),
        alibi=draw(st.sampled_from((None, None, None, "heads", "batch"))),
        sink=draw(rarely),
        bias=draw(st.sampled_from(BIASES)) if draw(rarely) and not empty and longest else None,
        dropout_p=draw(st.sampled_from((0.0, 0.0, 0.0, 0.1, 0.7))),
    )


def other_strides(tensor, kind):
    """The same numbers behind other strides."""
    if kind == "heads first":
        return tensor.transpose(-3, -2).contiguous().transpose(-3, -2)
    if kind == "wider":  # a part of longer rows, two bytes off any alignment
        return torch.cat([tensor[..., :1], tensor, tensor], -1)[..., 1 : tensor.shape[-1] + 1]
    if kind == "columns first":
        return tensor.transpose(-3, -1).contiguous().transpose(-3, -1)
    return tensor


STRIDES = st.sampled_from(("plain", "plain", "heads first", "wider", "columns first"))


@st.composite
def cache_cases(draw):
    """A call over a KV cache."""
    group, nheads_k = draw(st.sampled_from((1, 2, 4, 5))), draw(st.sampled_from((1, 2)))
    batch = draw(st.integers(1, 4))
    packed, new = draw(st.booleans()), draw(st.booleans())
    counts = tuple(draw(st.integers(0, 40)) for _ in range(batch))
    queries = draw(st.integers(1, 40))
    most = max(counts) if packed else queries
    dim = draw(st.sampled_from((8, 32, 64, 80, 128, 192, 256)))
    where = draw(st.sampled_from(("dense", "entries", "pages")))
    splits = draw(st.sampled_from((0, 0, 1, 2, 5, -1)))
    side = st.one_of(st.just(-1), st.integers(0, 300))
    capacity = draw(st.sampled_from((64, 300, 700)))
    return CacheCase(
        "random",
        queries,
        tuple(draw(st.integers(0, capacity - most)) for _ in range(batch)),
        counts if packed else None,
        capacity,
        group * nheads_k,
        nheads_k,
        dim,
        draw(st.sampled_from((None, None, 16, 128))),
        draw(st.sampled_from((1, 3, 16, 64, 128))) if where == "pages" else 0,
        where == "entries",
        draw(st.booleans()),
        new,
        draw(st.sampled_from((0, 8, dim))) if new else 0,
        draw(st.booleans()),
        draw(st.booleans()),
        (draw(side), draw(side)) if draw(st.booleans()) else (-1, -1),
        draw(st.sampled_from((0.0, 0.0, 3.0))),
        draw(st.booleans()),
        draw(st.booleans()),
        max(splits, 0),
        splits < 0,
    )


def repeat(hold, name):
    """Call `hold` with fresh seeds for SECONDS, at least once."""
    end = time.time() + SECONDS
    number = int(SEED * 10**6)
    while True:
        seed(number)(hold)()
        number += 1
        if time.time() >= end:
            break
    print(f"{len(hold.count)} {name}")


@contextlib.contextmanager
def guarded(*case):
    """A CUDA error ends the process and names the case: the context is gone, so that every later
    case would fail as well."""
    try:
        yield
    except RuntimeError as error:
        if "CUDA" in str(error):
            print(*case, error, flush=True)
            os._exit(1)
        raise


EXAMPLES = settings(
    max_examples=15 if HAS_GPU else 40,  # each compiles its kernels
    deadline=None,
    database=None,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)


def test_random(kernel, device):
    @EXAMPLES
    @given(cases(), st.sampled_from(DTYPES), st.lists(STRIDES, min_size=4, max_size=4))
    def hold(case, dtype, strides):
        hold.count.append(case)
        with guarded(case, dtype, strides):
            q, k, v, dout, dlse, options = make(case, dtype, device)
            q, k, v, dout = (other_strides(t, kind) for t, kind in zip((q, k, v, dout), strides))
            results = run(kernel, q, k, v, dout, dlse, options)
            check(results, q, k, v, dout, dlse, options, kernel, rounding=True)

    hold.count = []
    repeat(hold, "cases")


def test_random_cache(kernel, device):
    @EXAMPLES
    @given(cache_cases(), st.sampled_from(DTYPES))
    def hold(case, dtype):
        hold.count.append(case)
        with guarded(case, dtype):
            cache = make_cache(case, dtype, device)
            check_cache(case, cache, *call(kernel, cache), rounding=True)

    hold.count = []
    repeat(hold, "cases over a cache")

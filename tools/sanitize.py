"""Small calls of every kernel of hopper/, for compute-sanitizer to watch on a Hopper GPU.

    export PYTHONPATH=tests
    compute-sanitizer --tool memcheck --kernel-regex kns=hopper python tools/sanitize.py
    compute-sanitizer --tool synccheck --kernel-regex kns=hopper python tools/sanitize.py

`--warm N` compiles them before, in N processes: under the sanitizer that takes minutes.
"""

import argparse
import multiprocessing
import os
from pathlib import Path

import cache_checking
import checking
import torch
from cache_cases import CacheCase, make_cache
from cases import Case, make
from kernels import get_kernel

ROOT = Path(__file__).resolve().parent.parent
HEADS = {"nheads": 4, "nheads_k": 2}
CASES = [
    Case("64", 300, 300, head_dim=64, **HEADS),
    Case("64-192-rows", 700, 200, head_dim=64, **HEADS),
    Case("64-causal", 300, 300, head_dim=64, causal=True, **HEADS),
    Case("64-causal-192-rows", 3100, 300, head_dim=64, causal=True, **HEADS),
    Case("96-packed", head_dim=96, lens_q=(70, 200), lens_k=(70, 200), **HEADS),
    Case("128", 200, 330, head_dim=128, **HEADS),
    Case("128-causal", 300, 300, head_dim=128, causal=True, **HEADS),
    Case("128-window", 300, 400, head_dim=128, window=(40, 30), **HEADS),
    Case("128-softcap", 200, 200, head_dim=128, causal=True, softcap=20.0, **HEADS),
    Case(
        "128-packed", head_dim=128, causal=True, lens_q=(130, 1, 0, 300), lens_k=(130, 1, 0, 300),
        **HEADS,
    ),
    Case("192-128", 200, 300, head_dim=192, head_dim_v=128, causal=True, **HEADS),
    Case("192", 200, 300, head_dim=192, **HEADS),
    Case("256", 200, 300, head_dim=256, causal=True, **HEADS),
    Case("256-packed", head_dim=256, lens_q=(100, 230), lens_k=(100, 230), **HEADS),
    CacheCase("pages", 200, lens_k=(507, 300), head_dim=128, page=128, causal=True),
]  # fmt: skip
FLOAT8 = ("64", "64-192-rows", "128-causal", "128-window", "128-packed")  # as that, too, forward


def call(case):
    """Forward and backward, of the latter also the deterministic one; of a cache's pages forward
    alone."""
    os.environ.setdefault("LOCAL_KERNELS", f"org/flash-attention={ROOT}")
    kernel = get_kernel("org/flash-attention", version=1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if isinstance(case, CacheCase):
        cache_checking.call(kernel, make_cache(case, torch.bfloat16, device))
        return
    *inputs, options = make(case, torch.bfloat16, device)
    for deterministic in (False, True):
        checking.run(kernel, *inputs, {**options, "deterministic": deterministic})
    if case.name in FLOAT8:
        checking.call(kernel, *(t.to(torch.float8_e4m3fn) for t in inputs[:3]), options)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warm", type=int, metavar="N", help="compile only, in N processes")
    args = parser.parse_args()
    if args.warm:
        with multiprocessing.get_context("spawn").Pool(args.warm) as pool:
            pool.map(call, CASES, chunksize=1)
        return
    for case in CASES:
        call(case)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        print("ran", case.name, flush=True)


if __name__ == "__main__":
    main()

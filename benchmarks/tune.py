"""Find tile shapes for the tuned/*.json tables: measure candidates on the GPU at hand.

    python benchmarks/tune.py [--head-dims 64 128 256] [--kernels forward dq dkdv] --out tuned.json

Candidates are compiled in parallel first (Triton's disk cache carries them over), those that spill
or do not fit are dropped, and the rest ranked by the geometric mean of their TFLOP/s over three
sequence lengths. The winner of each row goes to --out, ready to be merged into a table.
"""

import argparse
import itertools
import json
import multiprocessing
import os
import sys
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean

import torch
from peers import Shape, load_kernel, random_inputs

TOKENS, HIDDEN = 16384, 2048
SHARE = {"forward": 1.0, "dq": 1.5, "dkdv": 2.0}  # of the forward's products that a kernel does
CANDIDATES = {  # (block_m, block_n), num_warps, num_stages
    "forward": itertools.product(
        ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)), (4, 8), (2, 3)
    ),
    "dq": itertools.product(
        ((64, 32), (64, 64), (64, 128), (128, 32), (128, 64), (128, 128)), (4, 8), (2, 3)
    ),
    "dkdv": itertools.product(
        ((32, 64), (64, 64), (32, 128), (64, 128), (128, 64), (128, 128)), (4, 8), (2, 3)
    ),
}


def modules():
    name = load_kernel().__name__
    return import_module(f"{name}.flash_attention_kernel.launch"), import_module(f"{name}.problem")


def launch_for(kernel, tile, shape: Shape):
    """A launch of one kernel on random data."""
    launch, problem_module = modules()
    q, k, v, dout = (t.detach() for t in random_inputs(shape, "cuda"))
    problem = problem_module.AttentionProblem.dense(q, k, v, causal=shape.causal)
    tile = launch.TileConfig(*tile[0], *tile[1:])
    out, lse = launch.forward(problem)
    if kernel == "forward":
        return launch.forward_launch(problem, out, lse, tile)
    dq, dk, dv = problem.empty_grads()
    delta = (out.float() * dout.float()).sum(-1).transpose(1, 2).contiguous()
    if kernel == "dq":
        return launch.dq_launch(problem, dout, None, out, lse, dq, delta, tile)
    return launch.dkdv_launch(problem, dout, lse, delta, dk, dv, tile)


def compile_one(job):
    """Compile a candidate into the disk cache. -> why it is out, or None"""
    kernel, tile, dim, causal, dtype = job
    try:
        launch = launch_for(kernel, tile, Shape(1, 2, 256, dim, causal, dtype))
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
        compiled._init_handles()
        return f"{compiled.n_spills} spills" if compiled.n_spills else None
    except Exception as error:  # whatever a compiler may throw; the candidate is out
        return str(error).splitlines()[0][:60]


def measure(kernel, tile, dim, causal, dtype):
    """TFLOP/s at three sequence lengths."""
    from triton.testing import do_bench

    figures = []
    for seq_len in (1024, 4096, 16384):
        shape = Shape(TOKENS // seq_len, HIDDEN // dim, seq_len, dim, causal, dtype)
        launch = launch_for(kernel, tile, shape)
        ms = do_bench(launch.run, warmup=10, rep=30, return_mode="median")
        figures.append(SHARE[kernel] * shape.flops() / ms / 1e9)
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=(64, 128, 256))
    parser.add_argument("--kernels", nargs="+", default=tuple(CANDIDATES))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--spills", action="store_true", help="measure those that spill, too")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    jobs = [
        (kernel, (tile, warps, stages), dim, causal, args.dtype)
        for kernel in args.kernels
        for tile, warps, stages in CANDIDATES[kernel]
        for dim in args.head_dims
        for causal in (False, True)
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        verdicts = pool.map(compile_one, jobs, chunksize=1)
    results = {}
    for (kernel, tile, dim, causal, dtype), verdict in zip(jobs, verdicts):
        key = f"{kernel}/{getattr(torch, dtype).itemsize}/{dim}/{'causal' if causal else 'full'}"
        if verdict and not (args.spills and "spills" in verdict):
            print(key, tile, verdict)
            continue
        figures = measure(kernel, tile, dim, causal, dtype)
        results.setdefault(key, []).append((geometric_mean(figures), tile, figures, verdict))
    best = {}
    for key, ranked in results.items():
        ranked.sort(reverse=True, key=lambda entry: entry[0])
        for mean, tile, figures, verdict in ranked[:6]:
            text = " ".join(f"{figure:.0f}" for figure in figures)
            print(f"{key:24} {tile} {mean:6.1f} TFLOP/s ({text}) {verdict or ''}", flush=True)
        mean, tile, _, _ = next(entry for entry in ranked if entry[3] is None)
        best[key] = {"tile": [*tile[0], *tile[1:]], "tflops": round(mean, 1)}
    args.out.write_text(json.dumps(best, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

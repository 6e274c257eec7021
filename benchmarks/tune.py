"""Find tile shapes for the tuned/*.json tables: measure candidates on the GPU at hand.

    python benchmarks/tune.py [--head-dims 64 128 256] [--kernels forward dq dkdv]
        [--kinds full causal bias dropout] --out tuned.json
    python benchmarks/tune.py --kernels hopper [--head-dims 64 128 192 256]
        [--kinds full causal float8 backward] --out tuned.json

Candidates are compiled in parallel first (Triton's disk cache carries them over); those that do not
fit or spill much are dropped, the rest measured at three sequence lengths and ranked by the
geometric mean of their TFLOP/s. The best of each row that does not spill goes to --out. hopper: the
rows of hopper/'s forward and, full and causal together, of its backward without what surrounds it;
there a candidate may spill, outside the loops.
"""

import argparse
import functools
import json
import multiprocessing
import os
import sys
from importlib import import_module
from pathlib import Path
from statistics import geometric_mean

import torch
from peers import Shape, load_kernel, random_inputs
from run import environment

TOKENS, HIDDEN = 16384, 2048
SHARE = {"forward": 1.0, "dq": 1.5, "dkdv": 2.0}  # of the forward's products that a kernel does
CANDIDATES = {  # kernel, head_dim -> (block_m, block_n, num_warps, num_stages)
    ("forward", 64): "128,64,8,3 128,64,4,3 64,64,4,3 64,64,4,4 128,128,8,3 64,128,4,3",
    ("forward", 128): "128,64,8,3 128,128,8,2 128,128,8,3 128,32,8,3 64,64,4,3 64,64,4,2 64,32,4,3",
    ("forward", 256): "128,64,8,2 128,32,8,3 64,32,4,2",
    ("dq", 64): "128,64,8,3 64,64,4,3 64,64,4,4 128,64,4,3 64,128,4,3 128,128,8,3 64,32,4,3",
    ("dq", 128): "128,64,8,3 128,64,8,2 128,32,8,3 64,64,4,3 64,64,4,2 64,32,4,3",
    ("dq", 256): "64,64,8,2 128,32,8,2 64,32,8,2 64,32,8,3 128,32,8,3",
    (
        "dkdv",
        64,
    ): "64,128,8,3 64,128,8,2 64,64,4,3 32,128,8,3 32,64,4,3 128,128,8,2 128,64,4,2 32,64,4,2",
    (
        "dkdv",
        128,
    ): "64,128,8,3 64,128,8,2 32,128,8,3 32,128,8,2 32,64,4,3 32,64,4,2 64,64,8,2 16,64,4,3",
    ("dkdv", 256): "32,64,8,2 32,64,8,1 16,64,8,2 32,32,4,2 32,32,8,2 16,64,4,2 32,128,8,1",
}
SPILL_BYTES = 128  # measured for comparison, never chosen
HOPPER = {  # key of a hopper row -> (block_m, block_n, stages, q_tiles)
    "64/full": "192,128,4,2 192,128,4,1 192,128,3,2 128,128,4,2",
    "64/full-short": "128,128,4,2 128,128,3,2 128,128,4,1 192,128,4,2",
    "64/causal": "128,128,4,2 192,128,3,2 192,128,4,2",
    "64/causal-short": "128,128,4,2 128,128,3,2 192,128,4,2",
    "128/full": "128,128,2,2 128,128,2,1 128,64,4,2 128,64,3,2",
    "128/causal": "128,128,2,2 128,128,2,1 128,64,4,2",
    "64/float8": "192,128,4,2 128,128,4,2 128,256,2,2",
    "64/float8-short": "128,128,4,2 192,128,4,2 128,256,2,2",
    "128/float8": "128,128,4,2 128,128,2,2 128,64,4,2",
    "192/full": "128,64,2,1 128,64,2,2 128,64,3,1",
    "192/causal": "128,64,2,1 128,64,2,2 128,64,3,1",
    "256/full": "128,64,2,1 128,32,4,1 128,32,3,1",
    "256/causal": "128,64,2,1 128,32,4,1 128,32,3,1",
    "64/backward": "128,128,2,2 64,128,3,4 64,128,3,3 64,128,2,3",
    "64/backward-mods": "64,128,3,4 64,128,3,3 64,128,2,3 128,128,2,2",
    "128/backward": "64,128,2,3 64,128,2,2",
    "128/backward-mods": "64,128,2,3 64,128,2,2",
    "256/backward": "64,64,2,2 64,64,1,2 64,64,2,1",
    "256/backward-mods": "64,64,2,2 64,64,1,2 64,64,2,1",
}
KINDS = ("full", "causal", "bias", "dropout")
HOPPER_LENGTHS = {  # for which hopper_calls.forward_tile takes a row, where not all
    "64/full-short": (512,),
    "64/causal": (4096, 16384),
    "64/causal-short": (1024,),
    "64/float8": (4096, 16384),
    "64/float8-short": (512,),
}


def hopper_kind(row):
    """What of --kinds chooses a row of HOPPER."""
    return row.partition("/")[2].partition("-")[0]


def modules():
    name = load_kernel().__name__
    launch = import_module(f"{name}.flash_attention_kernel.launch")
    return launch, import_module(f"{name}.problem"), import_module(f"{name}.options").Options


def launch_for(kernel, tile, shape: Shape, kind):
    """A launch of one kernel on random data; bias and dropout are causal, too."""
    launch, problem_module, Options = modules()
    q, k, v, dout = (t.detach() for t in random_inputs(shape, "cuda"))
    options = Options(causal=shape.causal)
    if kind == "dropout":
        options = options._replace(dropout_p=0.1)
    if kind == "bias":
        bias = torch.randn(shape.seq_len, shape.seq_len, device="cuda", dtype=q.dtype)
        options = options._replace(attn_bias=bias)
    problem = problem_module.AttentionProblem.dense(q, k, v, options)
    tile = launch.TileConfig(*tile)
    out, lse = launch.forward(problem)
    if kernel == "forward":
        return launch.calls.forward_launch(problem, out, lse, tile)
    _, (dq, dk, dv) = problem.empty_grads()
    delta = (out.float() * dout.float()).sum(-1).transpose(1, 2).contiguous()
    if kernel == "dq":
        return launch.calls.dq_launch(problem, dout, None, out, lse, dq, delta, tile=tile)
    return launch.calls.dkdv_launch(problem, dout, lse, delta, dk, dv, tile)


def spilled(job, build):
    """Compile what `build` gives into the disk cache. -> bytes spilled, or None: it does not fit"""
    try:
        launch = build()
        compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
        compiled._init_handles()
        return 4 * compiled.n_spills
    except Exception as error:  # whatever a compiler may throw; the candidate is out
        print(job, str(error).splitlines()[0][:60], flush=True)
        return None


def tflops(launch, flops) -> float:
    """TFLOP/s of a launch, by the median."""
    from triton.testing import do_bench

    run = functools.partial(launch.kernel[launch.grid], *launch.args, **launch.options)
    return flops / do_bench(run, warmup=5, rep=20, return_mode="median") / 1e9


def hopper_launch_for(row, tile, shape: Shape):
    """A launch of hopper/'s forward or backward on random data; of a backward-mods row with a
    window of a quarter of the keys, whose TFLOP/s count all of causal attention's."""
    launch, problem_module, Options = modules()
    q, k, v, dout = (t.detach() for t in random_inputs(shape, "cuda"))
    window = (shape.seq_len // 4, 0) if row.endswith("mods") else (-1, -1)
    options = Options(causal=shape.causal, window_size=window)
    if "float8" in row:
        q, k, v = (t.to(torch.float8_e4m3fn) for t in (q, k, v))
    problem = problem_module.AttentionProblem.dense(q, k, v, options)
    hopper = launch._hopper_calls()
    tile, counters = hopper.HopperConfig(*tile), launch._counters(q.device)
    if "backward" not in row:
        out, lse = problem.empty_out(), problem.empty_lse()
        if not problem.is_float8():
            return hopper.forward_launch(problem, out, lse, counters, tile)
        values = hopper.empty_values(problem)
        launch.run(hopper.values_launch(problem, values))
        return hopper.forward_launch(problem, out, lse, counters, tile, values, problem.gains())
    out, lse = launch.forward(problem)
    stats, sums, turns = hopper.workspace(problem, hopper.backward_plan(problem, tile))
    grads = problem.empty_grads()[1][1:]
    # Once: of the launches that are timed, none is the first to add to dQ, and stores.
    launch.run(hopper.prepare_launch(problem, out, dout, lse, None, None, stats, sums, turns, tile))
    return hopper.backward_launch(problem, dout, stats, sums, *grads, counters, turns, tile)


def compile_hopper(job):
    """`compile_one` of a hopper row."""
    row, tile, dtype = job
    shape = Shape(1, 2, 256, int(row.partition("/")[0]), "full" not in row, dtype)
    return spilled(job, functools.partial(hopper_launch_for, row, tile, shape))


def measure_hopper(row, tile, dtype):
    """TFLOP/s at each sequence length; of a backward, and of float8, full and causal."""
    dim, kind = row.split("/")
    share = 2.5 if "backward" in kind else 1.0
    both = kind == "backward" or "float8" in kind
    masks = (False, True) if both else ("full" not in kind,)
    figures = []
    for seq_len in HOPPER_LENGTHS.get(row, (1024, 4096, 16384)):
        for causal in masks:
            shape = Shape(TOKENS // seq_len, HIDDEN // int(dim), seq_len, int(dim), causal, dtype)
            figures.append(tflops(hopper_launch_for(row, tile, shape), share * shape.flops()))
    return figures


def tune_hopper(args):
    """Write the best tile of each row of HOPPER."""
    about = environment(torch.device("cuda"))
    jobs = [
        (row, tuple(map(int, tile.split(","))), args.dtype)
        for row, tiles in HOPPER.items()
        if int(row.partition("/")[0]) in args.head_dims and hopper_kind(row) in args.kinds
        for tile in tiles.split()
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        spills = dict(zip(jobs, pool.map(compile_hopper, jobs, chunksize=1)))
    best = {}
    for job in jobs:
        if spills[job] is None:
            continue
        row, tile, _ = job
        figures = measure_hopper(*job)
        mean = geometric_mean(figures)
        text = " ".join(f"{figure:.0f}" for figure in figures)
        print(f"{row} {tile} {mean:.1f} TFLOP/s ({text}) spills {spills[job]}", flush=True)
        if mean > best.get(row, {"tflops": 0.0})["tflops"]:
            best[row] = {"tile": list(tile), "tflops": round(mean, 1)}
            best[row].update(triton=about["triton"], commit=about["commit"])
            args.out.write_text(json.dumps(best, indent=1))


def compile_one(job):
    """Compile a candidate into the disk cache. -> bytes spilled, or None: it does not fit"""
    kernel, tile, dim, kind, dtype = job
    shape = Shape(1, 2, 256, dim, kind != "full", dtype)
    return spilled(job, functools.partial(launch_for, kernel, tile, shape, kind))


def measure(kernel, tile, dim, kind, dtype, seq_lens):
    """TFLOP/s at each sequence length."""
    figures = []
    for seq_len in seq_lens:
        shape = Shape(TOKENS // seq_len, HIDDEN // dim, seq_len, dim, kind != "full", dtype)
        launch = launch_for(kernel, tile, shape, kind)
        figures.append(tflops(launch, SHARE[kernel] * shape.flops()))
    return figures


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dims", type=int, nargs="+", default=(64, 128, 256))
    parser.add_argument("--kernels", nargs="+", default=("forward", "dq", "dkdv"))
    parser.add_argument("--kinds", nargs="+", help="all, if none is given")
    parser.add_argument("--seq-lens", type=int, nargs="+", default=(1024, 4096, 16384))
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    kinds = sorted(set(map(hopper_kind, HOPPER))) if "hopper" in args.kernels else KINDS
    args.kinds = args.kinds or kinds
    if not set(args.kinds) <= set(kinds):
        parser.error(f"--kinds of these kernels are {' '.join(kinds)}, got {' '.join(args.kinds)}")
    if "hopper" in args.kernels:
        tune_hopper(args)
        return 0

    jobs = [
        (kernel, tuple(map(int, tile.split(","))), dim, kind, args.dtype)
        for kernel in args.kernels
        for dim in args.head_dims
        for kind in args.kinds
        for tile in CANDIDATES[kernel, dim].split()
    ]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as pool:
        spills = dict(zip(jobs, pool.map(compile_one, jobs, chunksize=4)))
    row_key = import_module(f"{load_kernel().__name__}.flash_attention_kernel.config").row_key
    best = {}
    for job in jobs:
        kernel, tile, dim, kind, dtype = job
        if spills[job] is None or spills[job] > SPILL_BYTES:
            continue
        figures = measure(*job, args.seq_lens)
        key = row_key(kernel, getattr(torch, dtype).itemsize, dim, kind)
        mean = geometric_mean(figures)
        text = " ".join(f"{figure:.0f}" for figure in figures)
        print(f"{key} {tile} {mean:.1f} TFLOP/s ({text}) spills {spills[job]}", flush=True)
        if spills[job] == 0 and mean > best.get(key, {"tflops": 0.0})["tflops"]:
            best[key] = {"tile": list(tile), "tflops": round(mean, 1)}
            args.out.write_text(json.dumps(best, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())

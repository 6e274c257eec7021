"""Ours beside SDPA's backends and compiled flex_attention, in one run, by medians.

    python benchmarks/run.py --batch-size 4 --num-heads 8 --seq-len 512 --head-dim 64 --causal
    python benchmarks/run.py --preset anchors --mode bwd --turns 3 --only ours cudnn
    python benchmarks/run.py --preset anchors --zeros --versions old=../old --only ours old

Modes: fwd and bwd print TFLOP/s; host and host-bwd print microseconds of host time per forward
call, and per forward and backward, at a tiny shape; memory prints the peak beyond the inputs in
MiB. Rows are appended to a CSV with device, versions, commit and date. At a point the peers are
measured one after the other, --turns times, another first each time: how hot the card is moves a
figure by up to 9 %, and the first after a pause has the best of it.
"""

import argparse
import csv
import datetime
import multiprocessing
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from statistics import geometric_mean, median

import torch
from peers import ANCHORS, ROOT, SDPA_BACKENDS, Shape, peers, random_inputs, versions
from tabulate import tabulate

DTYPES = ("float16", "bfloat16", "float32", "float8_e4m3fn")
UNITS = {"fwd": "TFLOP/s", "bwd": "TFLOP/s", "host": "us", "host-bwd": "us", "memory": "MiB"}


def time_ms(fn, device_type, warmup_ms=50, rep_ms=200):
    """Median milliseconds of one call."""
    if device_type != "cpu":
        from triton.testing import do_bench

        return do_bench(fn, warmup=warmup_ms, rep=rep_ms, return_mode="median")
    fn()
    times, end = [], time.perf_counter() + rep_ms / 1e3
    while len(times) < 3 or time.perf_counter() < end:
        start = time.perf_counter()
        fn()
        times.append((time.perf_counter() - start) * 1e3)
    return median(times)


def measure_fwd(fn, shape, device):
    q, k, v, _ = random_inputs(shape, device)
    with torch.no_grad():
        return shape.flops() / time_ms(lambda: fn(q, k, v), device.type) / 1e9


def measure_bwd(fn, shape, device):
    q, k, v, dout = random_inputs(shape, device)
    out = fn(q, k, v)
    inputs = (q, k, v)

    def step():
        torch.autograd.grad(out, inputs, dout, retain_graph=True)

    return shape.flops(backward=True) / time_ms(step, device.type) / 1e9


def measure_host(fn, shape, device):
    """Microseconds of host time per call, of which no gradient is wanted."""
    q, k, v, _ = random_inputs(shape, device)
    with torch.no_grad():
        return host_us(lambda: fn(q, k, v), device)


def measure_host_bwd(fn, shape, device):
    """Microseconds of host time per forward and backward."""
    q, k, v, dout = random_inputs(shape, device)
    return host_us(lambda: torch.autograd.grad(fn(q, k, v), (q, k, v), dout), device)


def host_us(step, device, calls=200, rounds=15):
    """Microseconds per step: `calls` enqueued without waiting, median of rounds."""
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    times = []
    for _ in range(rounds + 3):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            step()
        times.append((time.perf_counter() - start) / calls * 1e6)
    return median(times[3:])


def measure_memory(fn, shape, device):
    """MiB that forward and backward need at most, over what the inputs hold."""
    q, k, v, dout = random_inputs(shape, device)
    torch.autograd.grad(fn(q, k, v), (q, k, v), dout)  # workspaces and compiled code are not ours
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    grads = torch.autograd.grad(fn(q, k, v), (q, k, v), dout)
    peak = torch.cuda.max_memory_allocated()
    del grads
    return (peak - before) / 2**20


MEASURE = {
    "fwd": measure_fwd,
    "bwd": measure_bwd,
    "host": measure_host,
    "host-bwd": measure_host_bwd,
    "memory": measure_memory,
}


def environment(device):
    """What a figure is worth nothing without."""
    try:
        import triton

        triton_version = triton.__version__
    except ImportError:
        triton_version = "-"
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor()
    return {
        "date": datetime.date.today().isoformat(),
        "device": name or "cpu",
        "torch": torch.__version__,
        "triton": triton_version,
        "commit": commit(),
    }


def commit() -> str:
    """HEAD, or what FA_COMMIT says where the tree travelled without its history."""
    words = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    done = subprocess.run(words, capture_output=True, text=True)
    return os.environ.get("FA_COMMIT") or done.stdout.strip() or "unknown"


def compile_flex(shape):
    """Leave flex_attention's code for one point, forward and backward, in torch's disk caches."""
    device = torch.device("cuda")
    q, k, v, dout = random_inputs(shape, device)
    fn = peers(shape, device.type)["flex"]
    with torch.no_grad():
        fn(q, k, v)
    torch.autograd.grad(fn(q, k, v), (q, k, v), dout)


def run_point(shape, mode, device, only, turns):
    """Name -> figure, the median of all turns, or None where the peer cannot."""
    able = dict(peers(shape, device.type, only))
    figures = {name: [] for name in able}
    for turn in range(turns):
        first = turn % max(len(able), 1)
        for name, fn in [*able.items()][first:] + [*able.items()][:first]:
            try:
                figures[name].append(MEASURE[mode](fn, shape, device))
            except (RuntimeError, NotImplementedError) as error:
                del able[name]
                print(f"  {name} cannot: {str(error).splitlines()[0][:90]}", file=sys.stderr)
            if device.type == "cuda":
                torch.cuda.empty_cache()
    return {name: median(found) if name in able else None for name, found in figures.items()}


def parse_args():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--num-heads", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--causal", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--dtype", default="bfloat16", choices=DTYPES)
    parser.add_argument("--zeros", action="store_true", help="not random data: see peers.Shape")
    parser.add_argument("--turns", type=int, default=1, help="of the peers at each point")
    parser.add_argument("--mode", default="fwd", choices=tuple(MEASURE))
    parser.add_argument("--preset", choices=("anchors",), help="the twelve points of ANCHORS.md")
    parser.add_argument("--warm", action="store_true", help="compile flex for all points at once")
    parser.add_argument("--only", nargs="+", help="measure these peers alone")
    parser.add_argument(
        "--versions", nargs="+", default=(), metavar="NAME=DIR", help="other checkouts, built"
    )
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "runs.csv")
    args = parser.parse_args()
    if args.turns < 1:
        parser.error(f"--turns must be at least 1, got {args.turns}")
    if args.dtype.startswith("float8") and args.mode not in ("fwd", "host"):
        parser.error(f"--dtype {args.dtype} has no gradient: --mode fwd or host, got {args.mode}")
    for version in args.versions:
        name, _, root = version.partition("=")
        if name in ("", "ours", "flex", *SDPA_BACKENDS) or not (Path(root) / "build").is_dir():
            parser.error(
                "--versions takes NAME=DIR, NAME no other peer's and DIR with a build (make build "
                f"there), got {version}"
            )
        versions[name] = Path(root).resolve()
    return args


def main():
    args = parse_args()
    device = torch.device(args.device)
    if args.mode == "memory" and device.type != "cuda":
        print("--mode memory needs a GPU: torch does not count CPU memory", file=sys.stderr)
        return 2
    shapes = ANCHORS
    if args.preset is None:
        point = (args.batch_size, args.num_heads, args.seq_len, args.head_dim, args.causal)
        shapes = (Shape(*point),)
    shapes = tuple(shape._replace(dtype=args.dtype, zeros=args.zeros) for shape in shapes)
    about = environment(device)
    print(f"{args.mode}, {UNITS[args.mode]}; " + ", ".join(f"{k} {v}" for k, v in about.items()))

    if args.warm and device.type == "cuda" and "flex" in peers(shapes[0], "cuda", args.only):
        with multiprocessing.get_context("spawn").Pool(min(len(shapes), os.cpu_count())) as pool:
            pool.map(compile_flex, shapes, chunksize=1)
    records, names = [], []
    for shape in shapes:
        figures = run_point(shape, args.mode, device, args.only, args.turns)
        names += [name for name in figures if name not in names]
        records.append((shape, figures))
        append_csv(args, about, shape, figures)
    header = ["batch", "heads", "seqlen", "dim", "mask", *names]
    rows = [
        [*shape[:4], "causal" if shape.causal else "full", *(figures.get(n) for n in names)]
        for shape, figures in records
    ]
    print(tabulate(rows, header, floatfmt=".4g", missingval="-"))
    print_ratios(records, names)
    return 0


def print_ratios(records, names):
    """Ours over each peer: geometric mean and worst point."""
    for name in names:
        pairs = [(f["ours"], f[name]) for _, f in records if f.get("ours") and f.get(name)]
        if name != "ours" and pairs:
            ratios = [ours / theirs for ours, theirs in pairs]
            print(
                f"ours / {name}: geometric mean {geometric_mean(ratios):.3f}, "
                f"worst {min(ratios):.3f} ({len(ratios)} points)"
            )


def append_csv(args, about, shape, figures):
    """A row per peer, as soon as a point is measured."""
    args.csv.parent.mkdir(parents=True, exist_ok=True)
    point = {**about, "mode": args.mode, **shape._asdict()}
    command = "python benchmarks/run.py " + " ".join(sys.argv[1:])
    new = not args.csv.exists()
    with args.csv.open("a", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        if new:
            writer.writerow([*point, "peer", "unit", "value", "command"])
        for name, value in figures.items():
            if value is not None:
                unit = UNITS[args.mode]
                writer.writerow([*point.values(), name, unit, f"{value:.4g}", command])


if __name__ == "__main__":
    sys.exit(main())

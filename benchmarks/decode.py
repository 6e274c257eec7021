"""Decoding beside SDPA's GQA path and a device copy that moves as many bytes, in one run: medians.

    python benchmarks/decode.py [--csv FILE]
    python benchmarks/decode.py --tune 1x131072 64x4096/page16

Points are batch x cache with 32 query heads, 8 KV heads, head_dim 128, bfloat16, one query: then
with pages of 16 rows, ragged lengths, and 4 and 8 queries. us: a graph's replay between two events,
which takes 4 to 5 us if there is nothing to do; kernels us: from the start of the first kernel to
the end of the last, by the profiler, and by that GB/s of K and V, and the part of the copy's. The
host's time per call and a graph's replay are measured at 1 x 4,096. --tune times tiles and splits
instead (tuned/*.json).
"""

import argparse
import csv
import functools
import itertools
import sys
from importlib import import_module
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
import torch.nn.functional as F
from peers import ROOT, load_kernel
from run import environment
from tabulate import tabulate
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile
from triton.testing import do_bench

HEADS, HEADS_K, DIM, DTYPE = 32, 8, 128, torch.bfloat16
TILES = tuple(itertools.product((16,), (32, 64, 128), (2, 4, 8), (2, 3, 4)))
SPLITS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 33, 49, 66)


class Point(NamedTuple):
    """One row of the table."""

    batch: int
    cache: int
    page: int = 0  # rows in a page; 0: a dense cache
    ragged: bool = False  # lengths uniform in 1 ... cache
    queries: int = 1

    def name(self):
        kinds = (f"page {self.page}" * bool(self.page), "ragged" * self.ragged)
        return " ".join((f"{self.batch} x {self.cache:,}", *filter(None, kinds)))


LARGE = (Point(1, 131072), Point(16, 8192), Point(64, 4096))
POINTS = (
    Point(1, 4096),
    *LARGE,
    *(point._replace(page=16) for point in LARGE),
    *(point._replace(page=256) for point in LARGE),
    Point(64, 8192, ragged=True),
    Point(64, 8192, page=16, ragged=True),
    *(point._replace(queries=n) for point in LARGE for n in (4, 8)),
)


class Inputs(NamedTuple):
    q: torch.Tensor  # [batch, queries, heads, dim]
    k: torch.Tensor  # [batch, cache, heads_k, dim], or pages
    v: torch.Tensor
    lengths: torch.Tensor
    table: torch.Tensor


def random_inputs(point: Point) -> Inputs:
    torch.manual_seed(0)
    new = {"device": "cuda", "dtype": DTYPE}
    q = torch.randn(point.batch, point.queries, HEADS, DIM, **new)
    lengths = torch.full((point.batch,), point.cache, dtype=torch.int32, device="cuda")
    if point.ragged:
        lengths = torch.randint(1, point.cache + 1, (point.batch,), device="cuda").int()
    shape, table = (point.batch, point.cache), None
    if point.page:
        per_sequence = point.cache // point.page
        shape = (point.batch * per_sequence, point.page)
        table = torch.randperm(shape[0], device="cuda").int().view(point.batch, per_sequence)
    k, v = (torch.randn(*shape, HEADS_K, DIM, **new) for _ in "kv")
    return Inputs(q, k, v, lengths, table)


def kv_bytes(inputs: Inputs) -> int:
    """What must be read of K and V."""
    return int(inputs.lengths.sum()) * HEADS_K * DIM * 2 * 2


def ours(inputs: Inputs, **more):
    causal = inputs.q.shape[1] > 1
    return load_kernel().flash_attn_with_kvcache(
        *inputs[:3], cache_seqlens=inputs.lengths, block_table=inputs.table, causal=causal, **more
    )


def sdpa(inputs: Inputs):
    """On a [batch, heads, seqlen, dim] cache, as SDPA likes it."""
    q, k, v = inputs.q.transpose(1, 2), *(t.transpose(1, 2).contiguous() for t in inputs[1:3])
    return lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def captured(function):
    """A graph's replay of one call: the device's time, whatever the host takes."""
    function()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def time_ms(function):
    return do_bench(function, warmup=50, rep=200, return_mode="median")


def kernels_us(function, calls=20):
    """Median microseconds from the start of a call's first kernel to the end of its last, the L2
    emptied before."""
    empty_l2 = torch.empty(1 << 28, dtype=torch.int8, device="cuda").zero_
    for _ in range(3):
        function()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA]) as recorded:
        for _ in range(calls):
            empty_l2()  # meanwhile the host gets ahead
            function()
        torch.cuda.synchronize()
    kernels = sorted(
        (e for e in recorded.events() if e.device_type == DeviceType.CUDA),
        key=lambda event: event.time_range.start,
    )
    spans = []
    for kernel in kernels:
        start, end = kernel.time_range.start, kernel.time_range.end
        if kernel.name == kernels[0].name:
            spans.append(None)
        else:
            first, last = spans[-1] or (start, end)
            spans[-1] = (first, max(last, end))
    return median(end - start for start, end in spans)


def copy_of(size):
    """A device copy that reads and writes `size` bytes."""
    source, target = (torch.randn(size // 4, device="cuda", dtype=DTYPE) for _ in "st")
    return lambda: target.copy_(source)


def measure(points):
    """-> rows of name, queries, us, kernels us, GB/s, of the copy, SDPA's kernels us"""
    rows = []
    for point in points:
        inputs = random_inputs(point)
        size = kv_bytes(inputs)
        call = functools.partial(ours, inputs)
        us, kernels = time_ms(captured(call)) * 1e3, kernels_us(call)
        copy, theirs = kernels_us(copy_of(size)), None
        if not (point.page or point.ragged or point.queries > 1):
            theirs = kernels_us(sdpa(inputs))
        rows.append(
            (point.name(), point.queries, us, kernels, size / kernels / 1e3, copy / kernels, theirs)
        )
        torch.cuda.empty_cache()
    return rows


def host_us(function, calls=200, rounds=15):
    """Microseconds of host time per call, enqueued without waiting."""
    times = []
    for _ in range(rounds):
        torch.cuda.synchronize()
        start = perf_counter()
        for _ in range(calls):
            function()
        times.append((perf_counter() - start) / calls * 1e6)
    torch.cuda.synchronize()
    return median(times[3:])


def measure_host():
    """-> rows of what, us"""
    inputs = random_inputs(Point(1, 256))
    inputs4k = random_inputs(Point(1, 4096))
    step = torch.randn(1, 1, HEADS_K, DIM, device="cuda", dtype=DTYPE)
    few = inputs.lengths - 10
    replay = captured(functools.partial(ours, inputs4k))
    rows = [
        ("host time per call, one kernel", host_us(lambda: ours(inputs, num_splits=1))),
        ("host time per call, split", host_us(lambda: ours(inputs4k))),
        (
            "host time per call with k, v (waits for cache_seqlens)",
            host_us(lambda: ours(inputs._replace(lengths=few), k=step, v=step)),
        ),
        ("host time per call, SDPA", host_us(sdpa(inputs))),
        ("host time per replay of a graph", host_us(replay)),
        ("device time of a replay, 1 x 4,096, K and V in L2", time_ms_warm(replay) * 1e3),
    ]
    return rows


def time_ms_warm(function):
    """Median milliseconds without emptying the L2."""
    times = []
    for _ in range(100):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in "se")
        start.record()
        function()
        end.record()
        torch.cuda.synchronize()
        times.append(start.elapsed_time(end))
    return median(times)


def tune(points, best=6):
    """The fastest tiles and splits of each point."""
    name = load_kernel().__name__
    launch = import_module(f"{name}.flash_attention_kernel.launch")
    make = import_module(f"{name}.problem").AttentionProblem
    for point in points:
        inputs = random_inputs(point)
        problem = make.kvcache(*inputs[:3], cache_seqlens=inputs.lengths, block_table=inputs.table)
        tiles = point.batch * HEADS_K
        found = []
        rows = point.queries * HEADS // HEADS_K
        for tile in TILES:
            tile = (max(tile[0], 1 << (rows - 1).bit_length()), *tile[1:])
            config = launch.TileConfig(*tile)
            for splits in SPLITS:
                if not 100 <= tiles * splits <= 4096:
                    continue
                run = functools.partial(launch.forward, problem, config, launch.Splits(splits))
                try:
                    ms = do_bench(run, warmup=5, rep=20, return_mode="median")
                except Exception as error:  # does not fit
                    print(tile, str(error)[:60])
                    break
                found.append((kv_bytes(inputs) / ms / 1e6, tile, splits))
        found.sort(reverse=True)
        print(
            point.name(), point.queries, [(round(r), t, s) for r, t, s in found[:best]], flush=True
        )
        by_splits = {}
        for rate, tile, splits in found:
            by_splits.setdefault(splits, (round(rate), tile))
        print("   by splits:", by_splits, flush=True)


def parse_point(text: str) -> Point:
    shape, *kinds = text.split("/")
    batch, cache = map(int, shape.split("x"))
    point = Point(batch, cache)
    for kind in kinds:
        if kind == "ragged":
            point = point._replace(ragged=True)
        elif kind.startswith("page"):
            point = point._replace(page=int(kind[4:]))
        else:
            point = point._replace(queries=int(kind[1:]))
    return point


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tune", nargs="+", type=parse_point, help="e.g. 64x4096/page16/q4")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "results" / "decode.csv")
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a GPU", file=sys.stderr)
        return 2
    if args.tune:
        tune(args.tune)
        return 0
    about = environment(torch.device("cuda"))
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    header = ["batch x cache", "queries", "us", "kernels us", "GB/s", "of copy", "SDPA kernels us"]
    rows = measure(POINTS)
    print(tabulate(rows, header, floatfmt=(".4g", ".4g", ".1f", ".1f", ".0f", ".3f", ".1f")))
    host = measure_host()
    print(tabulate(host, ["", "us"], floatfmt=".1f"))
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*about, "point", *header[1:]])
        for row in rows:
            writer.writerow(
                [*about.values(), *(f"{x:.4g}" if isinstance(x, float) else x for x in row)]
            )
        for name, us in host:
            writer.writerow([*about.values(), name, "", f"{us:.4g}", *[""] * 4])
    return 0


if __name__ == "__main__":
    sys.exit(main())

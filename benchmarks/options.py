"""What each option costs: time per visited tile of scores, over plain causal attention's.

    python benchmarks/options.py --csv benchmarks/results/options.csv

One run, medians, random bfloat16 data: 4 x 16 heads x 4,096 x 128 and 4 x 32 x 4,096 x 64; then a
window of 256 beside full attention at 16k tokens. A tile counts as visited if any of its scores is
inside the mask.
"""

import argparse
import csv
import sys
from importlib import import_module
from pathlib import Path

import torch
from peers import Shape, load_kernel, random_inputs
from run import environment, time_ms
from tabulate import tabulate

SHAPES = (Shape(4, 16, 4096, 128, True), Shape(4, 32, 4096, 64, True))
GOALS = {"window": 1.25, "softcap": 1.25, "alibi": 1.25, "dropout": 1.6}  # over plain causal


def options(shape):
    """Name -> keyword arguments of flash_attn_func."""
    device = torch.device("cuda")
    slopes = load_kernel().get_alibi_slopes(shape.num_heads)
    slopes = torch.tensor(slopes, device=device)
    bias = torch.randn(shape.seq_len, shape.seq_len, device=device, dtype=torch.bfloat16)
    return {
        "causal": {},
        "window": {"window_size": (1024, 0)},
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi_slopes": slopes},
        "sink": {"s_aux": torch.randn(shape.num_heads, device=device)},
        "bias": {"attn_bias": bias},
        "dropout": {"dropout_p": 0.1},
        "softcap + alibi": {"softcap": 30.0, "alibi_slopes": slopes},
        "softcap + dropout": {"softcap": 30.0, "dropout_p": 0.1},
    }


def visited(seq_len, block_m, block_n, window):
    """Tiles of a causal mask, within `window` keys to the left, that hold any score."""
    count = 0
    for start in range(0, seq_len, block_m):
        first = max(start - window, 0) // block_n if window >= 0 else 0
        last = (min(start + block_m, seq_len) - 1) // block_n
        count += last - first + 1
    return count


def tiles(kind, shape, keywords):
    """Elements of the tiles that a call visits: by the forward's tile, by dK/dV's backward."""
    make = import_module(f"{load_kernel().__name__}.problem").AttentionProblem
    Options = import_module(f"{load_kernel().__name__}.options").Options
    launch = import_module(f"{load_kernel().__name__}.flash_attention_kernel.launch")
    q, k, v, _ = random_inputs(shape, "cuda")
    chosen = {n: x for n, x in keywords.items() if n in Options._fields}
    problem = make.dense(q, k, v, Options(causal=True, **chosen))
    kernel, arch = "forward" if kind == "fwd" else "dkdv", launch.calls.architecture(q.device)
    tile = launch.calls.tile_for(kernel, arch, problem)
    window = keywords.get("window_size", (-1, 0))[0]
    blocks = (tile.block_m, tile.block_n)
    return visited(shape.seq_len, *blocks, window) * tile.block_m * tile.block_n


def milliseconds(kind, shape, keywords, causal=True):
    """Of one forward, or one backward, with an option."""
    kernel = load_kernel()
    q, k, v, dout = random_inputs(shape, "cuda")
    if kind == "fwd":
        with torch.no_grad():
            call = lambda: kernel.flash_attn_func(q, k, v, causal=causal, **keywords)  # noqa: E731
            return time_ms(call, "cuda")
    out = kernel.flash_attn_func(q, k, v, causal=causal, **keywords)
    step = lambda: torch.autograd.grad(out, (q, k, v), dout, retain_graph=True)  # noqa: E731
    return time_ms(step, "cuda")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        print("needs a GPU", file=sys.stderr)
        return 2
    about = environment(torch.device("cuda"))
    print(", ".join(f"{k} {v}" for k, v in about.items()))
    rows = []
    for shape in SHAPES:
        plain = {}
        for name, keywords in options(shape).items():
            row = [shape.head_dim, name]
            for kind in ("fwd", "bwd"):
                ms = milliseconds(kind, shape, keywords)
                per_tile = ms / tiles(kind, shape, keywords)
                if name == "causal":
                    plain[kind] = per_tile
                row += [ms, per_tile / plain[kind]]
            rows.append([*row, GOALS.get(name)])
    for dim, heads in ((128, 16), (64, 32)):
        shape = Shape(1, heads, 16384, dim, False)
        full, window = (
            [milliseconds(kind, shape, keywords, False) for kind in ("fwd", "bwd")]
            for keywords in ({}, {"window_size": (128, 128)})
        )
        rows.append([dim, "16k full", full[0], None, full[1], None, None])
        gains = [a / b for a, b in zip(full, window)]
        rows.append([dim, "16k window 256, x faster", window[0], gains[0], window[1], gains[1], 8])
    header = ["head_dim", "option", "fwd ms", "per tile", "bwd ms", "per tile", "goal"]
    print(tabulate(rows, header, floatfmt=".3g", missingval="-"))
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow([*about, *header])
        writer.writerows([*about.values(), *row] for row in rows)
    return 0


if __name__ == "__main__":
    sys.exit(main())

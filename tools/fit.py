"""Find tiles for cards that are not at hand: the first candidates that fit and do not spill.

    python tools/fit.py --table sm_80 --keys 'forward/2/512/full' 'dkdv/.*/mods' [--write]

For every key that matches, candidates are derived from a start (the table's row for the same kernel
and the next smaller head_dim, or the same row without '/mods') by taking away pipeline stages, then
loop length, then rows; each is compiled (tools/aot.py) for all the table's architectures with all
the options the row serves. --write puts the finds into tuned/TABLE.json.
"""

import argparse
import itertools
import json
import re
import sys
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module

import aot

TUNED = aot.ROOT / "torch-ext/flash_attention/flash_attention_kernel/tuned"
HEAVY = ("all", "bias", "dropout")  # what a '/mods' row must serve


def candidates(kernel, start):
    """(block_m, block_n, num_warps, num_stages) from the most to the least wanted."""
    block_m, block_n, warps, stages = start
    if kernel == "decode":  # fewer rows than asked for have K and V read twice: last of all
        for m, n in itertools.product((64, 32, 16), (128, 64, 32, 16)):
            for num_stages in range(stages, 0, -1):
                for num_warps in dict.fromkeys((warps, 8, 4)):
                    if m <= block_m and n <= block_n:
                        yield m, n, num_warps, num_stages
        return
    owner, loop = (block_n, block_m) if kernel == "dkdv" else (block_m, block_n)
    shapes = [(owner, loop)]
    while shapes[-1] != (4, 16):  # a product sums over 16 at least
        rows, cols = shapes[-1]
        shapes.append((rows, cols // 2) if cols > 16 and cols >= rows else (rows // 2, cols))
    for rows, cols in shapes:
        for num_warps in dict.fromkeys((warps, 8, 4)):
            for num_stages in range(max(stages, 2), 0, -1):
                m, n = (cols, rows) if kernel == "dkdv" else (rows, cols)
                yield m, n, num_warps, num_stages


def rows_of(key, architectures):
    """What to compile for a key."""
    kernel, size, dim, *rest = key.split("/")
    dtypes = ("fp16", "bf16") if size == "2" else ("fp32",)
    if kernel == "decode":
        for arch, option in itertools.product(architectures, ("plain", "decode", "page16")):
            for dtype in dtypes[:1]:
                yield aot.Row(arch, kernel, dtype, int(dim), True, False, option, int(rest[0]))
        return
    if kernel == "tiles":
        options, masks = ("all", "dropout"), (True,)
    elif rest[-1] == "mods":
        options, masks, dtypes = HEAVY, (True,), dtypes[:1]
    else:
        options = ("plain", "window", "softcap", "alibi", "sink")
        masks = (rest[0] == "causal",)
    for arch in architectures:
        for dtype in dtypes:
            for mask in masks:
                for option in options if dtype != "bf16" else options[:1]:
                    yield aot.Row(arch, kernel, dtype, int(dim), mask, False, option)


def find(job):
    """-> (key, the first tile that fits everywhere, or None)"""
    key, start, architectures = job
    config = import_module(f"{aot.package()}.flash_attention_kernel.config")
    for tile in candidates(key.split("/")[0], start):
        for row in rows_of(key, architectures):
            try:
                report = aot.compile_row(row, config.TileConfig(*tile))
            except Exception:  # whatever a compiler may throw; the candidate is out
                break
            limit = config.tables()[row.arch].shared_memory
            if report.shared > limit or report.spill_bytes or report.serialized:
                break
        else:
            return key, tile
    return key, None


def start_of(key, rows):
    kernel, size, dim, *rest = key.split("/")
    if kernel == "decode":
        return (int(rest[0]), *rows[key]["tile"][1:])
    if kernel == "tiles":
        return (64, 64, 4, 1) if size == "2" else (32, 32, 4, 1)
    if rest[-1] == "mods":
        return rows[f"{kernel}/{size}/{dim}/causal"]["tile"]
    return rows[f"{kernel}/{size}/{int(dim) // 2}/{rest[0]}"]["tile"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--table", required=True, help="the name of a tuned/*.json")
    parser.add_argument("--keys", nargs="+", required=True, help="regular expressions")
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--write", action="store_true")
    args = parser.parse_args()
    path = TUNED / f"{args.table}.json"
    data = json.loads(path.read_text())
    config = import_module(f"{aot.package()}.flash_attention_kernel.config")
    keys = [key for key in config.all_keys() if any(re.fullmatch(k, key) for k in args.keys)]
    architectures = data["architectures"]
    jobs = [(key, start_of(key, data["rows"]), architectures) for key in keys]
    with ProcessPoolExecutor(args.jobs) as pool:
        for key, tile in pool.map(find, jobs):
            print(key, tile, flush=True)
            if tile is not None:
                data["rows"][key] = {"tile": list(tile)}
            if args.write:
                write(path, data)
    return 0


def write(path, data):
    """A table with one row per line, in the order of the keys."""
    config = import_module(f"{aot.package()}.flash_attention_kernel.config")
    kinds = ("full", "causal", "mods", "bias", "dropout", "pages")
    order = {key: n for n, key in enumerate(config.all_keys(kinds))}
    rows = sorted(data["rows"].items(), key=lambda item: order[item[0]])
    head = [f"  {json.dumps(k)}: {json.dumps(v)}" for k, v in data.items() if k != "rows"]
    body = [f"    {json.dumps(k)}: {json.dumps(v)}" for k, v in rows]
    text = "{\n" + ",\n".join(head) + ',\n  "rows": {\n' + ",\n".join(body) + "\n  }\n}\n"
    path.write_text(text)


if __name__ == "__main__":
    sys.exit(main())

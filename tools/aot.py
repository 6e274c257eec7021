"""Compile the shipped configs for every card, without a GPU, and hold them to its limits.

    python tools/aot.py [--arch sm_80 sm_90 ...] [--quick] [--jobs 2] [--csv FILE]

Each row of each table (flash_attention_kernel/tuned/) is compiled to a cubin or hsaco through the
launcher's own arguments; registers, spilled bytes and shared memory are reported, and the exit
code is 1 if a kernel spills (unless its table says that every tile found does), does not fit, or
has its wgmma serialised by ptxas (sm_90).
"""

import argparse
import csv
import itertools
import os
import re
import subprocess
import sys
import tempfile
from concurrent.futures import ProcessPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

os.environ.pop("TRITON_INTERPRET", None)  # the interpreter compiles nothing

import torch
import triton
from kernels import get_local_kernel
from sass import unwritten_reads
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.runtime.driver import driver

ROOT = Path(__file__).resolve().parent.parent
ARCHITECTURES = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942")
DIMS = (64, 128, 256, 512)
DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}


OPTIONS = {  # what of the AttentionProblem's fields, beyond those of a plain call, is set
    "plain": (),
    "window": ("window_left",),
    "softcap": ("softcap",),
    "alibi": ("alibi_slopes",),
    "both": ("softcap", "alibi_slopes"),
    "bias": ("attn_bias",),
    "sink": ("s_aux",),
    "dropout": ("dropout_p", "rng_state"),
    "all": (
        "window_left", "softcap", "alibi_slopes", "attn_bias", "s_aux", "dropout_p", "rng_state",
    ),
    "decode": ("window_left", "softcap", "alibi_slopes", "s_aux"),  # all that decoding has
}  # fmt: skip
PAGES = {"page1": 1, "page16": 16, "page256": 256}  # decoding from pages of so many rows


LONG = 8192  # rows of a sequence for which the hopper table's rows are that are not "-short"

# Bytes in local memory that are let pass in a backward: what outlasts a loop; from D 128 on also
# what a window, softcap and ALiBi take.
PARKED = {"hopper_backward": 168, "hopper_ordered": 64}


class Row(NamedTuple):
    """One kernel to compile: what selects a table row, varlen and options."""

    arch: str
    kernel: str
    dtype: str
    head_dim: int
    causal: bool
    varlen: bool
    options: str = "plain"  # a key of OPTIONS, or, for decode, of PAGES
    rows: int = 0  # decode: queries times heads of a group; hopper: of a sequence, if not LONG
    many: bool = False  # decode: more programs than multiprocessors


class Report(NamedTuple):
    """What the compiler made of a row."""

    registers: int
    spill_bytes: int
    shared: int
    serialized: bool  # ptxas waits for every wgmma: a fifth of the speed, and nothing else tells
    unwritten: int  # sm_90: reads of registers that may not have been written; tools/sass.py


class OfflineDriver:
    """Stands in for a GPU: Triton's launcher asks it for nothing but the target to compile for."""

    def __init__(self, arch: str):
        if arch.startswith("sm_"):
            self.target = GPUTarget("cuda", int(arch[3:]), 32)
        else:
            self.target = GPUTarget("hip", arch, 64)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return self.target.arch  # the key of Triton's in-memory kernel cache

    def get_current_stream(self, device):
        return 0


def package():
    """The local build's package; its kernels are the ones that ship."""
    return get_local_kernel(ROOT, backend="cpu").__name__


def dtype_of(row: Row):
    """q's; fp8 is of the hopper forward alone."""
    return torch.float8_e4m3fn if row.dtype == "fp8" else DTYPES[row.dtype]


def problem_for(row: Row):
    """A problem on the meta device: shapes, strides and dtypes, no data. Packed, it has GQA too."""
    make = import_module(f"{package()}.problem").AttentionProblem
    if row.kernel == "decode":
        return cache_problem_for(row, make)
    length = (row.rows or LONG) if row.kernel.startswith("hopper") else 256
    rows, heads_k = ((2 * length,), 2) if row.varlen else ((2, length), 4)
    q, k, v = (
        torch.empty((*rows, heads, row.head_dim), dtype=dtype_of(row), device="meta")
        for heads in (4, heads_k, heads_k)
    )
    options = import_module(f"{package()}.options").Options(causal=row.causal)
    if row.varlen:
        cu_seqlens = torch.empty(3, dtype=torch.int32, device="meta")
        lengths = (cu_seqlens, cu_seqlens, length, length)
        problem = make.varlen(q, k, v, *lengths, options)
    else:
        problem = make.dense(q, k, v, options)
    return with_options(problem, row)


def cache_problem_for(row: Row, make):
    """`row.rows` rows per KV head to a cache of two sequences; at 512, latent attention."""
    heads, heads_k = (16, 1) if row.head_dim == 512 else (8, 2)
    page_size = PAGES.get(row.options)
    head_dim = 576 if row.head_dim == 512 else row.head_dim
    q, k, v = (
        torch.empty(shape, dtype=DTYPES[row.dtype], device="meta")
        for shape in (
            (2, row.rows * heads_k // heads, heads, head_dim),
            (64, page_size or 256, heads_k, head_dim),
            (64, page_size or 256, heads_k, row.head_dim),
        )
    )
    lengths = torch.empty(2, dtype=torch.int32, device="meta")
    table = torch.empty((2, 32), dtype=torch.int32, device="meta") if page_size else None
    options = import_module(f"{package()}.options").Options(causal=row.causal)
    problem = make.kvcache(q, k, v, options, lengths, block_table=table)
    return problem if page_size else with_options(problem, row)


def with_options(problem, row: Row):
    """The problem with the options of the row."""
    values = {
        "window_left": 100,
        "softcap": 30.0,
        "dropout_p": 0.1,
        "rng_state": torch.empty(1, dtype=torch.int64, device="meta"),
        "attn_bias": torch.empty((2, 4, 256, 256), device="meta", dtype=problem.q.dtype),
    }
    heads = problem.q.shape[-2]
    values["alibi_slopes"] = torch.empty(heads, device="meta")
    values["s_aux"] = torch.empty(heads, device="meta", dtype=problem.q.dtype)
    return problem._replace(**{name: values[name] for name in OPTIONS[row.options]})


def launch_for(row: Row, tile=None):
    """The launch that the table, or `tile`, gives for a row."""
    calls = import_module(f"{package()}.flash_attention_kernel.calls")
    problem = problem_for(row)
    if row.kernel == "decode":
        return decode_launch_for(row, problem, tile)
    if row.kernel.startswith("hopper"):
        return hopper_launch_for(row, problem, tile)
    tile = tile or calls.tile_for(row.kernel, row.arch, problem)
    out, lse = problem.empty_out(), problem.empty_lse()
    _, (dq, dk, dv) = problem.empty_grads()
    if row.kernel == "forward":
        return calls.forward_launch(problem, out, lse, tile)
    if row.kernel == "dq":
        dslope = None if problem.alibi_slopes is None else lse
        return calls.dq_launch(problem, out, None, out, lse, dq, lse, dslope, tile)
    if row.kernel == "dkdv":
        return calls.dkdv_launch(problem, out, lse, lse, dk, dv, tile)
    if problem.attn_bias is not None:
        return calls.dbias_launch(problem, out, lse, lse, problem.attn_bias, tile)
    return calls.probs_launch(problem, lse, problem.empty_probs(256, 256), tile)


def decode_launch_for(row: Row, problem, tile):
    """A part of a split-KV call; where there are many programs, a call that is not split."""
    cache_calls = import_module(f"{package()}.flash_attention_kernel.cache_calls")
    if tile is None:
        config = import_module(f"{package()}.flash_attention_kernel.config")
        dims = (problem.q.shape[-1], problem.v.shape[-1])
        page_size = PAGES.get(row.options, 0)
        tile = config.choose_decode(row.arch, problem.q.dtype, *dims, row.rows, page_size, row.many)
    out, lse = problem.empty_out(), problem.empty_lse()
    splits = cache_calls.Splits(1 if row.many else 4)
    if splits.num > 1:
        out, lse = (torch.empty((splits.num, *t.shape), device="meta") for t in (out, lse))
    return cache_calls.decode_launch(problem, out, lse, splits, tile)


def hopper_launch_for(row: Row, problem, tile):
    """The forward, or the backward without what surrounds it."""
    hopper_calls = import_module(f"{package()}.flash_attention_kernel.hopper_calls")
    counters = torch.empty(2, dtype=torch.int32, device="meta")
    out = problem.empty_out()
    if row.kernel == "hopper":
        eight = ()
        if problem.is_float8():
            eight = (hopper_calls.empty_values(problem), problem.gains())
        return hopper_calls.forward_launch(
            problem, out, problem.empty_lse(), counters, tile, *eight
        )
    plan = hopper_calls.backward_plan(problem, tile)
    stats, sums, turns = hopper_calls.workspace(problem, plan)
    grads, ordered = problem.empty_grads()[1][1:], row.kernel == "hopper_ordered"
    return hopper_calls.backward_launch(
        problem, out, stats, sums, *grads, counters, turns, plan.tile, ordered
    )


def compile_row(row: Row, tile=None) -> Report:
    """Compile one row for its architecture."""
    driver.set_active(OfflineDriver(row.arch))
    launch = launch_for(row, tile)
    compiled = launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
    if row.arch.startswith("sm_"):
        registers, spill = cubin_usage(compiled.asm["cubin"])
    else:
        registers, spill = hsaco_usage(compiled.asm["amdgcn"])
    serialized = row.arch == "sm_90" and wgmma_serialized(compiled.asm["ptx"])
    unwritten = len(unwritten_reads(sass_of(compiled.asm["cubin"]))) if row.arch == "sm_90" else 0
    return Report(registers, spill, compiled.metadata.shared, serialized, unwritten)


def sass_of(cubin: bytes) -> str:
    """A cubin disassembled."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.nvdisasm.path, "-c", file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def cubin_usage(cubin: bytes):
    """-> (registers, bytes of stack: Triton's kernels have none but for spills)"""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "-res-usage", file.name]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return tuple(int(re.search(rf"{what}:(\d+)", text).group(1)) for what in ("REG", "STACK"))


def wgmma_serialized(ptx: str) -> bool:
    """Whether ptxas reports one of C7510 to C7518, its reasons to serialise."""
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = [get_ptxas(90).path, "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull]
        text = subprocess.run(command, check=True, capture_output=True, text=True).stderr
    return bool(re.search(r"C751[0-8]", text))


def hsaco_usage(assembly: str):
    """-> (vector registers, bytes of scratch)"""
    vgprs = int(re.search(r"\.vgpr_count:\s+(\d+)", assembly).group(1))
    return vgprs, int(re.search(r"\.private_segment_fixed_size:\s+(\d+)", assembly).group(1))


def rows(architectures, quick: bool):
    """Every table row with every weighty option; `quick`: one per kernel."""
    if quick:
        for arch in architectures:
            for kernel, options in (("forward", "plain"), ("dq", "alibi"), ("dkdv", "dropout")):
                yield Row(arch, kernel, "fp16", 128, True, True, options)
            yield Row(arch, "decode", "fp16", 128, True, False, "page16", 16)
            if arch == "sm_90":
                for dim, varlen in itertools.product((64, 128), (False, True)):
                    yield Row(arch, "hopper", "bf16", dim, True, varlen)
                    yield Row(arch, "hopper_backward", "bf16", dim, True, varlen)
                yield Row(arch, "hopper_ordered", "bf16", 64, False, False)
                yield Row(arch, "hopper_backward", "bf16", 256, True, True, "both")
        return
    if "sm_90" in architectures:
        for dim, dtype, causal, varlen in itertools.product(
            (64, 128), ("fp16", "bf16"), (False, True), (False, True)
        ):
            if dim == 64:
                yield Row("sm_90", "hopper", dtype, dim, causal, varlen, "plain", 512)
            for options in ("plain", "window", "both", "sink"):
                yield Row("sm_90", "hopper", dtype, dim, causal, varlen, options)
                if options != "sink":  # which gradients do not see
                    yield Row("sm_90", "hopper_backward", dtype, dim, causal, varlen, options)
            yield Row("sm_90", "hopper_ordered", dtype, dim, causal, varlen)
            if dtype == "bf16":
                for options in ("plain", "both"):
                    yield Row("sm_90", "hopper", "fp8", dim, causal, varlen, options)
            for more in (96, 192, 256) if dim == 128 else ():
                yield Row("sm_90", "hopper", dtype, more, causal, varlen)
                yield Row("sm_90", "hopper_backward", dtype, more, causal, varlen)
        for dtype, options in itertools.product(("fp16", "bf16"), ("plain", "page16")):
            yield Row("sm_90", "decode", dtype, 128, True, False, options, 16, True)
    for arch, dim in itertools.product(architectures, DIMS):
        for kernel in ("forward", "dq", "dkdv"):
            for dtype, causal in itertools.product(DTYPES, (False, True)):
                yield Row(arch, kernel, dtype, dim, causal, False)
            for dtype, options in itertools.product(("fp16", "fp32"), OPTIONS):
                if options not in ("plain", "window", "sink"):  # which take what plain takes
                    yield Row(arch, kernel, dtype, dim, True, False, options)
        for dtype, rows in itertools.product(DTYPES, (16, 32, 64)):
            for options in ("plain", "decode", *PAGES) if dtype != "bf16" else ("plain",):
                yield Row(arch, "decode", dtype, dim, True, False, options, rows)
        for dtype in DTYPES:
            yield Row(arch, "tiles", dtype, dim, True, False, "all")
            yield Row(arch, "tiles", dtype, dim, True, True, "dropout")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--arch", nargs="+", default=ARCHITECTURES, choices=ARCHITECTURES)
    parser.add_argument("--options", nargs="+", choices=(*OPTIONS, *PAGES), help="only these")
    parser.add_argument("--kernels", nargs="+", help="only these")
    parser.add_argument("--quick", action="store_true", help="a subset that takes a minute")
    parser.add_argument("--jobs", type=int, default=os.cpu_count())
    parser.add_argument("--csv", type=Path, help="write the report here")
    args = parser.parse_args()

    limits = import_module(f"{package()}.flash_attention_kernel.config").tables()
    todo = list(rows(args.arch, args.quick))
    if args.options:
        todo = [row for row in todo if row.options in args.options]
    if args.kernels:
        todo = [row for row in todo if row.kernel in args.kernels]
    print(f"triton {triton.__version__}: {len(todo)} kernels", flush=True)
    records, bad = [], 0
    with ProcessPoolExecutor(args.jobs) as pool:
        for row, report in zip(todo, pool.map(compile_row, todo)):
            limit = limits[row.arch].shared_memory
            size = f"{row.kernel}/{dtype_of(row).itemsize}/{row.head_dim}"
            admitted = f"{size}/causal" in limits[row.arch].spilling
            spills = report.spill_bytes > PARKED.get(row.kernel, 0) and not admitted
            good = report.shared <= limit and not spills
            good = good and not report.serialized and not report.unwritten
            bad += not good
            record = {"triton": triton.__version__, **row._asdict(), **report._asdict()}
            records.append({**record, "limit": limit})
            print(
                f"{row.arch:7} {row.kernel:8} {row.dtype} D {row.head_dim:3} "
                f"{'causal' if row.causal else 'full  '} {'varlen' if row.varlen else 'dense '} "
                f"{row.options:8} {row.rows or '':2} {'many ' if row.many else ''}"
                f"{report.registers:4} registers {report.spill_bytes:5} B spilled "
                f"{report.shared:7} of {limit} B shared "
                f"{'SERIALIZED ' if report.serialized else ''}"
                f"{f'{report.unwritten} UNWRITTEN ' if report.unwritten else ''}"
                f"{'' if good else 'BAD'}",
                flush=True,
            )
    if args.csv:
        with args.csv.open("w", newline="") as file:
            writer = csv.DictWriter(file, records[0], lineterminator="\n")
            writer.writeheader()
            writer.writerows(records)
    print(f"{len(todo) - bad} of {len(todo)} kernels fit, without spills but those let pass")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())

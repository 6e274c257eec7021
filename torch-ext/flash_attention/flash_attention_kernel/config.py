"""Tile shapes: which config a kernel runs with. Tables in tuned/*.json, never run-time tuning."""

import functools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Dict

import torch

MIN_BLOCK_D = 16  # the smallest extent a matrix instruction takes
MAX_BLOCK_D = 512  # decode_kernel takes what a head_dim has beyond it apart
TABLE_HEAD_DIMS = (64, 128, 256, 512)  # the tables' rows; a head_dim uses the next row up
KERNELS = ("forward", "dq", "dkdv", "tiles", "decode")  # tiles: those of score_tiles.py
DECODE_ROWS = (16, 32, 64)  # decode_kernel's BLOCK_M: the fewest that hold a sequence's rows
HOPPER_DIMS = (64, 128, 256)  # hopper/: a head_dim uses the next one up
HOPPER_SPLIT = (128, 64)  # the columns of two tiles of Q, K or V, in its forward, for 129 to 192
DECODE_KINDS = ("pages", "many", "pages-many")  # what may have tiles of its own: see choose_decode
SMALL_PAGE = 128  # pages whose rows are no multiple of it may have tiles of their own


@dataclass(frozen=True)
class TileConfig:
    """BLOCK_M query rows by BLOCK_N keys per step, and how Triton is to compile it."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class HopperConfig:
    """Tiles of hopper/: BLOCK_M query rows, forward 64 for each consumer, by BLOCK_N keys, in
    backward.py 64 for each consumer, in wide.py 64."""

    block_m: int
    block_n: int
    stages: int  # of the rings of K and V; in the backward, of Q and dO
    q_tiles: int = 1  # that the ring of Q holds: with 2 the next is loaded under the end of this


@dataclass(frozen=True)
class Table:
    """One tuned/*.json: `rows` maps the keys of `row_key` to the four TileConfig fields."""

    architectures: tuple
    shared_memory: int  # bytes one program may use; tools/aot.py holds the rows to it
    rows: Dict[str, TileConfig]
    spilling: frozenset  # keys whose tile spills: others are slower, or spill too
    hopper: Dict[str, HopperConfig]  # '64/causal': head_dim, 'full', 'causal', '...-short', ...


@functools.lru_cache(maxsize=None)
def tables():
    """Every shipped table, by architecture name."""
    by_architecture = {}
    for path in sorted(Path(__file__).parent.joinpath("tuned").glob("*.json")):
        data = json.loads(path.read_text())
        rows = {key: TileConfig(*row["tile"]) for key, row in data["rows"].items()}
        spilling = frozenset(key for key, row in data["rows"].items() if row.get("spills"))
        hopper = {key: HopperConfig(*row["tile"]) for key, row in data.get("hopper", {}).items()}
        table = Table(tuple(data["architectures"]), data["shared_memory"], rows, spilling, hopper)
        by_architecture.update(dict.fromkeys(table.architectures, table))
    return by_architecture


@functools.lru_cache(maxsize=None)
def architecture(device: torch.device) -> str:
    """`sm_90`, `gfx942`, `xpu`, ... of a device; a CPU only ever runs the interpreter."""
    if device.type != "cuda":
        return device.type
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_%d%d" % torch.cuda.get_device_capability(device)


@functools.lru_cache(maxsize=None)
def multiprocessors(device: torch.device) -> int:
    """Of a GPU; 64 of what cannot be asked: the interpreter, and XPU, which has other names."""
    if device.type != "cuda":
        return 64
    return torch.cuda.get_device_properties(device).multi_processor_count


def table_for(arch: str) -> Table:
    """The table of an architecture, or that of its nearest relative."""
    if arch in tables():
        return tables()[arch]
    if arch.startswith("sm_10") or arch.startswith("sm_11"):
        return tables()["sm_100"]
    if arch.startswith("sm_"):  # 99 KiB of shared memory: what every other card has
        return tables()["sm_86"]
    return tables()["gfx942"]  # 64 KiB: other AMD cards, XPU, the interpreter


def block_dim(head_dim: int) -> int:
    """Head dimensions are padded to a power of two.

    K and V to the same one: where V's was the smaller and K's loads were not pipelined (head_dim
    64 with head_dim_v 32, 59 with 1), Triton 3.6 gave wrong sums on an H200.
    """
    return max(MIN_BLOCK_D, 1 << (head_dim - 1).bit_length())


def row_key(kernel: str, itemsize: int, head_dim: int, kind: str) -> str:
    """The key of a table row, e.g. 'forward/2/128/causal': kernel, bytes per element, head_dim, and
    'full' or 'causal', or what of AttentionProblem.weight() needs tiles of its own; for decode one
    of DECODE_ROWS."""
    width = next(dim for dim in TABLE_HEAD_DIMS if head_dim <= dim or dim == MAX_BLOCK_D)
    if kernel == "tiles":  # visits every tile with every option
        return f"{kernel}/{itemsize}/{width}"
    return f"{kernel}/{itemsize}/{width}/{kind}"


def all_keys(kinds=("full", "causal", "mods")):
    """Every key that a table must have, in order; with 'bias', 'dropout' and 'pages', may have."""
    decode = []
    if "pages" in kinds:
        decode = [f"{rows}/{kind}" for rows in DECODE_ROWS for kind in DECODE_KINDS]
    keys = [
        row_key(kernel, itemsize, head_dim, kind)
        for kernel in KERNELS
        for itemsize in (2, 4)
        for head_dim in TABLE_HEAD_DIMS
        for kind in ((*DECODE_ROWS, *decode) if kernel == "decode" else kinds)
    ]
    return list(dict.fromkeys(keys))


def _rows(arch: str, dtype: torch.dtype):
    """The rows of an architecture's table, if it has the dtype at all."""
    if dtype == torch.bfloat16 and arch in ("sm_70", "sm_72", "sm_75"):
        raise TypeError(
            f"q is bfloat16, which needs sm_80 or newer; this GPU is {arch}: use float16"
        )
    return table_for(arch).rows


@functools.lru_cache(maxsize=None)
def choose(
    kernel: str,
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    masked: bool,
    weight: str = "",
) -> TileConfig:
    """The config of one of KERNELS on an architecture. weight: AttentionProblem.weight()"""
    rows = _rows(arch, dtype)
    size = (kernel, dtype.itemsize, max(head_dim, head_dim_v))
    if weight:
        return rows.get(row_key(*size, weight)) or rows[row_key(*size, "mods")]
    return rows[row_key(*size, "causal" if masked else "full")]


@functools.lru_cache(maxsize=None)
def choose_decode(
    arch: str,
    dtype: torch.dtype,
    head_dim: int,
    head_dim_v: int,
    rows: int,
    page_size: int = 0,
    many: bool = False,
) -> TileConfig:
    """decode_kernel's config for sequences of `rows` rows of queries and heads of a group. many:
    more programs than multiprocessors, of which several may then share one."""
    block_m = next((n for n in DECODE_ROWS if rows <= n), DECODE_ROWS[-1])
    key = row_key("decode", dtype.itemsize, max(head_dim, head_dim_v), block_m)
    kinds = ["many"] * many
    if page_size % SMALL_PAGE:
        kinds = ["pages-many"] * many + ["pages"]
    table = _rows(arch, dtype)
    names = (*(f"{key}/{kind}" for kind in kinds), key)
    return table[next(name for name in names if name in table)]


def hopper_dim(head_dim: int) -> int:
    """The columns that hopper/forward.py computes with."""
    return next(dim for dim in HOPPER_DIMS if head_dim <= dim)


def hopper_parts(head_dim: int) -> tuple:
    """The columns of a tile of Q or K in hopper/forward.py, and of the one beside it, or 0."""
    first, more = HOPPER_SPLIT
    return HOPPER_SPLIT if first < head_dim <= first + more else (hopper_dim(head_dim), 0)


@functools.lru_cache(maxsize=None)
def choose_hopper(head_dim: int, head_dim_v: int, kind: str, short: bool) -> HopperConfig:
    """hopper/forward.py's config. kind: full, causal (and window) or float8; short: of sequences
    too short for tiles of 192 rows, which have a row of their own where others have such tiles."""
    width = hopper_dim(max(head_dim, head_dim_v))
    if hopper_parts(head_dim)[1]:
        width = "192x128" if head_dim_v <= 128 else "192"
    table, key = table_for("sm_90").hopper, f"{width}/{kind}"
    return table.get(f"{key}-short", table[key]) if short else table[key]


def choose_hopper_backward(head_dim: int, mods: bool) -> HopperConfig:
    """hopper/backward.py's config. mods: with what takes registers: window, softcap or ALiBi."""
    kind = "backward-mods" if mods else "backward"
    return table_for("sm_90").hopper[f"{hopper_dim(head_dim)}/{kind}"]

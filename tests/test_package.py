"""What ships: layering, tables, build variants, and kernels that compile for every card."""

import ast
import importlib
import json
import os
import shutil
import subprocess
import sys
import sysconfig
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from conftest import ROOT

PACKAGE = ROOT / "torch-ext" / "flash_attention"
KERNELS = PACKAGE / "flash_attention_kernel"
# DESIGN.md: imports run one way. Each module may import only from those named.
LAYERS = {
    "__init__": {
        "classic", "interface", "kvcache", "layers", "merging", "modules", "padding", "private",
        "rotary",
    },
    "modules": {"kvcache", "layers", "padding", "rotary"},
    "layers": {"interface"},
    "classic": {"interface"},
    "interface": {"autograd", "options", "problem", "remembered"},
    "kvcache": {"ops", "options", "problem", "remembered"},
    "remembered": set(),
    "merging": {"ops"},
    "private": {"ops", "options", "problem"},
    "rotary": {"ops"},
    "autograd": {"ops", "problem"},
    "ops": {"cpu", "cpu_cache", "_ops", "problem", "flash_attention_kernel"},
    "cpu": {"cpu_cache"},
    "cpu_cache": set(),
    "padding": set(),
    "problem": {"checks", "options"},
    "checks": set(),
    "options": {"checks"},
    "flash_attention_kernel/__init__": set(),
    "flash_attention_kernel/launch": {
        "append_kv", "cache_calls", "calls", "config", "hopper_calls", "plans",
    },
    "flash_attention_kernel/plans": {"calls", "tensor_maps"},
    "flash_attention_kernel/tensor_maps": set(),
    "flash_attention_kernel/hopper_calls": {"calls", "config", "hopper", "seqlen"},
    "flash_attention_kernel/hopper/__init__": set(),
    "flash_attention_kernel/hopper/compat": set(),
    "flash_attention_kernel/hopper/pipeline": {"common", "compat"},
    "flash_attention_kernel/hopper/stats": {"common", "seqlen"},
    "flash_attention_kernel/hopper/backward": {
        "common", "compat", "grads", "masks", "pipeline", "schedule", "scores", "seqlen", "sums",
    },
    "flash_attention_kernel/hopper/grads": {"common", "compat", "pipeline"},
    "flash_attention_kernel/hopper/wide": {
        "backward", "common", "grads", "masks", "pipeline", "schedule", "scores", "seqlen", "sums",
    },
    "flash_attention_kernel/hopper/schedule": {"masks", "pipeline", "seqlen"},
    "flash_attention_kernel/hopper/sums": {"compat", "masks", "pipeline", "schedule"},
    "flash_attention_kernel/hopper/softmax": {"pipeline", "softmax"},
    "flash_attention_kernel/hopper/products": {"pipeline", "softmax"},
    "flash_attention_kernel/hopper/epilogue": {
        "common", "compat", "pipeline", "products", "seqlen",
    },
    "flash_attention_kernel/hopper/values": {"common", "seqlen"},
    "flash_attention_kernel/hopper/producer": {"pipeline", "schedule"},
    "flash_attention_kernel/hopper/forward": {
        "epilogue", "masks", "pages", "pipeline", "producer", "products", "schedule", "scores",
        "seqlen", "softmax",
    },
    "flash_attention_kernel/calls": {
        "backward", "common", "config", "forward", "pages", "rotary", "score_tiles", "seqlen",
    },
    "flash_attention_kernel/cache_calls": {
        "append_kv", "calls", "combine", "common", "config", "decode", "pages", "seqlen",
    },
    "flash_attention_kernel/config": set(),
    "flash_attention_kernel/common": set(),
    "flash_attention_kernel/seqlen": {"common"},
    "flash_attention_kernel/masks": {"common"},
    "flash_attention_kernel/scores": {"common"},
    "flash_attention_kernel/softmax": {"common"},
    "flash_attention_kernel/pages": {"common"},
    "flash_attention_kernel/attend": {"common", "masks", "pages", "scores", "softmax"},
    "flash_attention_kernel/forward": {
        "attend", "common", "masks", "pages", "scores", "seqlen", "softmax",
    },
    "flash_attention_kernel/decode": {
        "attend", "common", "masks", "pages", "scores", "seqlen", "softmax",
    },
    "flash_attention_kernel/combine": {"softmax"},
    "flash_attention_kernel/append_kv": {"common", "pages", "rotation", "seqlen"},
    "flash_attention_kernel/rotation": set(),
    "flash_attention_kernel/backward": {"common", "masks", "scores", "seqlen"},
    "flash_attention_kernel/score_tiles": {"common", "masks", "scores", "seqlen"},
    "flash_attention_kernel/rotary": {"common", "rotation", "seqlen"},
}  # fmt: skip
OUTSIDE = set(sys.stdlib_module_names) | {"torch", "triton"}


def imports_of(path):
    """-> (relative imports, absolute imports, those of them inside functions)"""
    relative, absolute, lazy = set(), set(), set()
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.level:
            above = 2 if path.parent.name == "hopper" else 1
            assert node.level <= above, f"{path}: imports from above the kernels"
            relative |= {node.module} if node.module else {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            absolute.add(node.module.split(".")[0])
        elif isinstance(node, ast.Import):
            absolute |= {alias.name.split(".")[0] for alias in node.names}
    for function in ast.walk(tree):
        if isinstance(function, ast.FunctionDef):
            for node in ast.walk(function):
                if isinstance(node, ast.ImportFrom) and node.level:
                    names = [node.module] if node.module else [a.name for a in node.names]
                    lazy |= {name.split(".")[0] for name in names}
    return {name.split(".")[0] for name in relative}, absolute, lazy


@pytest.mark.kernels_ci
def test_layering():
    names = {str(p.relative_to(PACKAGE).with_suffix("")) for p in PACKAGE.rglob("*.py")}
    assert names - {"_ops"} == set(LAYERS), "a new module needs its place in LAYERS"
    for name, allowed in LAYERS.items():
        relative, absolute, lazy = imports_of(PACKAGE / f"{name}.py")
        assert relative <= allowed, f"{name} imports {relative - allowed}"
        assert absolute <= OUTSIDE, f"{name} imports {absolute - OUTSIDE}"
        assert (name == "flash_attention_kernel/launch") == ("hopper_calls" in lazy)
        if "flash_attention_kernel" not in name:
            assert "triton" not in absolute, f"{name} imports triton"
            assert ("flash_attention_kernel" in lazy) == (name == "ops")


def test_public_names(kernel):
    """__all__ is a literal, as the Hub asks, and everything in it has a docstring."""
    tree = ast.parse((PACKAGE / "__init__.py").read_text())
    (names,) = [ast.literal_eval(n.value) for n in tree.body if isinstance(n, ast.Assign)]
    assert names == kernel.__all__
    for name in names:
        assert getattr(kernel, name).__doc__
    for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
        assert getattr(kernel, f"_flash_attn_{name}").__doc__


def test_symlink():
    assert (ROOT / "flash_attention_kernel").resolve() == KERNELS.resolve()


def test_tables_are_complete(module):
    """Every table has a valid row for every kernel, width, head_dim and mask."""
    config = module("flash_attention_kernel.config")
    assert {"sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120", "gfx942"} <= set(
        config.tables()
    )
    keys = set(config.all_keys())
    assert len(keys) == 3 * 2 * 4 * 3 + 2 * 4 + 2 * 4 * 3
    for arch, table in config.tables().items():
        optional = set(config.all_keys(("bias", "dropout", "pages")))
        assert keys <= set(table.rows) <= keys | optional, arch
        for key, tile in table.rows.items():
            for block in (tile.block_m, tile.block_n):
                assert block >= 4 and block & (block - 1) == 0, (arch, key)
            assert tile.num_warps in (1, 2, 4, 8, 16) and tile.num_stages >= 1, (arch, key)
    for key, tile in config.tables()["sm_90"].hopper.items():
        assert tile.block_m in ((64, 128) if "backward" in key else (128, 192)), key
        assert tile.block_n in (64, 128) and tile.stages >= 2 and tile.q_tiles >= 1, key
    for key, entry in json.loads((KERNELS / "tuned/sm_90.json").read_text())["hopper"].items():
        assert "tflops" not in entry or {"triton", "commit"} <= set(entry), key
    for head_dim, head_dim_v in ((8, 8), (64, 32), (96, 96), (192, 128), (192, 256), (256, 256)):
        assert config.choose_hopper(
            head_dim, head_dim_v, "causal" if head_dim > 64 else "full", head_dim_v < 64
        )
        assert max(head_dim, head_dim_v) > 128 or config.choose_hopper(
            head_dim, head_dim_v, "float8", head_dim_v < 64
        )
    for mods in (False, True):
        assert config.choose_hopper_backward(80, mods) == config.choose_hopper_backward(128, mods)
        assert config.choose_hopper_backward(192, mods).block_n == 64  # hopper/wide.py's
    rows = config.tables()["sm_90"].rows
    for page_size, many, kind in (
        (0, False, ""), (16, False, "/pages"), (256, False, ""),
        (0, True, "/many"), (16, True, "/pages-many"), (256, True, "/many"),
    ):  # fmt: skip
        tile = config.choose_decode("sm_90", torch.half, 128, 128, 4, page_size, many)
        assert tile == rows[f"decode/2/128/16{kind}"]
    assert config.choose_decode("sm_90", torch.half, 64, 64, 4, 16, True) == rows["decode/2/64/16"]
    for arch in ("sm_75", "sm_87", "sm_103", "sm_121", "gfx90a", "gfx1100", "xpu"):
        assert config.choose("dkdv", arch, torch.half, 111, 80, True)


@pytest.mark.parametrize("quick", ("sm_80", "sm_90", "sm_120", "gfx942"))
def test_compiles_without_a_gpu(quick):
    """A subset of tools/aot.py: fits, no spills, no serialised wgmma, under the pinned Triton."""
    pins = (ROOT / "requirements.txt").read_text().split()
    if f"triton=={version('triton')}" not in pins:
        pytest.skip("another Triton compiles to other registers: benchmarks/results/aot-*.csv")
    command = [sys.executable, "tools/aot.py", "--quick", "--jobs", "1", "--arch", quick]
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    number = 14 if quick == "sm_90" else 4
    assert f"{number} of {number} kernels fit" in done.stdout


SPECIALIZED = """
import aot, torch
from importlib import import_module
from triton.runtime.jit import JITFunction

aot.driver.set_active(aot.OfflineDriver("sm_90"))
calls, cache_calls, hopper_calls = (
    import_module(f"{aot.package()}.flash_attention_kernel.{name}")
    for name in ("calls", "cache_calls", "hopper_calls")
)
hopper_calls.multiprocessors = lambda device: 132
found = {}


def record(self, key, signature, device, constexprs, options, attrs, warmup):
    found.setdefault(self.fn.__name__, set()).add(f"{signature} {constexprs} {attrs}")


JITFunction._do_compile = record
plain = aot.problem_for(aot.Row("sm_90", "forward", "bf16", 128, True, False, "plain"))
new = lambda *shape, dtype=torch.bfloat16: torch.empty(shape, dtype=dtype, device="meta")
counters = new(2, dtype=torch.int32)
for batch, seqlen, pages in ((1, 1 << 18, 7), (3, 4096, 16), (16, 1024, 512), (40, 48, 1)):
    q, k = new(batch, seqlen, 16, 128), new(batch, seqlen, 8, 128)
    p = plain._replace(q=q, k=k, v=k)
    out, lse = p.empty_out(), p.empty_lse()
    launches = [calls.forward_launch(p, out, lse)]
    launches.append(hopper_calls.forward_launch(p, out, lse, counters))
    plan = hopper_calls.backward_plan(p)
    stats, sums, turns = hopper_calls.workspace(p, plan)
    if plan.parts == 1:
        launches.append(
            hopper_calls.backward_launch(p, out, stats, sums, k, k, counters, turns, plan.tile)
        )
    table, used = new(3, pages, dtype=torch.int32), new(3, dtype=torch.int32)
    k = new(pages, 16, 8, 128)
    p = p._replace(q=new(3, 1, 16, 128), k=k, v=k, block_table=table, seqused_k=used)
    launches.append(
        cache_calls.decode_launch(p, p.empty_out(), p.empty_lse(), cache_calls.Splits(1))
    )
    for launch in launches:
        launch.kernel.warmup(*launch.args, grid=launch.grid, **launch.options)
print({name: len(kinds) for name, kinds in found.items()})
"""


def test_a_kernel_serves_all_batches():
    """Neither batch nor lengths, in multiples of 16, nor the size of a cache compile one anew."""
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-c", SPECIALIZED], cwd=ROOT / "tools", env=env, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    counts = ast.literal_eval(done.stdout)
    assert len(counts) == 4 and set(counts.values()) == {1}, counts


SASS = """
        /*0000*/                   UMOV UR4, 0x1 ;
        /*0010*/              @P0 BRA `(.L_x_1) ;
        /*0020*/                   UIADD3 UR5, UR4, 0x2, URZ ;
.L_x_1:
        /*0030*/                   R2UR UR6, R2 ;
        /*0038*/              @P2  R2UR P1, UR7, R2 ;
        /*0040*/                   IMAD.U32 R3, RZ, RZ, UR{} ;
        /*0050*/                   EXIT ;
"""


def test_registers_read_unwritten(monkeypatch):
    """tools/sass.py finds what only one of two paths has written, and nothing else."""
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    sass = importlib.import_module("sass")
    for register in (4, 6, 7):
        assert not sass.unwritten_reads(SASS.format(register))
    assert [found.address for found in sass.unwritten_reads(SASS.format(5))] == ["0040"]


VARIANTS = ("cpu", "cu126", "cu130", "cu132")


@pytest.mark.parametrize("tag", VARIANTS)
def test_variant(tag):
    """Metadata that the Hub reads, a digest that holds, every source, a stable-ABI extension."""
    from kernels._rust import Digest, DigestAlgorithm, Metadata

    (variant,) = (ROOT / "build").glob(f"torch-stable-abi29-{tag}-*-linux")
    metadata = Metadata.read_from_file(variant / "metadata.json")
    backend = "cpu" if tag == "cpu" else "cuda"
    assert metadata.id.startswith(f"_flash_attention_{backend}_")
    assert str(metadata.name) == "flash-attention" and metadata.license == "Apache-2.0"
    actual = Digest.hash_variant(DigestAlgorithm.SHA256, variant).files
    assert {k: v for k, v in actual.items() if k != "metadata.json" and "__pycache__" not in k} == (
        metadata.digest.files
    )
    shipped = {
        str(p.relative_to(PACKAGE)) for p in PACKAGE.rglob("*") if p.suffix in (".py", ".json")
    }
    assert shipped <= set(metadata.digest.files)
    (extension,) = variant.glob("*.abi3.so")
    library = pytest.importorskip("kernel_abi_check").ObjectFile(extension)
    assert not library.check_python_abi("3.9") and not library.check_manylinux("manylinux_2_28")
    symbols = subprocess.run(
        ["nm", "-D", "--undefined-only", extension], capture_output=True, text=True
    )
    torch_symbols = {s.split()[-1] for s in symbols.stdout.splitlines() if "torch" in s}
    assert torch_symbols == {
        "aoti_torch_library_init_def",
        "aoti_torch_library_def",
        "aoti_torch_delete_library_object",
    }


def test_two_versions_side_by_side(tmp_path):
    """Another version builds into another op namespace; both work in one process."""
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        pytest.skip("needs Python's headers to compile the binding")
    for name in ("torch-ext", "tools", "build.toml"):
        source, target = ROOT / name, tmp_path / name
        shutil.copytree(source, target) if source.is_dir() else shutil.copy(source, target)
    toml = tmp_path / "build.toml"
    toml.write_text(toml.read_text().replace("version = 1", "version = 2"))
    command = [sys.executable, "tools/build.py", "--backends", "cpu"]
    subprocess.run(command, cwd=tmp_path, check=True, capture_output=True)
    code = f"""
import torch
from pathlib import Path
from kernels import get_kernel, get_local_kernel
first = get_kernel("org/flash-attention", version=1, backend="cpu")
second = get_local_kernel(Path({str(tmp_path)!r}), backend="cpu")
assert first.__name__ != second.__name__
q = torch.randn(1, 9, 2, 8)
assert torch.equal(first.flash_attn_func(q, q, q), second.flash_attn_func(q, q, q))
"""
    env = {**os.environ, "LOCAL_KERNELS": f"org/flash-attention={ROOT}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (metadata,) = tmp_path.glob("build/*/metadata.json")
    assert json.loads(metadata.read_text())["version"] == 2


def test_kernel_builder_reads_build_toml():
    from kernels._rust import Build

    backends = {str(b) for b in Build.open(ROOT).general.backends}
    assert {"cpu", "cuda", "rocm", "xpu"} == {b.lower() for b in backends}


def test_files_stay_small():
    """DESIGN.md: a file is one screenful of ideas, near 400 lines."""
    for path in [*PACKAGE.rglob("*.py"), *Path(ROOT / "tools").glob("*.py")]:
        assert len(path.read_text().splitlines()) <= 450, path

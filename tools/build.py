"""Build the Hub variants where Nix is absent: what kernel-builder does, with g++ alone.

    python tools/build.py [--output build] [--backends cpu cuda] [--force]

For each backend the schemas-only binding is compiled against torch's stable ABI; each variant,
build/torch-stable-abi29-<backend>-<cpu>-linux/, then gets the Python package, the extension,
_ops.py and metadata.json. Nothing of CUDA is needed, so any machine builds every variant.
"""

import argparse
import hashlib
import json
import platform
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

import tomllib
from kernels._rust import Build, Digest, DigestAlgorithm, Metadata
from torch.utils.cpp_extension import include_paths, library_paths

ROOT = Path(__file__).resolve().parent.parent
VARIANTS = {"cpu": ["cpu"], "cuda": ["cu126", "cu130", "cu132"]}

REGISTRATION_H = """\
#pragma once
// Written by tools/build.py. The indirection lets NAME be a macro.
#include <Python.h>

#define STABLE_TORCH_LIBRARY_EXPAND(NAME, MODULE) STABLE_TORCH_LIBRARY(NAME, MODULE)

#define FA_STRING_(X) #X
#define FA_STRING(X) FA_STRING_(X)
#define FA_INIT_(NAME) PyInit_##NAME
#define FA_INIT(NAME) FA_INIT_(NAME)

// An empty Python module: importing it loads the library, whose static initialisers register ops.
#define REGISTER_EXTENSION(NAME)                                                     \\
  PyMODINIT_FUNC FA_INIT(NAME)(void) {                                               \\
    static PyModuleDef module = {PyModuleDef_HEAD_INIT, FA_STRING(NAME), nullptr, 0, \\
                                 nullptr};                                           \\
    return PyModule_Create(&module);                                                 \\
  }
"""

OPS_PY = '''\
"""Written by tools/build.py: the namespace of this build's ops."""

import torch

from . import {id}

ops = torch.ops.{id}


def add_op_namespace_prefix(op_name: str) -> str:
    """`op_name` with the namespace that only this build uses."""
    return f"{id}::{{op_name}}"
'''


def source_files():
    """Everything a build depends on, in a fixed order."""
    package = ROOT / "torch-ext"
    files = [p for suffix in ("py", "json", "cpp", "h") for p in package.rglob(f"*.{suffix}")]
    return sorted(p for p in files if p.name != "_ops.py") + [ROOT / "build.toml"]


def source_hash() -> str:
    """Of contents and names, so that two versions never share an op namespace."""
    digest = hashlib.sha256()
    for path in source_files():
        digest.update(str(path.relative_to(ROOT)).encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:7]


def git(*words) -> str:
    return subprocess.run(
        ["git", *words], cwd=ROOT, check=True, capture_output=True, text=True
    ).stdout.strip()


def compile_binding(name: str, abi: tuple, directory: Path) -> Path:
    """The extension `name`.abi3.so: schemas on the stable ABI, no rpath, three torch symbols."""
    (directory / "registration.h").write_text(REGISTRATION_H)
    library = directory / f"{name}.abi3.so"
    includes = [directory, ROOT / "torch-ext", sysconfig.get_paths()["include"], *include_paths()]
    subprocess.run(
        [
            *["g++", "-std=c++17", "-O2", "-fPIC", "-shared", "-s"],
            *["-fvisibility=hidden", "-fno-gnu-unique"],
            "-DPy_LIMITED_API=0x03090000",
            "-DTORCH_TARGET_VERSION=0x%02x%02x000000000000" % abi,
            f"-DTORCH_EXTENSION_NAME={name}",
            *(f"-I{path}" for path in includes),
            str(ROOT / "torch-ext" / "torch_binding.cpp"),
            # Named as needed but without an rpath: importing torch has loaded it by then.
            *(f"-L{path}" for path in library_paths()),
            "-ltorch_cpu",
            *["-o", str(library)],
        ],
        check=True,
    )
    return library


def write_metadata(variant: Path, general: dict, name: str, backend: str):
    """metadata.json, with the digest of all other files and where they came from."""
    digest = Digest.hash_variant(DigestAlgorithm.SHA256, variant)
    provenance = {"kernel-builder": {"version": "tools/build.py"}}
    try:
        dirty = bool(git("status", "--porcelain", "--untracked-files=no"))
        provenance["kernel"] = {"commit": git("rev-parse", "HEAD"), "dirty": dirty}
    except (OSError, subprocess.CalledProcessError):
        pass  # not a checkout, or no commit yet: unknown, and left out
    metadata = {
        "name": general["name"],
        "id": name,
        "version": general["version"],
        "license": general["license"],
        "python-depends": [],
        "backend": {"type": backend},
        "digest": {"algorithm": "sha256", "files": digest.files},
        "provenance": provenance,
    }
    path = variant / "metadata.json"
    path.write_text(json.dumps(metadata, indent=2, sort_keys=True) + "\n")
    Metadata.read_from_file(path)  # raises if the Hub could not read it


def assemble(variant: Path, library: Path, general: dict, name: str, backend: str):
    """One build variant: the package, its extension, _ops.py, metadata.json."""
    shutil.rmtree(variant, ignore_errors=True)
    package = ROOT / "torch-ext" / general["name"].replace("-", "_")
    for path in source_files():
        if path.is_relative_to(package):
            target = variant / path.relative_to(package)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)
    shutil.copyfile(library, variant / library.name)
    (variant / "_ops.py").write_text(OPS_PY.format(id=name))
    write_metadata(variant, general, name, backend)


def is_current(variant: Path, name: str) -> bool:
    """Whether the variant was built from these very sources."""
    path = variant / "metadata.json"
    return path.exists() and json.loads(path.read_text())["id"] == name


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build")
    parser.add_argument("--backends", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--force", action="store_true", help="rebuild what is up to date")
    args = parser.parse_args()

    Build.open(ROOT)  # raises if kernel-builder could not read build.toml
    toml = tomllib.loads((ROOT / "build.toml").read_text())
    general = toml["general"]
    for backend in args.backends:
        name = f"_{general['name'].replace('-', '_')}_{backend}_{source_hash()}"
        abi = tuple(map(int, toml["torch"]["stable-abi"][backend].split(".")))
        variants = [
            args.output / f"torch-stable-abi{abi[0]}{abi[1]}-{tag}-{platform.machine()}-linux"
            for tag in VARIANTS[backend]
        ]
        if not args.force and all(is_current(variant, name) for variant in variants):
            print(f"{backend}: {name} is up to date")
            continue
        with tempfile.TemporaryDirectory() as directory:
            library = compile_binding(name, abi, Path(directory))
            for variant in variants:
                assemble(variant, library, general, name, backend)
                print(f"built {variant}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

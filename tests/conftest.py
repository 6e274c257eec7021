"""The package is loaded as users load it: get_kernel, redirected to the local build."""

import os
from importlib import import_module
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
REPO = "org/flash-attention"
os.environ.setdefault("LOCAL_KERNELS", f"{REPO}={ROOT}")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HAS_GPU = torch.cuda.is_available()
if not HAS_GPU:  # before the kernels are imported: it decides what @triton.jit makes of them
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(config, items):
    skip = pytest.mark.skip(reason="needs a GPU")
    for item in items:
        if "gpu" in item.keywords and not HAS_GPU:
            item.add_marker(skip)


@pytest.fixture(scope="session")
def kernel():
    from kernels import get_kernel

    return get_kernel(REPO, version=1)


@pytest.fixture(scope="session")
def module(kernel):
    """module("problem") -> the package's submodule of that name."""
    return lambda name: import_module(f"{kernel.__name__}.{name}")


@pytest.fixture(scope="session")
def device():
    """Where the cases run: the GPU's kernels if there is one, else the CPU op."""
    return torch.device("cuda:0" if HAS_GPU else "cpu")


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def launch(module, device, monkeypatch):
    """The launcher, with `ran`: the names of the kernels that it has called."""
    if device.type != "cuda" or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("needs sm_90")
    launch = module("flash_attention_kernel.launch")
    call, ran = launch.call, set()

    def recorded(memo, name, *args):
        call(memo, name, *args)
        ran.add(name)

    monkeypatch.setattr(module("flash_attention_kernel.plans"), "memos", {})
    monkeypatch.setattr(module("remembered"), "known", {})
    monkeypatch.setattr(launch, "call", recorded)
    monkeypatch.setattr(launch, "ran", ran, raising=False)
    return launch

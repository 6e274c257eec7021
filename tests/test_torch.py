"""A good citizen of torch: opcheck, compile, export, autocast, streams, graphs, memory."""

import contextlib
import os
import subprocess
import sys
import time

import pytest
import torch
from cases import BY_NAME, cumulative, make
from checking import problem_of
from conftest import HAS_GPU

CHECKS = (
    "test_schema",
    "test_autograd_registration",
    "test_faketensor",
    "test_aot_dispatch_dynamic",
)


def fields_of(module, name, device, dtype=torch.float16):
    """The AttentionProblem of a case, and what its backward op takes before it."""
    case = BY_NAME[name]
    q, k, v, dout, _, options = make(case, dtype, device)
    problem = problem_of(module, case, q, k, v, options)
    out, lse = module("ops").fwd(*problem)
    wanted = [t is not None and t.is_floating_point() for t in problem.differentiable()]
    return problem, (dout, torch.randn_like(lse), out, lse, 1, wanted)


OPTIONS = ("bias-hqk", "alibi-varlen", "sink-varlen", "dropout-gqa", "used-leftpad", "window")


@pytest.mark.parametrize("name", ("causal", "varlen-gqa", "dim-192-128", *OPTIONS))
def test_opcheck(module, device, name):
    problem, backward_inputs = fields_of(module, name, device)
    lse, sizes = backward_inputs[3], (90, 140)
    ops = module("ops")
    torch.library.opcheck(ops.fwd, tuple(problem), test_utils=CHECKS)
    torch.library.opcheck(ops.bwd, (*backward_inputs, *problem), test_utils=CHECKS)
    torch.library.opcheck(ops.probs, (lse, *sizes, *problem), test_utils=CHECKS)


NAMES = ("causal", "varlen", "dim-192-128", "no-keys", "no-batch", *OPTIONS)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("heads_first", (False, True))
def test_fake_matches_real(module, device, name, heads_first):
    """Shape, dtype, stride and device of every output, for any layout of q."""
    from torch._subclasses import FakeTensorMode

    problem, backward_inputs = fields_of(module, name, device)
    if heads_first and problem.q.dim() == 4:
        q = problem.q.transpose(1, 2).contiguous().transpose(1, 2)
        problem = problem._replace(q=q)
    ops = module("ops")

    def results(problem, backward_inputs):
        yield from ops.fwd(*problem)
        yield ops.probs(backward_inputs[3], 9, 9, *problem)
        for pack in (1, 2, 3) if problem.q.shape == problem.k.shape == problem.v.shape else (1,):
            yield from ops.bwd(*backward_inputs[:4], pack, backward_inputs[5], *problem)

    real = list(results(problem, backward_inputs))
    mode = FakeTensorMode()

    def fake(values):
        return [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in values]

    with mode:
        pretended = list(results(type(problem)(*fake(problem)), fake(backward_inputs)))
    for a, b in zip(real, pretended, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


def test_meta_tensors(kernel):
    """Shapes without data, as model builders ask for."""
    q = torch.empty(2, 8, 4, 16, device="meta", requires_grad=True)
    v = torch.empty(2, 8, 2, 24, device="meta")
    out = kernel.flash_attn_func(q, q[:, :, :2], v, causal=True)
    assert out.shape == (2, 8, 4, 24) and out.is_meta
    out.sum().backward()
    assert q.grad.shape == q.shape


def test_schema_names_the_problem(module):
    """The schemas' arguments are the problem's fields, in order."""
    fields = list(module("problem").AttentionProblem._fields)
    ops = module("ops")
    assert [a.name for a in ops.fwd._schema.arguments] == fields
    before = ["dout", "dlse", "out", "lse", "pack", "wanted"]
    assert [a.name for a in ops.bwd._schema.arguments] == [*before, *fields]
    before = ["lse", "rows", "cols"]
    assert [a.name for a in ops.probs._schema.arguments] == [*before, *fields]
    assert len({*before, *fields}) == len(before) + len(fields)  # opcheck of torch 2.11 minds


@contextlib.contextmanager
def counted_compiles():
    """Count the graphs that Dynamo captures."""
    from torch._dynamo.testing import CompileCounterWithBackend

    torch._dynamo.reset()
    yield CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()


def test_compile_dense(kernel, device):
    """fullgraph, forward and backward; a second length makes the graph dynamic, no more do."""
    with counted_compiles() as counter:

        @torch.compile(backend=counter, fullgraph=True)
        def step(q, k, v):
            return kernel.flash_attn_func(2 * q, k, v, causal=True)

        for seqlen in (20, 33, 47, 64, 129):
            q, k, v = (torch.randn(2, seqlen, 2, 32, device=device).requires_grad_() for _ in "qkv")
            out = step(q, k, v)
            got = torch.autograd.grad(out.sum(), (q, k, v))
            expected = kernel.flash_attn_func(2 * q, k, v, causal=True)
            want = torch.autograd.grad(expected.sum(), (q, k, v))
            for a, b in zip((out, *got), (expected, *want)):
                torch.testing.assert_close(a, b)
        assert counter.frame_count <= 2


def test_compile_varlen(kernel, device):
    with counted_compiles() as counter:

        @torch.compile(backend=counter, fullgraph=True)
        def step(q, k, v, cu, longest):
            return kernel.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)

        for lens in ((20, 13), (5, 40), (9, 70), (33, 33)):
            total = sum(lens)
            q, k, v = (torch.randn(total, 2, 32, device=device).requires_grad_() for _ in "qkv")
            cu = cumulative(lens, device)
            out = step(q, k, v, cu, max(lens))
            (got,) = torch.autograd.grad(out.sum(), q)
            expected = kernel.flash_attn_varlen_func(q, k, v, cu, cu, 1, 1, causal=True)
            (want,) = torch.autograd.grad(expected.sum(), q)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(got, want)
        assert counter.frame_count <= 2


def test_compile_one_tensor_thrice(kernel, device):
    """[20, 37] q is k is v inside a compiled function."""
    x = torch.randn(1, 12, 2, 16, device=device).requires_grad_()
    with counted_compiles() as counter:
        step = torch.compile(kernel.flash_attn_func, backend=counter, fullgraph=True)
        (got,) = torch.autograd.grad(step(x, x, x).sum(), x)
    (want,) = torch.autograd.grad(kernel.flash_attn_func(x, x, x).sum(), x)
    torch.testing.assert_close(got, want)


@pytest.mark.gpu
def test_compile_inductor(kernel, device):
    """Inductor, fused with what stands around it."""

    @torch.compile(fullgraph=True)
    def step(q, k, v):
        return kernel.flash_attn_func(q * 2, k, v, causal=True).relu()

    q, k, v = (torch.randn(2, 64, 2, 64, device=device).half().requires_grad_() for _ in "qkv")
    got = torch.autograd.grad(step(q, k, v).sum(), (q, k, v))
    want = torch.autograd.grad(
        kernel.flash_attn_func(q * 2, k, v, causal=True).relu().sum(), (q, k, v)
    )
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=1e-2, atol=1e-2)


def test_export(kernel, device):
    class Model(torch.nn.Module):
        def forward(self, q, k, v):
            return kernel.flash_attn_func(q, k, v, causal=True)

    q, k, v = (torch.randn(2, 24, 2, 16, device=device) for _ in "qkv")
    length = torch.export.Dim("length", min=2, max=4096)
    program = torch.export.export(
        Model(), (q, k, v), dynamic_shapes=({1: length}, {1: length}, {1: length})
    )
    longer = [torch.randn(2, 57, 2, 16, device=device) for _ in "qkv"]
    torch.testing.assert_close(program.module()(*longer), Model()(*longer))


def test_functorch_grad(kernel, device):
    q, k, v = (torch.randn(1, 12, 2, 16, device=device) for _ in "qkv")
    got = torch.func.grad(lambda x: kernel.flash_attn_func(x, k, v).sum())(q)
    q.requires_grad_()
    (want,) = torch.autograd.grad(kernel.flash_attn_func(q, k, v).sum(), q)
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16))
def test_autocast(kernel, device, dtype):
    """[30] float32 inputs are cast, and their gradients come back as float32."""
    q, k, v = (torch.randn(1, 20, 2, 16, device=device).requires_grad_() for _ in "qkv")
    with torch.autocast(device.type, dtype):
        out = kernel.flash_attn_func(q, k, v)
    assert out.dtype == dtype
    torch.testing.assert_close(out, kernel.flash_attn_func(q.to(dtype), k.to(dtype), v.to(dtype)))
    out.sum().backward()
    assert q.grad.dtype == torch.float32


@pytest.mark.gpu
def test_memory(kernel, device):
    """At 16k tokens: forward holds out and lse, backward dq, dk, dv and delta besides dout; the one
    for sm_90 a float32 dQ and each row's stats."""
    shape = (1, 16384, 16, 128)
    q, k, v, dout = (torch.randn(shape, device=device, dtype=torch.bfloat16) for _ in range(4))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    tensor, row = q.numel() * 2, 16384 * 16 * 4

    def peak(fn):
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        result = fn()
        return torch.cuda.max_memory_allocated() - before, result

    kernel.flash_attn_func(q, k, v)
    forward, out = peak(lambda: kernel.flash_attn_func(q, k, v))
    assert forward <= tensor + row + 4096
    on_hopper = torch.cuda.get_device_capability() == (9, 0)
    for deterministic in (False, True):
        out = kernel.flash_attn_func(q, k, v, deterministic=deterministic)
        backward, _ = peak(lambda out=out: torch.autograd.grad(out, (q, k, v), dout))
        assert backward <= (5 * tensor + 3 * row if on_hopper else 3 * tensor + row) + 4096


@pytest.mark.gpu
def test_side_stream(kernel, device):
    """[38] Work goes to the current stream."""
    q, k, v = (torch.randn(2, 512, 4, 64, device=device).half() for _ in "qkv")
    want = kernel.flash_attn_func(q, k, v)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        late = torch.zeros_like(q)
        torch.cuda._sleep(20_000_000)
        late += q
        out = kernel.flash_attn_func(late, k, v)
    stream.synchronize()
    assert torch.equal(out, want)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_other_device(kernel):
    """[38] Tensors of cuda:1 while cuda:0 is current, the autograd thread included."""
    q, k, v = (torch.randn(2, 64, 2, 64, device="cuda:1").half().requires_grad_() for _ in "qkv")
    with torch.cuda.device(0):
        out = kernel.flash_attn_func(q, k, v)
        out.sum().backward()
    assert out.device == q.grad.device == q.device


GRAPH = """
import os, torch
from kernels import get_kernel
kernel = get_kernel("org/flash-attention", version=1)
q, k, v = (torch.randn(2, 100, 2, 64, device="cuda").half() for _ in range(3))
kernel.flash_attn_func(q, k, v, causal=True)
torch.cuda.synchronize()
graph = torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    out = kernel.flash_attn_func(q, k, v, causal=True)
q.copy_(torch.randn_like(q))
graph.replay()
assert torch.equal(out, kernel.flash_attn_func(q, k, v, causal=True))
"""


def in_new_process(code, **environment):
    env = {**os.environ, **environment}
    return subprocess.Popen(
        [sys.executable, "-c", code], env=env, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.gpu
def test_cuda_graph_in_a_cold_process(tmp_path):
    """[39] One warm-up call, then capture: no tuning, no synchronisation inside."""
    process = in_new_process(GRAPH, TRITON_CACHE_DIR=str(tmp_path))
    assert process.wait() == 0, process.stderr.read()


@pytest.mark.gpu
def test_cold_start(tmp_path):
    """First result of a new process with a cold Triton cache within 6 s (of a quiet machine)."""
    code = GRAPH.split("graph =")[0] + "import time; print('done', time.time())"
    start = time.time()
    command = [sys.executable, "-c", code]
    env = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    elapsed = float(done.stdout.split("done")[1]) - start
    print(f"cold start: {elapsed:.2f} s")
    if "PYTEST_XDIST_WORKER" not in os.environ:  # other workers keep the cores busy
        assert elapsed <= 6.0


@pytest.mark.gpu
def test_eight_cold_processes(tmp_path):
    """[42] One Triton cache, eight processes that all find it empty."""
    processes = [in_new_process(GRAPH, TRITON_CACHE_DIR=str(tmp_path)) for _ in range(8)]
    for process in processes:
        assert process.wait() == 0, process.stderr.read()


def test_observers_see_the_op(module, kernel, device):
    """Dispatch modes and profilers, for which the short way past the dispatcher is closed."""
    from torch.utils._python_dispatch import TorchDispatchMode

    q = torch.randn(1, 9, 2, 16, device=device)
    seen = []

    class Log(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            seen.append(func)
            return func(*args, **(kwargs or {}))

    with Log():
        kernel.flash_attn_func(q, q, q)
    assert module("ops").fwd in seen
    with torch.profiler.profile() as profile:
        kernel.flash_attn_func(q, q, q)
    assert any(event.key == f"{kernel.__name__}::fwd" for event in profile.key_averages())


@pytest.mark.parametrize("shape", ((1, 16384, 1, 16), (800, 256, 8, 8)))
def test_cpu_memory_is_linear(shape):
    """Scores would take 1 GiB and 1.6 GiB; the CPU op, backward included, stays under 0.6 GiB."""
    code = f"""
import resource, torch
from kernels import get_kernel
kernel = get_kernel("org/flash-attention", version=1)
q = torch.randn({shape}, requires_grad=True)
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
before = peak()
kernel.flash_attn_func(q, q, q, causal=True).sum().backward()
print(peak() - before)
assert peak() - before < 0.6
"""
    process = in_new_process(code)
    assert process.wait() == 0, process.stderr.read()


def test_loads_without_triton():
    """The package imports, and its CPU op runs, where Triton is not installed."""
    code = """
import sys
sys.modules["triton"] = None
import torch
from kernels import get_kernel
kernel = get_kernel("org/flash-attention", version=1, backend="cpu")
q = torch.randn(1, 5, 1, 8)
assert kernel.flash_attn_func(q, q, q).shape == q.shape
"""
    if HAS_GPU:
        pytest.skip("torch itself imports Triton here")
    process = in_new_process(code)
    assert process.wait() == 0, process.stderr.read()

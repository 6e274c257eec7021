"""The Gluon kernels for sm_90: that they run where they should, and what takes their place."""

import logging

import pytest
import torch
from cases import BY_NAME, CASES, Case, make
from checking import NAMES, call, check, run
from reference import attention_with_grads

SERVED = [
    case
    for case in CASES
    if case.dropout_p == 0.0
    and case.bias is None
    and case.head_dim % 8 == 0
    and case.head_dim <= 256
    and (case.head_dim_v or 8) % 8 == 0
]


@pytest.mark.gpu
@pytest.mark.parametrize("case", SERVED, ids=[case.name for case in SERVED])
def test_served_cases(kernel, launch, device, case):
    """test_attention.py's cases take this path: but for few queries, and nothing."""
    q, k, v, _, _, options = make(case, torch.float16, device)
    out, _, _ = call(kernel, q, k, v, options)
    assert launch.ran & {"hopper", "decode"} or q.numel() == 0 or k.numel() == 0
    assert out.shape == (*q.shape[:-1], v.shape[-1])


@pytest.mark.gpu
@pytest.mark.parametrize("case", SERVED, ids=[case.name for case in SERVED])
def test_served_gradients(kernel, launch, device, case):
    """test_attention.py's cases take this path back: but for some head_dims, the gradient of
    ALiBi's slopes, and nothing."""
    inputs = q, k, _, _, _, _ = make(case, torch.bfloat16, device)
    run(kernel, *inputs)
    one_dim = case.head_dim_v in (None, case.head_dim)
    wide = max(case.head_dim, case.head_dim_v or 0) > 128
    there = (one_dim or wide) and not case.alibi
    wanted = there and q.numel() > 0 and k.numel() > 0
    assert ("hopper_backward" in launch.ran) == wanted


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("dropout", "bias", "dim-59-causal"))
def test_portable_cases(kernel, launch, device, name):
    inputs = make(BY_NAME[name], torch.float16, device)
    run(kernel, *inputs)
    assert {"dq", "dkdv"} <= launch.ran <= {"forward", "decode", "dq", "dkdv"}


@pytest.mark.gpu
@pytest.mark.parametrize("causal", (False, True))
@pytest.mark.parametrize("head_dim", (64, 96, 128))
def test_fixed_slopes(kernel, launch, device, monkeypatch, head_dim, causal):
    """ALiBi, whose slopes seldom want a gradient, with softcap; beside the portable kernels."""
    shape = (2, 450, 4, head_dim)
    leaves = [
        torch.randn(shape, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in "qkv"
    ]
    options = {"alibi_slopes": torch.rand(4, device=device), "softcap": 20.0, "causal": causal}
    grads = []
    takes = launch._takes_hopper_backward
    for hopper in (False, True):
        monkeypatch.setattr(
            launch, "_takes_hopper_backward", lambda *args, yes=hopper: yes and takes(*args)
        )
        out = kernel.flash_attn_func(*leaves, **options)
        grads.append(torch.autograd.grad(out.square().sum(), leaves))
        assert ("hopper_backward" in launch.ran) == hopper
    for got, want in zip(grads[1], grads[0]):
        assert (got - want).float().norm() < 5e-3 * want.float().norm()


LONG = [
    Case("long", 1000, 1100, batch=3, nheads=3, nheads_k=3, head_dim=128),
    Case("long-full-tiles", 512, 512, nheads=4, nheads_k=4, head_dim=128),
    Case("long-full-tiles-64", 768, 1024, nheads=4, nheads_k=4, head_dim=64),
    Case("long-causal", 1500, 1500, nheads=4, nheads_k=1, head_dim=128, causal=True),
    Case("long-group", 700, 700, batch=2, nheads=24, nheads_k=4, head_dim=128, causal=True),
    Case("long-group-64", 700, 600, batch=2, nheads=24, nheads_k=4, head_dim=64),
    Case("long-64", 1500, 1300, nheads=4, nheads_k=2, head_dim=64),
    Case("long-64-causal", 1300, 1500, nheads=4, nheads_k=2, head_dim=64, causal=True),
    Case("long-64-window", 1500, 1500, nheads=4, nheads_k=4, head_dim=64, window=(200, 70)),
    Case("long-window", 1000, 1300, batch=2, nheads=4, nheads_k=2, head_dim=128, window=(300, 40)),
    Case("long-window-causal", 900, 500, nheads=4, nheads_k=4, head_dim=64, window=(130, 0)),
    Case("long-96", 700, 900, nheads=4, nheads_k=2, head_dim=96, causal=True),
    Case(
        "long-varlen", nheads=8, nheads_k=2, head_dim=128, causal=True,
        lens_q=(700, 1, 130, 0, 1100, 64), lens_k=(700, 90, 130, 5, 1100, 300),
    ),
]  # fmt: skip


LONG_BY_NAME = {case.name: case for case in LONG}


WIDE = [
    Case("wide-192-128", 900, 1100, nheads=4, nheads_k=2, head_dim=192, head_dim_v=128),
    Case("wide-192-128-causal", 700, 700, 2, 4, 4, 192, 128, causal=True),
    Case("wide-160-96", 300, 700, nheads=4, nheads_k=4, head_dim=160, head_dim_v=96, causal=True),
    Case("wide-192", 600, 700, nheads=4, nheads_k=1, head_dim=192, window=(300, 0)),
    Case("wide-256", 600, 700, nheads=4, nheads_k=2, head_dim=256, causal=True),
    Case("wide-256-softcap", 600, 600, nheads=4, nheads_k=2, head_dim=256, softcap=15.0),
    Case("wide-128-256", 600, 700, nheads=4, nheads_k=2, head_dim=128, head_dim_v=256),
    Case(
        "wide-varlen", nheads=8, nheads_k=2, head_dim=192, head_dim_v=128, causal=True,
        lens_q=(700, 1, 130, 0, 600, 64), lens_k=(700, 90, 130, 5, 900, 300),
    ),
]  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
@pytest.mark.parametrize("case", WIDE, ids=[case.name for case in WIDE])
def test_wide_heads(kernel, launch, device, case, dtype):
    """Several tiles and blocks of keys of head_dims above 128. Forward: Q and K in two parts. dK
    and dV are the same every time."""
    inputs = make(case, dtype, device)
    first = run(kernel, *inputs)
    check(first, *inputs, kernel=kernel)
    sums = {"sum_dk", "sum_dv"} if case.nheads > case.nheads_k else set()
    names = {"hopper", "prepare_hopper_backward", "hopper_backward", "finish"}
    assert launch.ran == names | sums
    for got, want in zip(run(kernel, *inputs)[3:5], first[3:5]):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("case", WIDE[-3:], ids=[case.name for case in WIDE[-3:]])
def test_deterministic_wide_heads(kernel, launch, device, case):
    """dQ of wide heads in the same order every time is the portable kernel's."""
    *inputs, plain = make(case, torch.bfloat16, device)
    options = {**plain, "deterministic": True}
    first = run(kernel, *inputs, options)
    check(first, *inputs, plain, kernel=kernel)
    assert launch.ran == {"hopper", "dq", "dkdv"}
    for got, want in zip(run(kernel, *inputs, options), first):
        assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG, ids=[case.name for case in LONG])
def test_many_tiles(kernel, launch, device, case):
    """Several tiles for each program, which draws them; the counters are zero again after."""
    inputs = make(case, torch.bfloat16, device)
    first = run(kernel, *inputs)
    check(first, *inputs, kernel=kernel)
    assert "hopper" in launch.ran
    assert "hopper_backward" in launch.ran
    for _ in range(3):
        again = run(kernel, *inputs)
        assert torch.equal(again[0], first[0])
        for got, want in zip(again[3:5], first[3:5]):  # dK and dV; dQ is summed in any order
            assert torch.equal(got, want)
    torch.cuda.synchronize()
    assert all(not counters.any() for counters in launch._counters_of_stream.values())


@pytest.mark.parametrize("causal, lengths", ((False, (639, 640)), (True, (3071, 3072))))
def test_tiles_by_length(module, causal, lengths):
    """D 64 takes tiles of 192 rows for long sequences, packed ones by their mean."""
    hopper_calls = module("flash_attention_kernel.hopper_calls")
    make_problem, Options = module("problem").AttentionProblem, module("options").Options
    options = Options(causal=causal)
    for length, rows in zip(lengths, (128, 192)):
        dense = [torch.empty(2, length, 4, 64, dtype=torch.half, device="meta") for _ in "qkv"]
        packed = [t.flatten(0, 1) for t in dense]
        ends = torch.empty(3, dtype=torch.int32, device="meta")
        for problem in (
            make_problem.dense(*dense, options),
            make_problem.varlen(*packed, ends, ends, 2 * length, 2 * length, options),
        ):
            assert hopper_calls.forward_tile(problem).block_m == rows


@pytest.mark.gpu
@pytest.mark.parametrize(
    "name",
    ("long-64", "long-64-causal", "long-64-window", "long-window-causal", "long-group-64"),
)
def test_three_consumers(kernel, launch, module, device, monkeypatch, name):
    """Tiles of 192 rows, which the table has for longer sequences."""
    tile = module("flash_attention_kernel.config").HopperConfig(192, 128, 4, 2)
    monkeypatch.setattr(launch._hopper_calls(), "forward_tile", lambda problem: tile)
    inputs = make(LONG_BY_NAME[name], torch.bfloat16, device)
    check(run(kernel, *inputs), *inputs)
    assert "hopper" in launch.ran


@pytest.mark.gpu
@pytest.mark.parametrize("case", LONG, ids=[case.name for case in LONG])
def test_deterministic(kernel, launch, device, case):
    """dQ, too, in the same order every time, and right."""
    *inputs, plain = make(case, torch.bfloat16, device)
    options = {**plain, "deterministic": True}
    first = run(kernel, *inputs, options)
    check(first, *inputs, plain, kernel=kernel)
    assert "hopper_ordered" in launch.ran and "hopper_backward" not in launch.ran
    for _ in range(5):
        for got, want in zip(run(kernel, *inputs, options), first):
            assert torch.equal(got, want)


@pytest.mark.gpu
@pytest.mark.parametrize("deterministic", (False, True))
@pytest.mark.parametrize("name", ("long-causal", "long-window-causal", "long-group", "long-varlen"))
def test_first_sums_are_stored(kernel, launch, device, monkeypatch, name, deterministic):
    """Nothing that was in dQ's sums before is read, not of queries without keys either."""
    hopper_calls = launch._hopper_calls()
    workspace = hopper_calls.workspace

    def poisoned(problem, plan):
        stats, sums, turns = workspace(problem, plan)
        return stats, sums.fill_(float("nan")), turns

    monkeypatch.setattr(hopper_calls, "workspace", poisoned)
    *inputs, plain = make(LONG_BY_NAME[name], torch.bfloat16, device)
    check(run(kernel, *inputs, {**plain, "deterministic": deterministic}), *inputs, plain)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("long-causal", "long-group", "long-group-64", "long-varlen"))
def test_parts_of_a_group(kernel, launch, module, device, monkeypatch, name):
    """The query heads of a KV head together or in parts: the same dK and dV, but for rounding."""
    inputs = make(LONG_BY_NAME[name], torch.bfloat16, device)
    grads = []
    for parts in (1, 2):
        monkeypatch.setattr(module("flash_attention_kernel.plans"), "memos", {})
        monkeypatch.setattr(launch._hopper_calls(), "parts_of_group", lambda *_, n=parts: n)
        launch.ran.clear()
        grads.append(run(kernel, *inputs)[3:5])
        assert ({"sum_dk", "sum_dv"} <= launch.ran) == (parts > 1)
    for one, two in zip(*grads):
        assert (one - two).float().norm() < 1e-2 * one.float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ("long-full-tiles", "long-group", "long-causal"))
def test_remembered(kernel, launch, device, name):
    """What is known of a call from the last one like it, gradients and all."""
    for seed in range(3):
        q, k, v, dout, _, options = make(LONG_BY_NAME[name], torch.bfloat16, device, seed)
        want = run(kernel, q, k, v, dout, None, options)
        leaves = [t.requires_grad_() for t in (q, k, v)]
        out = kernel.flash_attn_func(*leaves, **options)
        dq, dk, dv = torch.autograd.grad(out, leaves, dout)
        assert torch.equal(out, want[0])
        assert torch.equal(dk, want[3]) and torch.equal(dv, want[4])
        assert (dq - want[2]).float().norm() < 1e-2 * want[2].float().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
@pytest.mark.parametrize("case", LONG, ids=[case.name for case in LONG])
def test_as_exact_as_portable(kernel, launch, module, device, monkeypatch, case, dtype):
    """The error against float64, root of the mean square, at most 1.05 times the portable one; of
    dQ 1.3 times: its dS is computed from P in half precision, as dK's is there, too."""
    inputs = make(case, dtype, device)
    results = [run(kernel, *inputs)]
    assert {"hopper", "hopper_backward"} <= launch.ran
    monkeypatch.setattr(module("flash_attention_kernel.plans"), "memos", {})
    monkeypatch.setattr(launch, "_takes_hopper", lambda *args: False)
    monkeypatch.setattr(launch, "_takes_hopper_backward", lambda *args: False)
    results.append(run(kernel, *inputs))
    *tensors, options = inputs
    exact = attention_with_grads(*tensors, **options)
    for name, ours, portable, want in zip(NAMES, *results, exact):
        rows = want.isfinite()
        error, allowed = ((got[rows] - want[rows]).double().norm() for got in (ours, portable))
        factor = 1.3 if name == "dq" else 1.05
        assert error <= factor * allowed + 1e-5 * want[rows].double().norm(), name


@pytest.mark.gpu
def test_strided(kernel, launch, device):
    """Packed QKV and heads-first tensors are read where they lie; what TMA cannot read is not."""
    qkv = torch.randn(2, 300, 3, 4, 64, device=device, dtype=torch.bfloat16)
    q, k, v = qkv.unbind(2)
    want = kernel.flash_attn_func(*(t.contiguous() for t in (q, k, v)), causal=True)
    assert torch.equal(kernel.flash_attn_func(q, k, v, causal=True), want)
    heads_first = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    assert torch.equal(kernel.flash_attn_func(*heads_first, causal=True), want)
    assert launch.ran == {"hopper"}
    room = torch.empty(2, 300, 4, 65, device=device, dtype=torch.bfloat16)[..., 1:]
    torch.testing.assert_close(
        kernel.flash_attn_func(room.copy_(q), k, v, causal=True), want, rtol=0, atol=2e-2
    )
    assert "forward" in launch.ran


RAMPS = {  # what is added to the scores of each key, of which the last are read first
    "rising": lambda keys: 80.0 - keys / 10,
    "steep": lambda keys: 30.0 * (6 - keys // 128),
    "falling": lambda keys: keys / 10,
    "low": lambda keys: torch.full_like(keys, -900.0),
    "jump": lambda keys: torch.where(keys == 133, 200.0, 0.0),
}


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", (torch.float16, torch.bfloat16), ids=("fp16", "bf16"))
@pytest.mark.parametrize("head_dim", (64, 128, 192))
@pytest.mark.parametrize("ramp", RAMPS)
def test_maxima(kernel, launch, device, ramp, head_dim, dtype):
    """Rows whose maximum rises a little or much from block to block, or never, or lies in one key;
    in every other row all scores are small, so that a warp has both kinds; full and causal."""
    q, k, v, dout = torch.randn(4, 1, 770, 2, head_dim, device=device)
    keys = torch.arange(770.0, device=device)
    q[..., 0] = torch.where(keys % 2 == 0, head_dim**0.5, 0.0)[:, None]
    k[..., 0] = RAMPS[ramp](keys)[:, None]
    inputs = [t.to(dtype) for t in (q, k, v, dout)]
    for options in (
        {},
        {"causal": True},
        {"s_aux": torch.tensor([20.0, -20.0], device=device, dtype=dtype)},
    ):
        results = run(kernel, *inputs, None, options)
        assert "hopper" in launch.ran
        check(results, *inputs, None, options)


@pytest.mark.gpu
@pytest.mark.parametrize("head_dim", (64, 128, 256))
def test_rows_alone(kernel, launch, device, head_dim):
    """A row's result does not depend on the others of its tile, by a bit."""
    q, k, v = torch.randn(3, 2, 700, 3, head_dim, device=device, dtype=torch.bfloat16)
    other = q.clone()
    other[:, ::3] *= 30
    outs = [kernel.flash_attn_func(t, k, v, causal=True) for t in (q, other)]
    assert launch.ran == {"hopper"}
    for first in (1, 2):
        assert torch.equal(outs[0][:, first::3], outs[1][:, first::3])
    assert not torch.equal(*outs)


@pytest.mark.gpu
@pytest.mark.parametrize("page", (128, 256))
@pytest.mark.parametrize("head_dim", (64, 128, 192, 256))
def test_cache(kernel, launch, device, head_dim, page):
    """Pages of whole tiles and entries of a cache give what the rows themselves give, bit by bit;
    what is in no sequence is NaN."""
    torch.manual_seed(0)
    q = torch.randn(2, 300, 8, head_dim, device=device, dtype=torch.bfloat16)
    rows = torch.randn(2, 2, 4 * 256, 2, head_dim, device=device, dtype=torch.bfloat16)
    lengths = torch.tensor([1000, 517], device=device, dtype=torch.int32)
    rows[:, 1, 517:] = rows[:, 0, 1000:] = float("nan")
    options = {"cache_seqlens": lengths, "causal": True, "window_size": (400, 0)}
    want = kernel.flash_attn_with_kvcache(q, *rows, **options)
    number = rows.shape[2] // page
    table = torch.randperm(2 * number + 3, device=device)[: 2 * number].view(2, number).int()
    pages = torch.full((2, 2 * number + 3, page, *rows.shape[3:]), float("nan")).to(rows)
    pages[:, table.long()] = rows.unflatten(2, (number, page))
    table[1, -1] = -1  # not used
    got = kernel.flash_attn_with_kvcache(q, *pages, **options, block_table=table)
    assert torch.equal(got, want)
    caches = torch.full((2, 5, *rows.shape[2:]), float("nan")).to(rows)
    where = torch.tensor([3, 0], device=device, dtype=torch.int32)
    caches[:, where.long()] = rows
    got = kernel.flash_attn_with_kvcache(q, *caches, **options, cache_batch_idx=where)
    assert torch.equal(got, want)
    assert launch.ran == {"hopper"}
    small = kernel.flash_attn_with_kvcache(
        q, *pages.view(2, -1, 64, *rows.shape[3:]), **options,
        block_table=(table[..., None] * (page // 64) + torch.arange(page // 64, device=device))
        .flatten(1).int(),
    )  # fmt: skip
    torch.testing.assert_close(small, want, rtol=0, atol=2e-2)


@pytest.mark.gpu
def test_cuda_graph(kernel, launch, device):
    """A graph has counters of its own, and may be replayed beside other calls."""
    q = torch.randn(2, 500, 4, 128, device=device, dtype=torch.bfloat16)
    want = kernel.flash_attn_func(q, q, q, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.flash_attn_func(q, q, q, causal=True)
    for _ in range(3):
        out.zero_()
        graph.replay()
        assert torch.equal(out, want)
        assert torch.equal(kernel.flash_attn_func(q, q, q, causal=True), want)


@pytest.mark.gpu
def test_cuda_graph_of_backward(kernel, launch, device):
    """The kernels of a backward, of which each begins under the one before, captured and replayed
    beside other calls."""
    q, k, v, dout = torch.randn(4, 4, 1000, 8, 128, device=device, dtype=torch.bfloat16)
    inputs = tuple(t.requires_grad_() for t in (q, k, v))

    def grads():
        out = kernel.flash_attn_func(*inputs, causal=True, deterministic=True)
        return torch.autograd.grad(out, inputs, dout)

    want, graph = grads(), torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        got = grads()
    for _ in range(3):
        for grad in got:
            grad.zero_()
        graph.replay()
        for others in (got, grads()):
            assert all(map(torch.equal, others, want))
    assert "finish" in launch.ran


@pytest.mark.gpu
def test_falls_back(kernel, launch, device, monkeypatch, caplog):
    """Where the kernel does not compile the portable one serves, and one warning says so."""
    calls = launch._hopper_calls()
    monkeypatch.setattr(launch, "_warned", set())

    def broken(*args):
        raise RuntimeError("PassManager::run failed")

    monkeypatch.setattr(calls, "forward_launch", broken)
    monkeypatch.setattr(calls, "backward_launch", broken)
    q = torch.randn(2, 300, 4, 64, device=device, dtype=torch.bfloat16, requires_grad=True)
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = kernel.flash_attn_func(q, q, q)
            (grad,) = torch.autograd.grad(out.sum(), q)
    assert out.isfinite().all() and grad.isfinite().all()
    assert not launch.ran & {"hopper", "hopper_backward"}
    assert len([r for r in caplog.records if "Hopper" in r.message]) == 1

"""Plans: the second of two calls alike passes the kernels what the first did. Without a GPU."""

from types import SimpleNamespace

import pytest
import torch
from cache_cases import CacheCase, make_cache
from cases import BY_NAME, make
from checking import problem_of
from conftest import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="there, every test makes its calls by plans")
KERNELS = {
    "calls": ("forward_kernel", "dq_kernel", "dkdv_kernel"),
    "cache_calls": ("decode_kernel", "combine_kernel", "append_kernel"),
}


def shown(argument):
    """An argument as it can be compared: of a tensor, which is a pointer, its type and size."""
    if isinstance(argument, torch.Tensor):
        return argument.numel(), argument.dtype
    if hasattr(argument, "base"):  # a tensor descriptor, or what stands for one
        return tuple(sorted((name, str(shown(value))) for name, value in vars(argument).items()))
    return tuple(map(shown, argument)) if isinstance(argument, tuple) else argument


class Recorder:
    """In the place of a kernel, and of what its first call compiles."""

    function, packed_metadata = None, ()

    def __init__(self):
        self.calls = []

    def __getitem__(self, grid):
        def first(*args, **options):
            constexprs = tuple(value for name, value in options.items() if name.isupper())
            self.calls.append((grid, shown((*args, *constexprs))))
            return self

        return first

    def run(self, programs, y, z, stream, function, metadata, *args):
        assert (y, z, args[:3]) == (1, 1, (None, None, None))
        self.calls.append(((programs,), shown(args[3:])))


class Driver:
    def get_current_stream(self, device):
        return 0

    def get_current_target(self):
        from triton.backends.compiler import GPUTarget

        return GPUTarget("cuda", 90, 32)


@pytest.fixture
def recorders(module, monkeypatch):
    from triton.runtime.driver import driver

    found = {}
    for file, names in KERNELS.items():
        for name in names:
            found[name] = Recorder()
            kernels = module(f"flash_attention_kernel.{file}")
            monkeypatch.setattr(kernels, name, found[name])
    monkeypatch.setattr(module("flash_attention_kernel.plans"), "memos", {})
    monkeypatch.setattr(driver, "_active", Driver())
    return found


def hold(recorders, *names):
    """The kernels of these names were called twice, alike; the others never."""
    for name, recorder in recorders.items():
        assert len(recorder.calls) == (2 if name in names else 0), name
        if name in names:
            assert recorder.calls[0] == recorder.calls[1], name


@pytest.mark.parametrize("name", ("causal", "varlen-gqa", "alibi-varlen", "bias-hqk", "window"))
def test_forward_and_backward(module, recorders, name):
    launch = module("flash_attention_kernel.launch")
    for seed in range(2):
        q, k, v, dout, _, options = make(BY_NAME[name], torch.float16, "cpu", seed)
        problem = problem_of(module, BY_NAME[name], q, k, v, options)
        out, lse = launch.forward(problem)
        launch.backward(problem, dout, None, out, lse)
    hold(recorders, "forward_kernel", "dq_kernel", "dkdv_kernel")


@pytest.mark.parametrize(
    "head_dim, backward", ((128, "hopper_backward"), (192, "hopper_wide_backward"))
)
@pytest.mark.parametrize("name", ("causal", "varlen-gqa", "sink", "window", "used-causal"))
def test_hopper(module, recorders, monkeypatch, name, head_dim, backward):
    """Descriptors, too."""
    launch = module("flash_attention_kernel.launch")
    monkeypatch.setattr(launch, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(launch, "_captured", lambda device: True)  # new counters
    kernels = module("flash_attention_kernel.hopper_calls")
    names = ("hopper_forward", "prepare", backward, "finish")
    for which in names:
        recorders[which] = Recorder()
        monkeypatch.setattr(kernels, f"{which}_kernel", recorders[which])
    sums = Recorder()
    monkeypatch.setattr(kernels, "sum_parts_kernel", sums)
    case = BY_NAME[name]._replace(head_dim=head_dim, head_dim_v=128)
    for seed in range(2):
        q, k, v, dout, _, options = make(case, torch.float16, "cpu", seed)
        problem = problem_of(module, case, q, k, v, options)
        out, lse = launch.forward(problem)
        launch.backward(problem, dout, None, out, lse)
    hold(recorders, *names)
    assert len(sums.calls) == (4 if case.nheads > case.nheads_k else 0)  # dK, dV
    assert sums.calls[:2] == sums.calls[2:]


@pytest.mark.parametrize(
    "head_dim, head_dim_v, ordered, wanted",
    (
        (128, 128, True, True), (64, 32, False, False), (192, 128, False, True),
        (256, 256, False, True), (256, 256, True, False), (264, 264, False, False),
    ),
)  # fmt: skip
def test_hopper_serves(module, head_dim, head_dim_v, ordered, wanted):
    """Which gradients the kernels for sm_90 take: of wide heads those in any order."""
    hopper_calls = module("flash_attention_kernel.hopper_calls")
    case = BY_NAME["causal"]._replace(head_dim=head_dim, head_dim_v=head_dim_v)
    q, k, v, dout, _, options = make(case, torch.float16, "cpu")
    problem = problem_of(module, case, q, k, v, options)
    served = hopper_calls.serves(problem) and hopper_calls.serves_backward(problem, dout, ordered)
    assert served == wanted
    if wanted:
        for parts, tensor in zip(hopper_calls.partial_grads(problem, 2), (k, v)):
            assert parts.shape == (*tensor.shape[:-2], 2 * tensor.shape[-2], tensor.shape[-1])


def test_tensor_maps(module):
    """Triton 3.6's arguments: a map for each address, encoded once; strides beside addresses."""
    maps = module("flash_attention_kernel.tensor_maps")
    encoded = []

    def encode(descriptor, meta):
        encoded.append((descriptor.base.data_ptr(), meta))
        return [("map", *encoded[-1]), *descriptor.shape]

    q, k, other = (torch.zeros(4) for _ in range(3))
    layouts = ({"shape": [8]}, (5, 1), None, {"shape": [9]}, ())
    direct = maps.Direct(None, (), encode, ("first", "second"), {}, {})
    for left, right in ((q, k), (other, k), (q, k)):
        assert direct.expanded((left, q, q, right, k), layouts) == [
            ("map", left.data_ptr(), "first"), 8, (q.data_ptr(), 5, 1), None,
            ("map", right.data_ptr(), "second"), 9, (k.data_ptr(),),
        ]  # fmt: skip
    assert len(encoded) == 3
    plain = maps.Direct(None, (), None, (), {}, {})
    assert plain.expanded((q, None), ((5, 1), None)) == [(q, 5, 1), None]


CASES = {
    "decode_kernel": CacheCase("one", num_splits=1),
    "combine_kernel": CacheCase("split", 2, num_splits=3, page=16, sink=True),
    "append_kernel": CacheCase("new", 2, new=True, rotary_dim=32, num_splits=1, batch_idx=True),
    "append_kernel, paged": CacheCase("pages", 1, new=True, page=16, num_splits=1, leftpad=True),
    "append_kernel, packed": CacheCase("packed", lens_q=(1, 3, 2), new=True, num_splits=1),
}


@pytest.mark.parametrize("last", CASES)
def test_cache(kernel, module, recorders, monkeypatch, last):
    """By the remembered checks, too, which are a GPU's as well."""
    launch, remembered, ops = (
        module(name) for name in ("flash_attention_kernel.launch", "remembered", "ops")
    )
    monkeypatch.setattr(ops, "unobserved", lambda *tensors: True)
    monkeypatch.setattr(launch, "OVERFLOW", SimpleNamespace(value=None))  # nobody fills seqused
    monkeypatch.setattr(remembered, "known", {})
    signature = remembered.signature
    case = CASES[last]

    def on_a_gpu(tensors, *scalars):
        key = signature((), *scalars)
        return key + tuple(None if t is None else (t.shape, t.stride()) for t in tensors)

    monkeypatch.setattr(remembered, "signature", on_a_gpu)
    for seed in range(2):
        cache = make_cache(case, torch.float16, "cpu", seed)
        kernel.flash_attn_with_kvcache(cache.q, cache.k_cache, cache.v_cache, **cache.keywords)
        assert len(remembered.known) == 1
    hold(recorders, "decode_kernel", last.split(",")[0])


@pytest.mark.parametrize("words", ({}, {"num_splits": 1}, {"batch_invariant": True}))
@pytest.mark.parametrize("page", (0, 16))
def test_tile_of_many_programs(module, monkeypatch, words, page):
    """decode_kernel has another tile where there are more programs than multiprocessors, unless no
    bit may depend on the batch."""
    cache_calls = module("flash_attention_kernel.cache_calls")
    monkeypatch.setattr(cache_calls, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(cache_calls, "multiprocessors", lambda device: 8)
    make_problem = module("problem").AttentionProblem.kvcache
    options = module("options").Options(**words)
    tiles = []
    for batch in (1, 8):
        q = torch.zeros(batch, 1, 8, 128, dtype=torch.float16)
        cache = torch.zeros(batch * 32 // (page or 32), page or 32, 2, 128, dtype=torch.float16)
        table = None
        if page:
            table = torch.arange(cache.shape[0], dtype=torch.int32).view(batch, -1)
        problem = make_problem(q, cache, cache, options, 32, block_table=table)
        tiles.append(cache_calls.decode_tile(problem))
    assert (tiles[0] == tiles[1]) == bool(words)


@pytest.mark.parametrize(
    "seqlen, causal, group", ((1024, False, 16), (1024, True, 64), (16384, False, 2))
)
def test_heads_of_a_group(module, monkeypatch, seqlen, causal, group):
    """Of the forward on sm_90: with a mask as many as have room in the L2, else as fill the
    device."""
    hopper_calls = module("flash_attention_kernel.hopper_calls")
    monkeypatch.setattr(hopper_calls, "multiprocessors", lambda device: 132)
    q = torch.empty(16384 // seqlen, seqlen, 16, 128, dtype=torch.float16, device="meta")
    problem = module("problem").AttentionProblem.dense(
        q, q, q, module("options").Options(causal=causal)
    )
    per_head, heads, total, found = hopper_calls.forward_schedule(problem, 128)
    assert (per_head, heads, total) == (seqlen // 128, 16 * 16384 // seqlen, 16384 // 128 * 16)
    assert found == group


def test_no_tensor_is_lost(module):
    """autograd and the signature of a dense call leave out its tensors where `has_mods` is False:
    no field but those of packed calls, and dropout's seed, may be set then."""
    problem_module, options = module("problem"), module("options").Options()
    q = torch.zeros(1, 4, 2, 16)
    plain = problem_module.AttentionProblem.dense(q, q, q, options)
    assert not plain.has_mods()
    for name in plain._fields[3 : len(plain.tensors())]:
        if name not in ("cu_seqlens_q", "cu_seqlens_k", "rng_state"):
            assert plain._replace(**{name: q}).has_mods(), name


def test_signature(module, monkeypatch):
    """There is none of a tensor without strides; what cannot be hashed, or may hide data, is not
    kept, nor is a call on a CPU; one on a GPU is."""
    remembered = module("remembered")
    monkeypatch.setattr(remembered, "known", {})
    q = torch.zeros(2, 4)
    assert remembered.signature((q, None), 1.0, True) == remembered.signature(
        (q + 1, None), 1.0, True
    )
    assert remembered.signature((q, None), 1.0) != remembered.signature((q.t(), None), 1.0)
    assert remembered.signature((torch.nn.Parameter(q),)) is None
    assert remembered.signature((q.to_sparse(),)) is None
    nested = torch.nested.nested_tensor([q, q[:1]])
    assert remembered.signature((nested,)) is None
    for part in (q, [1, 2], torch.tensor(1.0)):
        key = remembered.signature((), part)
        assert remembered.find(key) is None and remembered.keep(key, ()) is None
    assert remembered.keep(remembered.signature((q,), 1.0), ()) is None
    assert not remembered.known
    key = (*remembered.signature((), 1.0, (2, 4)), torch.device("cuda", 0))
    memo = remembered.keep(key, (True,))
    assert remembered.find(key) == ((True,), memo) and remembered.find(key)[1] is memo

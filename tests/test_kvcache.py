"""flash_attn_with_kvcache: every argument against the oracle, and what it may never do."""

import pytest
import torch
from cache_cases import CASES, CacheCase, expected, make_cache
from cache_checking import call, check, close
from conftest import HAS_GPU

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
BY_NAME = {case.name: case for case in CASES}


@pytest.mark.parametrize("dtype", DTYPES.values(), ids=DTYPES)
@pytest.mark.parametrize("case", CASES, ids=[case.name for case in CASES])
def test_cases(kernel, device, case, dtype):
    if not HAS_GPU and dtype == torch.bfloat16 and case.name.startswith("pair"):
        pytest.skip("on a CPU bfloat16 takes the path of float16")
    cache = make_cache(case, dtype, device)
    check(case, cache, *call(kernel, cache))


SMALL = [c for c in CASES if max(c.counts) <= 17 and c.head_dim <= 128 and max(c.lens_k) < 200]


@pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled where there is a GPU")
@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=("fp16", "fp32"))
@pytest.mark.parametrize("case", SMALL, ids=[case.name for case in SMALL])
def test_interpreted(kernel, module, monkeypatch, case, dtype):
    """The Triton kernels, through Triton's interpreter."""
    ops = module("ops")
    monkeypatch.setattr(ops, "fwd_eager", launch_forward(module))
    monkeypatch.setattr(ops, "append_eager", module("flash_attention_kernel.launch").append)
    cache = make_cache(case, dtype, "cpu")
    check(case, cache, *call(kernel, cache))


@pytest.mark.gpu
@pytest.mark.parametrize("queries", (1, 8))
@pytest.mark.parametrize("page", (0, 16, 256))
def test_long_cache(kernel, device, queries, page):
    case = CacheCase(
        "long", queries, (131072 - queries, 3), capacity=131072, nheads=8, head_dim=128, page=page,
        new=True, causal=True,
    )  # fmt: skip
    cache = make_cache(case, torch.bfloat16, device)
    check(case, cache, *call(kernel, cache))


@pytest.mark.parametrize("page", (0, 16))
def test_cache_seqlens_forms(kernel, device, page):
    """int, int64 and CPU tensors; None is the whole cache."""
    case = CacheCase("forms", 2, (64, 64), capacity=64, page=page, causal=True)
    cache = make_cache(case, torch.float16, device)
    want = call(kernel, cache)[0]
    lengths = cache.keywords["cache_seqlens"]
    for form in (64, None, lengths.long(), lengths.cpu()):
        assert torch.equal(call(kernel, cache, cache_seqlens=form)[0], want)


def test_negative_cache_seqlens(kernel, device):
    """transformers pads a batch of decoding steps with sequences of length -1."""
    case = CacheCase("negative", 1, (9, 0), new=True, page=16)
    cache = make_cache(case, torch.float16, device)
    want = call(kernel, cache)[0][0]
    cache = make_cache(case, torch.float16, device)
    before = cache.k_cache.clone()
    lengths = torch.tensor([9, -1], dtype=torch.int32, device=device)
    out, lse = call(kernel, cache, cache_seqlens=lengths)
    assert torch.equal(out[0], want)
    assert not out[1].any() and torch.isinf(lse[1]).all()
    changed = (before != cache.k_cache) & ~(before.isnan() & cache.k_cache.isnan())
    assert changed.any(-1).any(-1).sum() == 1  # one row


def test_repeated_entries(kernel, device):
    case = CacheCase("entries", 2, (70, 70), batch_idx=True)
    cache = make_cache(case, torch.float16, device)
    same = cache.keywords["cache_batch_idx"][:1].expand(2)
    out, _ = call(kernel, cache._replace(q=cache.q[:1].expand_as(cache.q)), cache_batch_idx=same)
    assert torch.equal(out[0], out[1])


@pytest.mark.parametrize("page", (0, 16))
@pytest.mark.parametrize("form", ("int", "tensor"))
def test_overflow_raises(kernel, device, page, form):
    case = CacheCase("overflow", 3, (62, 62), capacity=64, page=page, new=True)
    cache = make_cache(case, torch.float16, device)
    past_the_end = cache.k_cache.clone()
    lengths = 62 if form == "int" else cache.keywords["cache_seqlens"]
    table = cache.keywords.get("block_table")
    match = "block_table" if page else "the cache"
    with pytest.raises(RuntimeError, match=match):
        call(kernel, cache, cache_seqlens=lengths)
    kept = ~past_the_end.isnan()
    assert torch.equal(cache.k_cache[kept], past_the_end[kept])
    if page:  # a page that is wanted and not there
        table = table.clone()
        table[1, 3] = -1
        with pytest.raises(RuntimeError, match="block_table"):
            call(
                kernel, cache, cache_seqlens=torch.tensor([60, 60], device=device).int(),
                block_table=table,
            )  # fmt: skip


@pytest.mark.gpu
def test_cuda_graph(kernel, device):
    """One captured step serves changing lengths; what does not fit is not written, nor raised."""
    case = CacheCase("graph", 1, (40, 130), capacity=160, new=True, rotary_dim=64, page=16)
    cache = make_cache(case, torch.bfloat16, device)
    table = torch.arange(20, dtype=torch.int32, device=device).view(2, 10)
    cache = cache._replace(k_cache=cache.k_cache.nan_to_num_(), v_cache=cache.v_cache.nan_to_num_())
    lengths = cache.keywords["cache_seqlens"]
    words = {"cache_seqlens": lengths, "block_table": table}
    call(kernel, cache, **words)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, _ = call(kernel, cache, **words)
    for step in ((41, 131), (90, 7), (0, 158)):
        lengths.copy_(torch.tensor(step))
        graph.replay()
        got = out.clone()
        lengths.copy_(torch.tensor(step))
        assert torch.equal(got, call(kernel, cache, **words)[0])
    lengths.fill_(160)
    before = cache.k_cache.clone()
    graph.replay()
    assert torch.equal(before, cache.k_cache)


class Step(torch.nn.Module):
    """One decoding step of an attention layer."""

    def __init__(self, kernel, words):
        super().__init__()
        self.kernel, self.words = kernel, words

    def forward(self, q, k, v, k_cache, v_cache, lengths):
        out = self.kernel.flash_attn_with_kvcache(
            q, k_cache, v_cache, k, v, cache_seqlens=lengths, causal=True, **self.words
        )
        return out * 2


@pytest.mark.parametrize("page", (0, 16))
def test_compile_a_step(kernel, device, page):
    """fullgraph, and the cache is written in place."""
    case = CacheCase("compile", 1, (40, 13), capacity=64, new=True, rotary_dim=32, page=page)
    names = ("rotary_cos", "rotary_sin", "block_table")
    results = []
    for compiled in (False, True):
        cache = make_cache(case, torch.float16, device)
        step = Step(kernel, {n: t for n, t in cache.keywords.items() if n in names})
        if compiled:
            step = torch.compile(step, fullgraph=True, backend="aot_eager")
        k, v, lengths = (cache.keywords[name] for name in ("k", "v", "cache_seqlens"))
        with torch.no_grad():
            out = step(cache.q, k, v, cache.k_cache, cache.v_cache, lengths)
        results.append((out, cache.k_cache.nan_to_num(), cache.v_cache.nan_to_num()))
    for eager, traced in zip(*results):
        assert torch.equal(eager, traced)


def launch_forward(module):
    """The Triton launcher in the place of ops.fwd_eager."""
    launch = module("flash_attention_kernel.launch")
    return lambda problem, memo=None: launch.forward(problem, None, None, memo)


@pytest.mark.parametrize("dims", ((128, 128), (64, 64)) if HAS_GPU else ((16, 16),))
@pytest.mark.parametrize("words", ({"num_splits": 1}, {"batch_invariant": True}))
@pytest.mark.parametrize("packed", (False, True))
def test_batch_invariance(kernel, module, monkeypatch, device, words, packed, dims):
    """A sequence alone, and among others: the same bits; without a GPU, in the interpreter."""
    if not HAS_GPU:
        monkeypatch.setattr(module("ops"), "fwd_eager", launch_forward(module))
    lens = (2500, 17, 900, 4096, 1, 33)
    counts = (1, 9, 2, 1, 40, 3) if packed else None
    case = CacheCase(
        "many", 1, lens, counts, 4096, 8, 2, dims[0], dims[1], page=16, causal=True, **words
    )
    cache = make_cache(case, torch.float16, device)
    out, lse = call(kernel, cache)
    start = 0
    for b, count in enumerate(case.counts):
        rows = slice(start, start + count)
        start += count
        one = {n: cache.keywords[n][b : b + 1] for n in ("cache_seqlens", "block_table")}
        one["block_table"] = one["block_table"][
            :, : -(-lens[b] // 16)
        ]  # as its batch would have it
        q = cache.q[rows] if packed else cache.q[b : b + 1]
        if packed:
            ends = torch.tensor([0, count], dtype=torch.int32, device=device)
            one.update(cu_seqlens_q=ends, max_seqlen_q=count)
        got_out, got_lse = call(kernel, cache._replace(q=q), **one)
        assert torch.equal(got_out, out[rows] if packed else out[b : b + 1])
        assert torch.equal(got_lse, lse[:, rows] if packed else lse[b : b + 1])


@pytest.mark.parametrize("name", ("page-16", "page-256", "leftpad-pages", "page-48"))
@pytest.mark.parametrize("lengths", ("cu_seqlens_k", "seqused_k", "both"))
def test_paged_varlen(kernel, device, name, lengths):
    """block_table on flash_attn_varlen_func: prefill, chunks of it, and decoding in one call."""
    case = BY_NAME[name]._replace(new=False, lens_q=(40, 1, 70), lens_k=(40, 90, 200), queries=0)
    cache = make_cache(case, torch.float16, device)
    words = cache.keywords
    used = words["cache_seqlens"]
    ends = torch.cat([used.new_zeros(1), used.cumsum(0).int()])
    both = {
        "cu_seqlens_k": ends if lengths != "seqused_k" else None,
        "seqused_k": used if lengths != "cu_seqlens_k" else None,
    }
    for longest in (70, torch.tensor(70, device=device)):
        out, lse, _ = kernel.flash_attn_varlen_func(
            cache.q, cache.k_cache, cache.v_cache, words["cu_seqlens_q"], max_seqlen_q=longest,
            max_seqlen_k=200, causal=case.causal, block_table=words["block_table"],
            leftpad_k=words.get("cache_leftpad"), return_attn_probs=True, **both,
        )  # fmt: skip
        check(case, cache, out, lse)


def test_queries_of_flash_attn_func(kernel, device):
    """Few queries to many keys take the decoding kernel in the plain functions, too."""
    case = CacheCase("plain", 3, (3000, 3000), capacity=3000, nheads=8, causal=True)
    cache = make_cache(case, torch.float16, device)
    for splits in (0, 1, 5):
        out, lse, _ = kernel.flash_attn_func(
            cache.q, cache.k_cache[:2], cache.v_cache[:2], causal=True, num_splits=splits,
            return_attn_probs=True,
        )  # fmt: skip
        check(case, cache, out, lse)


class Layer(torch.nn.Module):
    """A Llama-shaped layer: rotary, GQA, gated MLP."""

    def __init__(self, dim=64, heads=4, heads_k=2):
        super().__init__()
        self.heads, self.heads_k, self.head_dim = heads, heads_k, dim // heads
        self.qkv = torch.nn.Linear(dim, (heads + 2 * heads_k) * self.head_dim, bias=False)
        self.o = torch.nn.Linear(dim, dim, bias=False)
        self.up = torch.nn.Linear(dim, 4 * dim, bias=False)
        self.down = torch.nn.Linear(2 * dim, dim, bias=False)

    def forward(self, x, attend):
        h = torch.nn.functional.rms_norm(x, x.shape[-1:])
        qkv = self.qkv(h).unflatten(-1, (-1, self.head_dim))
        q, k, v = qkv.split((self.heads, self.heads_k, self.heads_k), dim=-2)
        x = x + self.o(attend(q, k, v).flatten(-2))
        gate, up = self.up(torch.nn.functional.rms_norm(x, x.shape[-1:])).chunk(2, -1)
        return x + self.down(torch.nn.functional.silu(gate) * up)


@torch.no_grad()
def test_greedy_loop(kernel, device):
    """16 tokens with the cache and without it: the same."""
    torch.manual_seed(3)
    vocabulary, dim, prompt, steps = 97, 64, 9, 16
    embedding = torch.nn.Embedding(vocabulary, dim).to(device)
    layers = torch.nn.ModuleList(Layer(dim) for _ in range(3)).to(device)
    angles = torch.outer(torch.arange(64.0), 1e4 ** (-torch.arange(0, 16, 2) / 16)).to(device)
    cos, sin = angles.cos(), angles.sin()
    tokens = torch.randint(0, vocabulary, (2, prompt), device=device)

    def without_cache(q, k, v):
        q, k = (kernel.apply_rotary_emb(t, cos, sin) for t in (q, k))
        return kernel.flash_attn_func(q, k, v, causal=True)

    slow = tokens
    for _ in range(steps):
        x = embedding(slow)
        for layer in layers:
            x = layer(x, without_cache)
        slow = torch.cat([slow, (x[:, -1:] @ embedding.weight.T).argmax(-1)], 1)

    caches = [torch.full((2, 2, 64, 2, 16), torch.nan, device=device) for _ in layers]
    fast, new, past = tokens, tokens, 0
    for _ in range(steps):
        x = embedding(new)
        for layer, (k_cache, v_cache) in zip(layers, caches):

            def with_cache(q, k, v, k_cache=k_cache, v_cache=v_cache, past=past):
                return kernel.flash_attn_with_kvcache(
                    q, k_cache, v_cache, k, v, cos, sin, past, causal=True,
                    rotary_interleaved=False,
                )  # fmt: skip

            x = layer(x, with_cache)
        past += new.shape[1]
        new = (x[:, -1:] @ embedding.weight.T).argmax(-1)
        fast = torch.cat([fast, new], 1)
    assert torch.equal(fast, slow)


def test_as_transformers_calls_it(kernel, device):
    """modeling_flash_attention_utils passes these, and queries as [sequences, 1, heads, dim]."""
    case = CacheCase("transformers", 1, (40, 130), page=256, new=True, causal=True)
    cache = make_cache(case, torch.bfloat16, device)
    words = dict(
        cache.keywords, dropout_p=0.0, deterministic=False, max_seqlen_q=1, softmax_scale=0.125
    )
    out = kernel.flash_attn_with_kvcache(
        cache.q, cache.k_cache, cache.v_cache, words.pop("k"), words.pop("v"), **words
    )
    exact, eager = (expected(case, cache, dtype) for dtype in (torch.float64, torch.bfloat16))
    for b in range(2):
        close(out[b], exact[b][0], eager[b][0])


ERRORS = {
    "k alone": ({"v": None}, ValueError, "k and v"),
    "no cache_seqlens": ({"cache_seqlens": None}, ValueError, "cache_seqlens"),
    "dropout": ({"dropout_p": 0.1}, NotImplementedError, "dropout_p"),
    "cos alone": ({"rotary_sin": None}, ValueError, "rotary_sin"),
    "cos without k": ({"k": None, "v": None}, ValueError, "rotary_cos needs k"),
    "cos too wide": ({"rotary_cos": (512, 33), "rotary_sin": (512, 33)}, ValueError, "columns"),
    "cos too short": ({"rotary_cos": (9, 32), "rotary_sin": (9, 32)}, ValueError, "512 rows"),
    "k's shape": ({"k": (2, 1, 3, 64)}, ValueError, "k must have shape"),
    "lengths": ({"cache_seqlens": torch.zeros(3).int()}, ValueError, "cache_seqlens must"),
    "table": ({"block_table": torch.zeros(3, 2).int()}, ValueError, "block_table must"),
    "table's dtype": ({"block_table": torch.zeros(2, 2)}, TypeError, "block_table must"),
    "two tables": (
        {"block_table": torch.zeros(2, 2).int(), "page_table": torch.zeros(2, 2).int()},
        ValueError,
        "one argument",
    ),
    "table and entries": (
        {"block_table": torch.zeros(2, 2).int(), "cache_batch_idx": torch.zeros(2).int()},
        ValueError,
        "cache_batch_idx",
    ),
    "entries": ({"cache_batch_idx": torch.zeros(3).int()}, ValueError, "cache_batch_idx"),
    "leftpad": ({"cache_leftpad": torch.zeros(3).int()}, ValueError, "cache_leftpad"),
    "splits": ({"num_splits": -1}, ValueError, "num_splits"),
    "splits and invariant": ({"num_splits": 2, "batch_invariant": True}, ValueError, "batch_inv"),
    "float8": ({"k_descale": 1.0}, NotImplementedError, "k_descale"),
}


@pytest.mark.parametrize("changes, error, match", ERRORS.values(), ids=ERRORS)
def test_errors(kernel, device, changes, error, match):
    cache = make_cache(CacheCase("e", 1, (9, 5), new=True, rotary_dim=64), torch.float16, device)
    changes = {
        name: torch.zeros(value, dtype=torch.float16) if isinstance(value, tuple) else value
        for name, value in changes.items()
    }
    changes = {n: t.to(device) if torch.is_tensor(t) else t for n, t in changes.items()}
    before = cache.k_cache.nan_to_num()
    with pytest.raises(error, match=match):
        call(kernel, cache, **changes)
    assert torch.equal(before, cache.k_cache.nan_to_num())


def test_more_errors(kernel, device):
    cache = make_cache(CacheCase("e", 1, (9, 5)), torch.float16, device)
    with pytest.raises(NotImplementedError, match="no_grad"):
        call(kernel, cache._replace(q=cache.q.requires_grad_()))
    cache = cache._replace(q=cache.q.detach())
    with pytest.raises(ValueError, match="k_cache must have an entry per sequence"):
        call(kernel, cache._replace(k_cache=cache.k_cache[:1], v_cache=cache.v_cache[:1]))
    columns = cache.k_cache.transpose(1, 3).contiguous().transpose(1, 3)
    with pytest.raises(ValueError, match="k_cache must have its columns"):
        call(kernel, cache._replace(k_cache=columns))
    with pytest.raises(ValueError, match="cache_seqlens must be 0 to"):
        call(kernel, cache, cache_seqlens=513)
    with pytest.raises(TypeError, match="one dtype"):
        call(kernel, cache._replace(k_cache=cache.k_cache.float()))
    with pytest.raises(NotImplementedError, match="num_splits"):
        kernel.flash_attn_func(cache.q, cache.q, cache.q, dropout_p=0.5, num_splits=2)


def test_opcheck(module, kernel, device):
    """append mutates the caches and nothing else; combine is functional."""
    cache = make_cache(BY_NAME["rotary"], torch.float16, device)
    words, ops = cache.keywords, module("ops")
    args = (
        cache.q, words["k"], words["v"], cache.k_cache.nan_to_num(), cache.v_cache.nan_to_num(),
        words["rotary_cos"], words["rotary_sin"], None, words["cache_seqlens"], None, None, True,
        True,
    )  # fmt: skip
    torch.library.opcheck(ops.append, args, test_utils=("test_schema", "test_faketensor"))
    parts = torch.randn(3, 2, 5, 4, 16, device=device), torch.randn(3, 2, 5, 4, device=device)
    torch.library.opcheck(
        ops.combine, (*parts, torch.float16), test_utils=("test_schema", "test_faketensor")
    )

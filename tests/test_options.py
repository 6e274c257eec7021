"""What no case can show of the options: dropout's statistics, forms of arguments, determinism."""

import math

import pytest
import torch
from cases import BY_NAME, Case, make
from checking import check, dropout_mask, run
from conftest import HAS_GPU
from torch.utils.checkpoint import checkpoint


def zero_inputs(device, batch=2, seqlen_q=90, seqlen_k=120, nheads=4, nheads_k=2, head_dim=32):
    q = torch.zeros(batch, seqlen_q, nheads, head_dim, device=device, dtype=torch.float16)
    k = torch.zeros(batch, seqlen_k, nheads_k, head_dim, device=device, dtype=torch.float16)
    return q, k


@pytest.mark.parametrize("dropout_p", (0.1, 0.5, 0.83))
def test_dropout_rate(kernel, device, dropout_p):
    """Kept pairs are binomial: within five standard deviations, over all and over every head,
    batch, and residue of the positions that share a call of the generator."""
    mask = dropout_mask(kernel, *zero_inputs(device), {"dropout_p": dropout_p})  # [b, i, h, j]
    grid = mask[:, :80, :, :112].unflatten(1, (5, 2, 8)).unflatten(4 + 1, (7, 2, 8))
    groups = [mask.flatten()[None], mask.transpose(1, 2).flatten(0, 1).flatten(1)]
    groups.append(grid.movedim((2, 6), (0, 1)).flatten(0, 1).flatten(1))
    for kept in groups:
        n = kept.shape[1]
        spread = 5 * math.sqrt(n * dropout_p * (1 - dropout_p))
        assert ((kept.sum(1) - n * (1 - dropout_p)).abs() <= spread).all()
    assert not torch.equal(mask[:, :8], mask[:, 8:16])
    assert not torch.equal(mask[..., :8], mask[..., 8:16])


def test_dropout_calls_differ_and_seeds_repeat(kernel, device):
    """[28] Every call draws its own seed from torch's generator; the same seed, the same mask."""
    q, k, v, *_ = make(BY_NAME["gqa"], torch.float16, device)
    torch.manual_seed(3)
    first, second = (kernel.flash_attn_func(q, k, v, dropout_p=0.3) for _ in range(2))
    torch.manual_seed(3)
    again = kernel.flash_attn_func(q, k, v, dropout_p=0.3)
    assert torch.equal(first, again) and not torch.equal(first, second)
    state = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    kernel.flash_attn_func(q, k, v)  # without dropout the generator is left alone
    after = torch.get_rng_state() if device.type == "cpu" else torch.cuda.get_rng_state()
    assert torch.equal(state, after)


def test_dropout_mask_of_backward(kernel, device):
    """The mask that dV shows, probed by unit vectors for dO, is the forward's."""
    q, k = zero_inputs(device)
    mask = dropout_mask(kernel, q, k, {"dropout_p": 0.4})
    v = torch.zeros(2, 120, 2, 90, device=device, dtype=torch.float16, requires_grad=True)
    dout = torch.eye(90, device=device, dtype=torch.float16)[:, None].expand(2, 90, 4, 90)
    for head in range(4):  # one head of a group at a time: dV sums over them
        torch.manual_seed(7)
        out = kernel.flash_attn_func(q, k, v, dropout_p=0.4)
        one = torch.zeros(4, 1, device=device, dtype=torch.float16)
        one[head] = 1.0
        (dv,) = torch.autograd.grad(out, v, dout * one)  # [b, j, h_k, i]
        assert torch.equal(dv[:, :, head // 2] != 0, mask[:, :, head].transpose(1, 2))


@pytest.mark.parametrize("name", ("dropout", "dropout-gqa", "dropout-varlen"))
def test_s_dmask(kernel, device, name):
    """S_dmask: the probabilities, negative exactly where dropped."""
    case = BY_NAME[name]
    q, k, v, _, _, options = make(case, torch.float32, device)
    mask = dropout_mask(kernel, q, k, options)
    torch.manual_seed(7)
    if not case.varlen:
        out, lse, probs = kernel.flash_attn_func(q, k, v, return_attn_probs=True, **options)
        assert torch.equal(probs > 0, mask.transpose(1, 2))
        rows = probs.abs().sum(-1)
        torch.testing.assert_close(rows, torch.ones_like(rows))
        kept = probs.clamp(min=0) / (1 - case.dropout_p)
        values = v.repeat_interleave(q.shape[2] // k.shape[2], 2)
        torch.testing.assert_close(torch.einsum("bhij,bjhd->bihd", kept, values), out)
        return
    longest = (max(case.lens_q), max(case.lens_k))
    lengths = (options.pop("cu_seqlens_q"), options.pop("cu_seqlens_k"), *longest)
    _, _, probs = kernel.flash_attn_varlen_func(
        q, k, v, *lengths, return_attn_probs=True, **options
    )
    assert probs.shape == (3, 2, *longest)
    q0, k0 = 39, 60  # the last sequence, causal
    i = torch.arange(70, device=device)[:, None] + 90 - 70
    seen = torch.arange(90, device=device) <= i
    want = mask[q0:, :, k0:].transpose(0, 1) & seen
    assert torch.equal(probs[2] > 0, want)
    assert (probs[0, :, 30:] == 0).all() and (probs[1] == 0).all()


def test_checkpointing_repeats_dropout(kernel, device):
    """torch.utils.checkpoint restores the generator, and with it the mask."""
    q, k, v, dout, _, _ = make(BY_NAME["causal"], torch.float32, device)
    q.requires_grad_()

    def attend(x):
        return kernel.flash_attn_func(x, k, v, dropout_p=0.3)

    grads = []
    for call in (attend, lambda x: checkpoint(attend, x, use_reentrant=False)):
        torch.manual_seed(5)
        grads += torch.autograd.grad(call(q), q, dout)
    assert torch.equal(*grads)


@pytest.mark.gpu
def test_dropout_in_a_cuda_graph(kernel, device):
    """[28] Every replay draws anew, and agrees with its own backward's mask."""
    q, k = zero_inputs(device)
    v = torch.eye(120, device=device, dtype=torch.float16)[:, None].expand(2, 120, 2, 120)
    kernel.flash_attn_func(q, k, v, dropout_p=0.5)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = kernel.flash_attn_func(q, k, v, dropout_p=0.5)
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(out != 0)
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])


WINDOWS = ([9, 4], (9, 4), torch.tensor([9, 4]), torch.tensor([9, 4], dtype=torch.int32))


@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_window_forms(kernel, device, window):
    """[13] Tuple, list, CPU tensor."""
    q, k, v, *_ = make(BY_NAME["window"], torch.float16, device)
    want = kernel.flash_attn_func(q, k, v, window_size=(9, 4))
    assert torch.equal(kernel.flash_attn_func(q, k, v, window_size=window), want)
    want = kernel.flash_attn_func(q, k, v, window_size=(-1, 4))
    assert torch.equal(kernel.flash_attn_func(q, k, v, window_size=(None, 4)), want)
    assert not torch.equal(kernel.flash_attn_func(q, k, v), want)


def test_window_of_zero_right_is_causal(kernel, device):
    """[11] (-1, 0) is causal; causal makes any right bound 0."""
    q, k, v, *_ = make(BY_NAME["causal-more-keys"], torch.float16, device)
    want = kernel.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(kernel.flash_attn_func(q, k, v, window_size=(-1, 0)), want)
    assert torch.equal(kernel.flash_attn_func(q, k, v, causal=True, window_size=(-1, 50)), want)


def test_sink_aliases(kernel, device):
    q, k, v, *_ = make(BY_NAME["gqa"], torch.float16, device)
    sink = torch.randn(6, device=device)
    want = kernel.flash_attn_func(q, k, v, s_aux=sink)
    assert torch.equal(kernel.flash_attn_func(q, k, v, learnable_sink=sink), want)
    nothing = torch.full((6,), -torch.inf, device=device)  # a sink that takes no part
    got = kernel.flash_attn_func(q, k, v, s_aux=nothing)
    torch.testing.assert_close(got, kernel.flash_attn_func(q, k, v))


def test_strided_slopes_and_bias(kernel, device):
    """[27] Options behind any strides; a bias of another dtype."""
    q, k, v, *_ = make(Case("strided", 40, 50, nheads=4, nheads_k=2), torch.float16, device)
    slopes = torch.rand(4, 2, device=device)[:, 0]
    bias = torch.randn(50, 40, device=device, dtype=torch.float64).T
    for name, value in (("alibi_slopes", slopes), ("attn_bias", bias)):
        got = kernel.flash_attn_func(q, k, v, **{name: value})
        want = kernel.flash_attn_func(q, k, v, **{name: value.contiguous()})
        torch.testing.assert_close(got, want, rtol=0, atol=0)
    single = kernel.flash_attn_func(q, k, v, attn_bias=bias.float())
    torch.testing.assert_close(got, single)


def test_bias_hides_everything(kernel, device):
    """Rows whose every score is -inf give 0 and +inf, and no gradient, as rows without keys."""
    q, k, v, dout, _, _ = make(BY_NAME["full"], torch.float32, device)
    bias = torch.zeros(100, 100, device=device)
    bias[10:20] = -torch.inf
    for attn_bias in (bias, bias == 0):
        options = {"attn_bias": attn_bias}
        results = run(kernel, q, k, v, dout, None, options)
        assert not any(torch.isnan(t).any() for t in results)
        assert (results[0][:, 10:20] == 0).all() and torch.isposinf(results[1][..., 10:20]).all()
        check(results, q, k, v, dout, None, options)


def test_short_bias_of_packed_sequences(kernel, device):
    """A packed score that attn_bias has no element for is left alone."""
    case = BY_NAME["bias-varlen"]
    q, k, v, dout, _, options = make(case, torch.float32, device)
    whole = options["attn_bias"]
    zeroed = torch.zeros_like(whole)
    zeroed[:, :, :40, :50] = whole[:, :, :40, :50]
    lengths = [options[f"cu_seqlens_{side}"] for side in "qk"]
    longest = (torch.tensor(64, device=device), torch.tensor(90, device=device))
    got, want = (
        kernel.flash_attn_varlen_func(q, k, v, *lengths, *longest, attn_bias=bias)
        for bias in (whole[:, :, :40, :50], zeroed)
    )
    torch.testing.assert_close(got, want)


@pytest.mark.parametrize("pack", ("qkv", "kv"))
def test_packed_gradient_is_written_in_place(kernel, device, pack):
    """Backward of a packed call makes one gradient, and no stack of three."""
    qkv = torch.randn(2, 50, 3, 4, 32, device=device).requires_grad_()
    if pack == "qkv":
        leaf, out = qkv, kernel.flash_attn_qkvpacked_func(qkv, causal=True)
    else:
        leaf = qkv.detach()[:, :, 1:].clone().requires_grad_()
        out = kernel.flash_attn_kvpacked_func(qkv.detach()[:, :, 0], leaf, causal=True)
    names = []
    node, todo = None, [out.grad_fn]
    while todo:
        node = todo.pop()
        names.append(type(node).__name__)
        todo += [parent for parent, _ in node.next_functions if parent is not None]
    assert names == ["AttentionBackward", "AccumulateGrad"]
    out.sum().backward()
    assert leaf.grad.shape == leaf.shape and leaf.grad.is_contiguous()


DETERMINISM = ("gqa", "pair-3", "window-varlen", "bias-bk", "alibi-varlen", "sink", "dropout-gqa")


@pytest.mark.parametrize("name", DETERMINISM)
@pytest.mark.parametrize("by", ("argument", "torch"))
def test_50_backward_runs(kernel, device, request, name, by):
    """Every gradient is bitwise the same 50 times over, if that is asked for (5 on a CPU)."""
    *inputs, options = make(BY_NAME[name], torch.bfloat16, device)
    options["deterministic"] = by == "argument"
    if by == "torch":
        torch.use_deterministic_algorithms(True, warn_only=True)
        request.addfinalizer(lambda: torch.use_deterministic_algorithms(False))
    first = run(kernel, *inputs, options)
    for _ in range(49 if HAS_GPU else 4):
        for got, want in zip(run(kernel, *inputs, options), first):
            assert torch.equal(got, want)

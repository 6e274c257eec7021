"""The rows of EDGE_CASES.md (numbers in brackets) that no case of cases.py covers."""

import gc

import pytest
import torch
from cases import BY_NAME, Case, cumulative, make
from checking import check, run
from reference import attention_with_grads


def grads_of(kernel, q, k, v, dout, **options):
    out = kernel.flash_attn_func(q, k, v, **options)
    return (out, *torch.autograd.grad(out, (q, k, v), dout))


def assert_all_equal(got, want):
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=0, atol=0)


def assert_all_close(got, want):
    """Equal but for the order of a sum, which the layout of a load decides on a GPU."""
    for a, b in zip(got, want):
        torch.testing.assert_close(a, b, rtol=2e-3, atol=2e-3)


def poison(device):
    """Fill what the allocator will hand out next with NaN."""
    blocks = [torch.full((n,), torch.nan, device=device) for n in (1 << 10, 1 << 14, 1 << 18) * 4]
    del blocks
    gc.collect()


@pytest.mark.parametrize("name", ("varlen-tail", "varlen-empty-queries", "varlen-empty-keys"))
def test_rows_outside_sequences_are_zero(kernel, device, name):
    """[4, 5, 8] Rows past cu_seqlens[-1], and all of an empty partner's, are exactly 0."""
    poison(device)
    case = BY_NAME[name]
    inputs = make(case, torch.float16, device)
    out, lse, dq, dk, dv = run(kernel, *inputs)
    used_q = [bool(nk) for nq, nk in zip(case.lens_q, case.lens_k) for _ in range(nq)]
    used_k = [bool(nq) for nq, nk in zip(case.lens_q, case.lens_k) for _ in range(nk)]
    for tensor, used in ((out, used_q), (dq, used_q), (dk, used_k), (dv, used_k)):
        used = torch.tensor(used + [False] * case.tail, device=device)
        assert (tensor[~used] == 0).all()
        assert not torch.isnan(tensor).any()
    assert torch.isposinf(lse[:, ~torch.tensor(used_q + [False] * case.tail, device=device)]).all()


@pytest.mark.gpu
@pytest.mark.parametrize(
    "batch, seqlen, nheads, head_dim",
    ((1600, 729, 16, 72), (8300, 1, 16, 128), (1, 8, 70_000, 16), (5000, 3, 16, 16)),
)
def test_large_grids(kernel, device, batch, seqlen, nheads, head_dim):
    """[15] Batch x heads past 65,535; the first and last sequences are compared."""
    size = (batch, seqlen, nheads, head_dim)
    q, k, v, dout = (torch.randn(size, device=device, dtype=torch.float16) for _ in range(4))
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    results = grads_of(kernel, q, k, v, dout, causal=True)
    for part in ((0, slice(0, 1)), (batch - 1, slice(nheads - 1, nheads))):
        rows = part[0]
        heads = part[1]
        small = [t[rows : rows + 1, :, heads].detach() for t in (q, k, v)]
        dout_small = dout[rows : rows + 1, :, heads]
        out, _, dq, dk, dv = attention_with_grads(*small, dout_small, causal=True)
        for got, want in zip(results, (out, dq, dk, dv)):
            got = got[rows : rows + 1, :, heads].double()
            torch.testing.assert_close(got, want, rtol=2e-2, atol=5e-3)


@pytest.mark.gpu
def test_offsets_past_2_31(kernel, device):
    """[16] Strides and offsets beyond 2**31 elements: between sequences, rows and heads."""
    storage = torch.zeros(2**31 + 2**20, device=device, dtype=torch.float16)
    far = 2**31 + 1024
    shape = (2, 40, 1, 32)
    small = [torch.randn(shape, device=device, dtype=torch.float16) for _ in range(3)]
    dout = torch.randn(shape, device=device, dtype=torch.float16)
    want = grads_of(kernel, *(t.requires_grad_() for t in small), dout, causal=True)

    by_batch = storage.as_strided(shape, (far, 32, 32, 1))
    by_row = storage.as_strided((1, 40, 1, 32), (0, far // 39 // 32 * 32 + 32, 32, 1))
    by_batch.copy_(small[1].detach())
    views = (small[0], by_batch.requires_grad_(), small[2])
    assert_all_close(grads_of(kernel, *views, dout, causal=True), want)
    by_row.copy_(small[2].detach()[:1])
    first = [t.detach()[:1].requires_grad_() for t in small[:2]] + [by_row.requires_grad_()]
    got = grads_of(kernel, *first, dout[:1], causal=True)
    assert_all_close(got, [t[:1] for t in want])

    far_dout = by_row.detach()[0].copy_(dout[0])  # packed: one sequence, the same numbers
    packed = [t.detach()[0].requires_grad_() for t in small]
    cu = cumulative((40,), device)
    out = kernel.flash_attn_varlen_func(*packed, cu, cu, 40, 40, causal=True)
    got = (out, *torch.autograd.grad(out, packed, far_dout))
    assert_all_close(got, [t[0] for t in want])


def strided_views(q, k, v):
    """[17] The same numbers behind other strides."""
    qkv = torch.stack([q, k, v], 2)
    yield tuple(qkv.unbind(2))
    yield tuple(t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    yield tuple(torch.stack([t, t], -1).flatten(-2)[..., ::2] for t in (q, k, v))
    yield (
        q.transpose(0, 1).contiguous().transpose(0, 1),
        torch.cat([k, k], -1)[..., : k.shape[-1]],
        v.transpose(1, 3).contiguous().transpose(1, 3),
    )
    yield tuple(t[:1].expand_as(t) for t in (q, k, v))
    yield tuple(t.transpose(1, 3).contiguous().transpose(1, 3) for t in (q, k, v))


@pytest.mark.parametrize("kind", range(6))
def test_strides(kernel, device, kind):
    """[17] Equal to contiguous, for q, k, v and dout alike."""
    q, k, v, dout, _, _ = make(Case("strides", 50, 50, head_dim=24), torch.float16, device)
    views = list(strided_views(q, k, v))[kind]
    plain = [t.contiguous().requires_grad_() for t in views]
    want = grads_of(kernel, *plain, dout, causal=True)
    views = [t.detach().requires_grad_() for t in views]
    dout_view = torch.cat([dout, dout], 2)[:, :, : dout.shape[2]]
    assert_all_close(grads_of(kernel, *views, dout_view, causal=True), want)


def test_expanded_dout(kernel, device):
    """[18] out.sum().backward(): a dout of stride 0."""
    q, k, v, dout, _, _ = make(BY_NAME["full"], torch.float16, device)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    want = grads_of(kernel, q, k, v, torch.ones_like(dout))
    out = kernel.flash_attn_func(q, k, v)
    out.sum().backward()
    assert_all_close((q.grad, k.grad, v.grad), want[1:])


@pytest.mark.parametrize("offset", (1, 3, 8))
def test_unaligned_base(kernel, device, offset):
    """[19] Base pointers aligned to two bytes only, of all tensors or of any one: in one process,
    as a launch remembered for one of them must not serve the next."""
    q, k, v, dout, _, _ = make(Case("unaligned", 40, 40, head_dim=64), torch.float16, device)
    want = grads_of(kernel, *(t.requires_grad_() for t in (q, k, v)), dout)

    def shifted(t):
        storage = torch.empty(t.numel() + offset, dtype=t.dtype, device=device)
        return storage[offset:].view(t.shape).copy_(t.detach())

    for which in ({0}, {1}, {2}, {3}, {0, 1, 2, 3}):
        tensors = [shifted(t) if i in which else t.detach() for i, t in enumerate((q, k, v, dout))]
        inputs = [t.requires_grad_() for t in tensors[:3]]
        assert_all_close(grads_of(kernel, *inputs, tensors[3]), want)


def test_aliased_inputs(kernel, device):
    """[20] k is v, and q is k: their gradients add up."""
    x, y, _, dout, _, _ = make(Case("alias", 30, 30), torch.float32, device)
    for tensors in ((x, y, y), (x, x, y)):
        apart = [t.detach().clone().requires_grad_() for t in tensors]
        want = grads_of(kernel, *apart, dout)[1:]
        shared = {id(t): t.detach().clone().requires_grad_() for t in tensors}
        out = kernel.flash_attn_func(*(shared[id(t)] for t in tensors))
        out.backward(dout)
        for t in shared:
            total = sum(g for g, original in zip(want, tensors) if id(original) == t)
            torch.testing.assert_close(shared[t].grad, total)


def test_nan_past_the_end_is_ignored(kernel, device):
    """[21] NaN in rows of K and V that belong to no sequence."""
    case = BY_NAME["varlen-tail"]
    q, k, v, dout, dlse, options = make(case, torch.float16, device)
    want = run(kernel, q, k, v, dout, dlse, options)
    k, v = k.clone(), v.clone()
    k[-case.tail :], v[-case.tail :] = torch.nan, torch.nan
    assert_all_equal(run(kernel, q, k, v, dout, dlse, options), want)


def test_nan_in_rows_that_do_not_count_is_ignored(kernel, device):
    """[21] NaN in the rows that seqused_k ends before, and in those that leftpad_k skips."""
    case = BY_NAME["used-leftpad"]
    q, k, v, dout, dlse, options = make(case, torch.float16, device)
    want = run(kernel, q, k, v, dout, dlse, options)
    counts = torch.zeros(k.shape[0], dtype=torch.bool, device=device)
    ends = options["cu_seqlens_k"].tolist()
    for b, first in enumerate(ends[:-1]):
        last = first + int(options["seqused_k"][b])
        counts[first + int(options["leftpad_k"][b]) : last] = True
    assert not counts.all()
    k, v = k.clone(), v.clone()
    k[~counts], v[~counts] = torch.nan, torch.nan
    got = run(kernel, q, k, v, dout, dlse, options)
    assert_all_equal(got, want)
    assert (got[3][~counts] == 0).all() and (got[4][~counts] == 0).all()


def test_nan_query_stays_in_its_row(kernel, device):
    """[22] A NaN in one query row makes that row NaN, and no other."""
    q, k, v, *_ = make(BY_NAME["causal"], torch.float16, device)
    want = kernel.flash_attn_func(q, k, v, causal=True)
    q = q.clone()
    q[0, 70, 1, 3] = torch.nan
    out = kernel.flash_attn_func(q, k, v, causal=True)
    assert torch.isnan(out[0, 70, 1]).all()
    out[0, 70, 1] = want[0, 70, 1]
    assert_all_equal((out,), (want,))


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=("fp16", "fp32"))
def test_huge_logits(kernel, device, dtype):
    """[23, 24] Scores far beyond 65,504 and below -50,000, first tile masked for some rows."""
    q, k, v, dout, _, options = make(BY_NAME["causal-more-queries"], torch.float32, device)
    q, k = (100 * q).to(dtype), (100 * k).to(dtype)
    k = -k.abs() * q.sign()[:, : k.shape[1]]  # mostly very negative scores
    v, dout = v.to(dtype), dout.to(dtype)
    results = run(kernel, q, k, v, dout, None, options)
    want = attention_with_grads(q, k, v, dout, **options)
    assert not any(torch.isnan(t).any() for t in results)
    torch.testing.assert_close(results[0].double(), want[0], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("scale", (0.2, torch.tensor(0.2), torch.tensor([0.2], dtype=torch.half)))
def test_scale_types(kernel, device, scale):
    """[25] A number or a tensor of one."""
    q, k, v, *_ = make(BY_NAME["full"], torch.float16, device)
    want = kernel.flash_attn_func(q, k, v, softmax_scale=float(scale))
    assert_all_equal((kernel.flash_attn_func(q, k, v, softmax_scale=scale),), (want,))


def max_seqlens(device):
    import numpy

    return (75, numpy.int64(75), torch.tensor(75), torch.tensor(75, device=device), 10**6)


@pytest.mark.parametrize("kind", range(5))
def test_lengths_types(kernel, device, kind):
    """[31, 32] max_seqlen of any kind and size; cu_seqlens int64, on the CPU, strided."""
    case = BY_NAME["varlen"]
    q, k, v, _, _, options = make(case, torch.float16, device)
    cu = options["cu_seqlens_q"]
    want = kernel.flash_attn_varlen_func(q, k, v, cu, cu, 130, 130, causal=True)
    strided = torch.stack([cu, cu], 1)[:, 0]
    for lengths in (cu.long(), cu.cpu(), strided):
        length = max_seqlens(device)[kind]
        out = kernel.flash_attn_varlen_func(q, k, v, lengths, lengths, length, length, causal=True)
        assert_all_equal((out,), (want,))


def test_some_inputs_without_grad(kernel, device):
    """[33] Gradients for those that want one."""
    q, k, v, dout, _, _ = make(BY_NAME["full"], torch.float16, device)
    want = grads_of(kernel, *(t.detach().requires_grad_() for t in (q, k, v)), dout)[1:]
    for wanted in ((True, False, False), (False, True, False), (False, False, True)):
        inputs = [t.detach().requires_grad_(flag) for t, flag in zip((q, k, v), wanted)]
        kernel.flash_attn_func(*inputs).backward(dout)
        for tensor, flag, grad in zip(inputs, wanted, want):
            assert (tensor.grad is not None) == flag
            if flag:
                assert_all_equal((tensor.grad,), (grad,))


def test_nothing_saved_without_grad(kernel, device):
    """[33] no_grad, inference_mode, inputs without grad: an output without history."""
    q, k, v, *_ = make(BY_NAME["full"], torch.float16, device)
    assert kernel.flash_attn_func(q, k, v).grad_fn is None
    q.requires_grad_()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            out = kernel.flash_attn_func(q, k, v)
        assert out.grad_fn is None and not out.requires_grad
        assert out.is_inference() == (mode is torch.inference_mode)


def test_backward_twice(kernel, device):
    """[34] retain_graph: the same bits again."""
    q, k, v, dout, _, _ = make(BY_NAME["causal"], torch.bfloat16, device)
    q.requires_grad_()
    out = kernel.flash_attn_func(q, k, v, causal=True)
    (first,) = torch.autograd.grad(out, q, dout, retain_graph=True)
    assert_all_equal(torch.autograd.grad(out, q, dout), (first,))


def test_second_derivative_raises(kernel, device):
    """[35] once_differentiable, not a silently missing term."""
    q, k, v, *_ = make(BY_NAME["full"], torch.float32, device)
    q.requires_grad_()
    for power in (1, 2):  # a dout that does not depend on q, and one that does
        loss = (kernel.flash_attn_func(q, k, v) ** power).sum()
        (grad,) = torch.autograd.grad(loss, q, create_graph=True)
        with pytest.raises(RuntimeError, match="once_differentiable"):
            (grad.sum() + q.sum()).backward()


def test_only_lse_in_the_loss(kernel, device):
    """[36] A loss of lse alone."""
    q, k, v, *_ = make(BY_NAME["gqa"], torch.float32, device)
    q, k, v = (t.requires_grad_() for t in (q, k, v))
    _, lse, _ = kernel.flash_attn_func(q, k, v, return_attn_probs=True)
    dlse = torch.randn_like(lse)
    got = torch.autograd.grad(lse, (q, k, v), dlse)
    zero = torch.zeros(*q.shape[:-1], v.shape[-1], device=device)
    want = attention_with_grads(q, k, v, zero, dlse)[2:]
    for a, b in zip(got, want):
        torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-5)


def test_float32_is_ieee(kernel, device):
    """No TF32, whatever torch's switch says: 1e-5 of float64 where TF32 would give 1e-3."""
    case = Case("ieee", 200, 200, head_dim=64, softmax_scale=1.0)
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = True
    try:
        inputs = make(case, torch.float32, device)
        results = run(kernel, *inputs)
    finally:
        torch.backends.cuda.matmul.allow_tf32 = before
    check(results, *inputs)


def test_cu_seqlens_past_the_end_stays_inside(kernel, device):
    """A cu_seqlens beyond the tensor reads and writes nothing outside it."""
    q, k, v, *_ = make(BY_NAME["varlen-full"], torch.float16, device)
    cu = cumulative((33, 64), device)
    want = kernel.flash_attn_varlen_func(q, k, v, cu, cumulative((90, 17), device), 1, 1)
    too_long = cumulative((33, 10_000), device)
    got = kernel.flash_attn_varlen_func(q, k, v, too_long, cumulative((90, 17), device), 1, 1)
    assert_all_equal((got,), (want,))

"""The Triton kernels without a GPU, through Triton's interpreter, on small tiles.

Not in bfloat16, whose products the interpreter computes wrongly (Triton 3.6 to 3.9).
"""

import math

import pytest
import torch
import triton
import triton.language as tl
from cases import BY_NAME, INTERPRETED, make
from checking import check, problem_of
from conftest import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled where there is a GPU")


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=("fp16", "fp32"))
@pytest.mark.parametrize("case", INTERPRETED, ids=[case.name for case in INTERPRETED])
def test_kernels(kernel, module, case, dtype):
    launch = module("flash_attention_kernel.launch")
    inputs = q, k, v, dout, dlse, options = make(case, dtype, "cpu")
    problem = problem_of(module, case, q, k, v, options)
    tile = launch.TileConfig(16, 16, 4, 1)
    out, lse = launch.forward(problem, tile)
    wanted = [t is not None and t.is_floating_point() for t in problem.differentiable()]
    wanted[0] = wanted[0] and problem.attn_bias.dtype != torch.uint8
    grads = launch.backward(problem, dout, dlse, out, lse, 1, wanted, tile, tile)
    check((out, lse, *grads), *inputs, kernel=kernel)
    if problem.dropout_p:
        longest = (case.seqlen_q, case.seqlen_k)
        if case.varlen:
            longest = (max(case.lens_q), max(case.lens_k))
        want = module("ops").probs(lse, *longest, *problem)
        got = launch.probabilities(problem, lse, *longest, tile)
        torch.testing.assert_close(got, want, rtol=2e-3, atol=1e-5)


def blocks_of(case, problem, block_m):
    """-> (head, where in q and lse the rows are, their block) of every block of query rows."""
    tiles = num_tiles(problem, block_m)
    for head in range(case.nheads):
        first = 0
        for seq, length in enumerate(case.lens_q or (case.seqlen_q,) * case.batch):
            used = length if problem.seqused_q is None else int(problem.seqused_q[seq])
            tile = first // block_m + seq if case.varlen else seq * -(-length // block_m)
            for start in range(0, used, block_m):
                rows = slice(start, min(start + block_m, used))
                at = (seq, rows) if not case.varlen else (slice(first + start, first + rows.stop),)
                yield head, at, head * tiles + tile + start // block_m
            first += length


def num_tiles(problem, block_m):
    """The blocks of one head, some of which are empty if sequences are packed."""
    batch, seqlen = problem.batch(), problem.q.shape[-3]
    if problem.cu_seqlens_q is None:
        return batch * -(-seqlen // block_m)
    return seqlen // block_m + batch + 1


@pytest.mark.parametrize("name", ("full", "varlen-gqa", "used-causal"))
@pytest.mark.parametrize("head_dim, head_dim_v", ((64, 64), (128, 128), (192, 128)))
def test_around_the_hopper_backward(module, name, head_dim, head_dim_v):
    """The rows' stats in the order in which its threads read them; dQ from that of its sums."""
    case = BY_NAME[name]._replace(head_dim=head_dim, head_dim_v=head_dim_v)
    launch, plans, hopper_calls = (
        module(f"flash_attention_kernel.{name}") for name in ("launch", "plans", "hopper_calls")
    )
    q, k, v, dout, _, options = make(case, torch.float16, "cpu")
    problem = problem_of(module, case, q, k, v, options)
    out, lse = launch.forward(problem, launch.TileConfig(16, 16, 4, 1))
    plan = hopper_calls.backward_plan(problem)
    tile = plan.tile
    stats, sums, turns = hopper_calls.workspace(problem, plan)
    if turns is not None:
        turns.fill_(7)
    block_m, delta = tile.block_m, torch.empty_like(lse)
    prepare = (out, dout, lse, None, delta, stats, sums, turns, tile)
    plans.run(hopper_calls.prepare_launch(problem, *prepare))

    block_d = 64 * (plan.sums // (plan.blocks * block_m * 64))
    stats, sums = stats.view(-1, 2, block_m), sums.view(-1, block_m * block_d)
    places = [16 * i + 8 * h + 2 * t + e for i in range(block_m // 16) for t in range(4)
              for h in (0, 1) for e in (0, 1)]  # fmt: skip
    flat = [(64 * piece + 16 * i + 8 * h + r, 8 * j + 2 * t + e)
            for piece in range(block_m // 64) for j in range(block_d // 8) for i in range(4)
            for r in range(8) for t in range(4) for h in (0, 1) for e in (0, 1)]  # fmt: skip
    flat = tuple(torch.tensor(flat).T)
    want_dq = torch.zeros_like(q)
    for head, at, block in blocks_of(case, problem, block_m):
        rows = (*at, head)
        row_lse = lse[(*rows[:-2], head, rows[-2])]
        want = (out[rows].double() * dout[rows].double()).sum(-1)
        want[row_lse == float("inf")] = 0.0
        got = torch.empty(2, block_m)
        got[:, places] = stats[block]
        number = len(want)
        torch.testing.assert_close(-got[1, :number].double(), want, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(got[0, :number], row_lse / math.log(2))
        assert (got[0, number:] == float("inf")).all() and not got[1, number:].any()
        torch.testing.assert_close(delta[(*rows[:-2], head, rows[-2])], -got[1, :number])
        assert not (sums if turns is None else turns)[block].any()
        if turns is not None and block % 3 == 2:  # nobody adds: not read
            sums[block] = float("nan")
            continue
        values = torch.randn(block_m, block_d)
        sums[block] = values[flat]
        if turns is not None:
            turns[block] = 1
        want_dq[rows] = (values[:number, :head_dim] * problem.softmax_scale).to(q.dtype)
    assert turns is None or not turns[plan.blocks :][: problem.batch() * k.shape[-2]].any()
    dq = torch.zeros_like(q)
    plans.run(hopper_calls.finish_launch(problem, sums.view(-1), turns, dq, tile))
    torch.testing.assert_close(dq, want_dq)


@pytest.mark.parametrize("name", ("full", "varlen-gqa"))
@pytest.mark.parametrize("head_dim", (64, 88, 192, 256))
@pytest.mark.parametrize("parts", (2, 8))
def test_sum_of_parts(module, name, head_dim, parts):
    """dK of the parts of each KV head, into a gradient with strides of its own."""
    hopper_calls, plans = (
        module(f"flash_attention_kernel.{name}") for name in ("hopper_calls", "plans")
    )
    case = BY_NAME[name]._replace(head_dim=head_dim, head_dim_v=head_dim)
    q, k, v, _, _, options = make(case, torch.float16, "cpu")
    problem = problem_of(module, case, q, k, v, options)
    partial, _ = hopper_calls.partial_grads(problem, parts)
    partial.normal_()
    _, dkv = problem.empty_grads(2)
    plans.run(hopper_calls.sum_parts_launch(dkv[1], partial))
    want = partial.double().unflatten(-2, (-1, parts)).sum(-2)
    torch.testing.assert_close(dkv[1], want.to(k.dtype))


@pytest.mark.parametrize("name", ("full", "varlen-gqa", "used-causal"))
def test_transposed_values(module, name):
    """float8's V: keys along the columns, in the order of a thread's elements; 0 past a sequence,
    as far as its last block."""
    hopper_calls, plans = (
        module(f"flash_attention_kernel.{name}") for name in ("hopper_calls", "plans")
    )
    case, block_n = BY_NAME[name], 128
    q, k, v, _, _, options = make(case, torch.float16, "cpu")
    eight = [t.to(torch.float8_e4m3fn) for t in (q, k, v)]
    problem = problem_of(module, case, *eight, options)
    values = hopper_calls.empty_values(problem)
    values.view(torch.int8).fill_(0x7F)
    plans.run(hopper_calls.values_launch(problem, values))
    got = values.float().unflatten(2, (-1, block_n // 16, 4, 2, 2))  # [..., t, b, e]
    got = got.transpose(-2, -3).flatten(3).flatten(2)  # [nheads_k, columns, keys]
    firsts = problem.cu_seqlens_k
    for seq, length in enumerate(case.lens_k or (case.seqlen_k,) * case.batch):
        used = length if problem.seqused_k is None else int(problem.seqused_k[seq])
        tile, rows = seq * -(-length // block_n), eight[2][seq] if firsts is None else None
        if firsts is not None:
            first = int(firsts[seq])
            tile, rows = first // block_n + seq, eight[2][first : first + length]
        end = -(-used // block_n) * block_n
        part = got[:, : v.shape[-1], tile * block_n : tile * block_n + end]
        assert torch.equal(part[..., :used], rows[:used].float().permute(1, 2, 0))
        assert not part[..., used:].any()


@triton.jit
def turns_kernel(
    begins, ends, turns, seqlen_q, seqlen_k, shift, mods, rows, cols,
    SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """q_block_range of every block of keys, and blocks_before of those and every block of rows."""
    for n in range(cols):
        begin, _, _, end = masks.q_block_range(  # noqa: F821
            n * BLOCK_N, seqlen_q, shift, mods, SPEC, BLOCK_M, BLOCK_N
        )
        tl.store(begins + n, begin)
        tl.store(ends + n, end)
        for m in range(rows):
            turn = masks.blocks_before(  # noqa: F821
                n * BLOCK_N, m * BLOCK_M, shift, seqlen_k, mods, SPEC, BLOCK_N
            )
            tl.store(turns + n * rows + m, turn)


MASKS = ({}, {"causal": True}, {"window_size": (40, 9)}, {"window_size": (70, -1)},
         {"window_size": (-1, 33)}, {"window_size": (25, 0)}, {"window_size": (2**31, 3)},
         {"causal": True, "causal_alignment": "top-left"})  # fmt: skip
LENGTHS = ((70, 100), (200, 64), (130, 130), (1, 90), (90, 1))


def dense_problem(module, lengths, options):
    """-> (an empty problem, which key lies on the diagonal at query 0)"""
    seqlen_q, seqlen_k = lengths
    q, k = (torch.empty(1, length, 1, 64, dtype=torch.float16) for length in lengths)
    p = module("problem").AttentionProblem.dense(q, k, k, module("options").Options(**options))
    return p, 0 if p.top_left else seqlen_k - seqlen_q


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_turns(module, monkeypatch, lengths, options):
    """Whoever adds to a block of dQ has a turn of its own, in the order of the keys, from 0 on."""
    masks, calls = (module(f"flash_attention_kernel.{name}") for name in ("masks", "calls"))
    monkeypatch.setitem(globals(), "masks", masks)
    seqlen_q, seqlen_k = lengths
    p, shift = dense_problem(module, lengths, options)
    rows, cols = -(-seqlen_q // 16), -(-seqlen_k // 32)
    begins, ends = torch.empty(2, cols, dtype=torch.int32)
    turns = torch.empty(cols, rows, dtype=torch.int32)
    turns_kernel[(1,)](
        begins, ends, turns, seqlen_q, seqlen_k, shift, calls.mods_of(p), rows, cols,
        calls.spec_of(p), 16, 32,
    )  # fmt: skip
    for m in range(rows):
        adds = [n for n in range(cols) if begins[n] <= m * 16 < ends[n]]
        assert turns[adds, m].tolist() == list(range(len(adds)))


@triton.jit
def masks_kernel(
    by_query, by_key, first, seqlen_k, shift, mods, SPEC: tl.constexpr, BLOCK: tl.constexpr
):
    """keep_mask, and keep_mask_by_key with positions counted from `first`, of the first pairs."""
    pos = tl.arange(0, BLOCK)
    q_pos, k_pos = pos[None, :], pos[:, None]
    offs = k_pos * BLOCK + q_pos
    keep = masks.keep_mask(q_pos, k_pos, shift, seqlen_k, mods, SPEC)  # noqa: F821
    tl.store(by_query + offs, keep)
    keep = masks.keep_mask_by_key(  # noqa: F821
        q_pos - first, k_pos - first, shift, seqlen_k - first, mods, SPEC
    )
    tl.store(by_key + offs, keep)


@pytest.mark.parametrize("options", MASKS, ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_masks_agree(module, monkeypatch, lengths, options):
    """A pair is hidden alike whether the bounds are each query's or each key's."""
    masks, calls = (module(f"flash_attention_kernel.{name}") for name in ("masks", "calls"))
    monkeypatch.setitem(globals(), "masks", masks)
    p, shift = dense_problem(module, lengths, options)
    by_query, by_key = torch.empty(2, 256, 256, dtype=torch.bool)
    args = (64, lengths[1], shift, calls.mods_of(p), calls.spec_of(p), 256)
    masks_kernel[(1,)](by_query, by_key, *args)
    assert torch.equal(by_query, by_key) and by_query.any()

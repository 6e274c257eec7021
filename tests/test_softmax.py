"""The inline PTX of hopper/'s forward, run on a CPU: its softmax beside one in float64, and the
columns of its masks."""

import numpy as np
import pytest
import torch
from ptx import execute

COUNT = 8  # elements of a thread: 2 rows by 4 of a block's 16 columns
BLOCKS = 7
SCORES = {  # [rows, columns] in log2 units, of blocks that are read from the first on
    "random": lambda rows, keys: 0.0 * keys,
    "rising": lambda rows, keys: 0.5 * keys,
    "steep": lambda rows, keys: 40.0 * (keys // 16),
    "steep-in-some": lambda rows, keys: torch.where(rows % 5 == 0, 40.0 * (keys // 16), 0.0 * keys),
    "beyond-float32": lambda rows, keys: torch.where(keys == 90, 500.0, -1000.0),
    "low": lambda rows, keys: torch.full_like(keys, -2000.0),
    "first-keys-hidden": lambda rows, keys: torch.where(keys < 7 * rows, -torch.inf, 0.0),
    "all-hidden": lambda rows, keys: torch.full_like(keys, -torch.inf),
}


def by_lane(block):
    """[16 rows, 16 columns] -> [COUNT][32]: rows lane // 4 and 8 on, two columns in turn."""
    tiles = block.view(2, 8, 2, 4, 2)  # row // 8, row % 8, column // 8, lane % 4, column % 2
    return list(tiles.permute(2, 0, 4, 1, 3).reshape(COUNT, 32).numpy())


def by_row(elements):
    """What `by_lane` takes apart."""
    tiles = torch.from_numpy(np.stack(elements)).view(2, 2, 2, 8, 4)
    return tiles.permute(1, 3, 0, 4, 2).reshape(16, 16)


def weigh(softmax, block, m, scale, exact, half):
    """One block -> weights [16, 16], each thread's sums, m and alpha [16, 4], labels"""
    scores, before = by_lane(block), by_lane(m.repeat_interleave(2, 1).repeat(1, 2))
    if half == "e4m3":
        return weigh_8(softmax, scores, before, scale)
    fill = [np.full(32, x, np.float32) for x in [scale] * COUNT + [np.inf if exact else 0] * COUNT]
    operands = [None] * (COUNT // 2 + 3 * COUNT) + scores + before + fill
    labels = execute(softmax.code_of_weights(COUNT, half), operands)
    packed = torch.from_numpy(np.stack(operands[: COUNT // 2])).view(torch.int32)[..., None]
    dtype = torch.bfloat16 if half == "bf16" else torch.float16
    weights = packed.view(dtype).permute(0, 2, 1).reshape(COUNT, 32).float().numpy()
    first = COUNT // 2
    results = [operands[first + i * COUNT : first + (i + 1) * COUNT] for i in range(3)]
    return by_row(list(weights)), *(by_row(r)[:, 0:8:2] for r in results), labels


def weigh_8(softmax, scores, before, scale):
    """`weigh` of float8's weights, which are 2^8 times as great; without labels."""
    first = COUNT // 4
    fill = [np.full(32, scale, np.float32)] * COUNT
    operands = [None] * (first + 3 * COUNT) + scores + before + fill
    execute(softmax.code_of_weights_8(COUNT), operands)
    packed = torch.from_numpy(np.stack(operands[:first])).view(torch.int32)[..., None]
    weights = packed.view(torch.float8_e4m3fn).float()  # [row, lane, (column // 8, column % 2)]
    weights = weights.view(2, 32, 2, 2).permute(2, 0, 3, 1).reshape(COUNT, 32).numpy()
    results = [operands[first + i * COUNT : first + (i + 1) * COUNT] for i in range(3)]
    return by_row(list(weights)), *(by_row(r)[:, 0:8:2] for r in results), ["RENEW"]


@pytest.mark.parametrize("half", ("bf16", "f16", "e4m3"))
@pytest.mark.parametrize("sink", (None, 3.0), ids=("", "sink"))
@pytest.mark.parametrize("kind", SCORES)
def test_blocks(module, kind, sink, half):
    """Block after block, as the kernel folds them: output, and logsumexp, of each row."""
    softmax = module("flash_attention_kernel.hopper.softmax")
    rows, keys = torch.arange(16.0)[:, None], torch.arange(16.0 * BLOCKS)[None].repeat(16, 1)
    scale = 0.25
    scores = (SCORES[kind](rows, keys) + torch.randn(keys.shape)) / scale
    values = torch.randn(keys.shape[1], 3)
    m = torch.full((16, 4), -torch.inf if sink is None else sink)
    gain = softmax.GAIN_8.value if half == "e4m3" else 1.0
    sums = torch.full((16, 4), 0.0 if sink is None else 0.25 * gain)
    out, renewed = torch.zeros(16, 3), []
    for i, block in enumerate(scores.split(16, 1)):
        exact = i < softmax.EXACT.value
        weights, added, m, alpha, labels = weigh(softmax, block.contiguous(), m, scale, exact, half)
        assert torch.isfinite(weights).all() and torch.isfinite(alpha).all()
        out = out * alpha[:, :1] + weights @ values[16 * i : 16 * i + 16]
        sums = sums * alpha + added
        renewed.append("RENEW" in labels or "DONE" not in labels)
    total, out = sums.double().sum(1) / gain, out / gain
    extra = torch.full((16, 1), -torch.inf if sink is None else sink).double()
    want = torch.cat([scores.double() * scale, extra], 1) * np.log(2)
    lse = torch.where(total > 0, (m[:, 0].double() + total.log2()) * np.log(2), -torch.inf)
    torch.testing.assert_close(lse, want.logsumexp(1), rtol=1e-6, atol=1e-6)
    got = out.double() / torch.where(total > 0, total, 1.0)[:, None]
    weights = want.softmax(1).nan_to_num()[:, :-1]
    rtol, atol = (1e-1, 6e-2) if half == "e4m3" else (2e-2, 1e-2)
    torch.testing.assert_close(got, weights @ values.double(), rtol=rtol, atol=atol)
    if kind == "random" and half != "e4m3":  # the branch is for a tile's first blocks
        assert renewed == [True, True] + [False] * (BLOCKS - 2)
    if kind == "steep":
        assert all(renewed)


def test_columns(module):
    """The column of each of a thread's elements, which lie as a product's, from its first on."""
    pipeline, count = module("flash_attention_kernel.hopper.pipeline"), COUNT // 2
    first = [None, np.full(32, 1000, np.int32).view(np.float32)]
    execute(pipeline.CODE_OF_FIRST.value, first)
    operands = [None] * count
    execute(pipeline.code_of_columns(count), operands)
    got = torch.from_numpy(np.stack([first[0]] + operands)).view(torch.int32)
    block = torch.arange(1000, 1016, dtype=torch.int32).repeat(16, 1)
    row_0_to_7 = torch.from_numpy(np.stack(by_lane(block))).view(2, 2, 2, 32)[:, 0]
    assert torch.equal(got[0] + got[1:], row_0_to_7.reshape(count, 32))

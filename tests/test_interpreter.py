"""The Triton kernels without a GPU, through Triton's interpreter, on small tiles.

Not in bfloat16, whose products the interpreter computes wrongly (Triton 3.6 to 3.9).
"""

import pytest
import torch
from cases import INTERPRETED, make
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

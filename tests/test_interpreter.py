"""The Triton kernels without a GPU, through Triton's interpreter, on small tiles.

Not in bfloat16, whose products the interpreter computes wrongly (Triton 3.6 to 3.9).
"""

import pytest
import torch
from cases import INTERPRETED, make
from checking import check
from conftest import HAS_GPU

pytestmark = pytest.mark.skipif(HAS_GPU, reason="the kernels are compiled where there is a GPU")


@pytest.mark.parametrize("dtype", (torch.float16, torch.float32), ids=("fp16", "fp32"))
@pytest.mark.parametrize("case", INTERPRETED, ids=[case.name for case in INTERPRETED])
def test_kernels(module, case, dtype):
    launch, problem_type = (
        module("flash_attention_kernel.launch"),
        module("problem").AttentionProblem,
    )
    q, k, v, dout, dlse, options = make(case, dtype, "cpu")
    make_problem = problem_type.varlen if case.varlen else problem_type.dense
    problem = make_problem(q, k, v, **options)
    tile = launch.TileConfig(16, 16, 4, 1)
    out, lse = launch.forward(problem, tile)
    grads = launch.backward(problem, dout, dlse, out, lse, tile, tile)
    check((out, lse, *grads), q, k, v, dout, dlse, options)

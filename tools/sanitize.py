"""Small calls of every kernel of hopper/, for compute-sanitizer to watch on a Hopper GPU.

    compute-sanitizer --tool memcheck --kernel-regex kns=hopper python tools/sanitize.py
    compute-sanitizer --tool synccheck --kernel-regex kns=hopper python tools/sanitize.py

`--warm N` compiles them before, in N processes: under the sanitizer that takes minutes.
"""

import argparse
import multiprocessing
from typing import NamedTuple, Tuple

import torch
from kernels import get_kernel


class Call(NamedTuple):
    """Attention of 4 query heads and 2 KV heads, forward and backward."""

    head_dim: int
    rows_q: int
    rows_k: int
    head_dim_v: int = 0  # 0: head_dim
    lens: Tuple[int, ...] = ()  # of packed sequences, of queries and keys
    page_size: int = 0  # forward alone
    options: dict = {}


CALLS = [
    Call(64, 300, 300),
    Call(64, 2100, 200),  # tiles of 192 rows
    Call(64, 8200, 300, options={"causal": True}),  # again
    Call(64, 300, 300, options={"causal": True, "deterministic": True}),
    Call(128, 200, 330),
    Call(128, 300, 300, options={"causal": True}),
    Call(128, 300, 300, options={"causal": True, "deterministic": True}),
    Call(128, 300, 400, options={"window_size": (40, 30)}),
    Call(128, 200, 200, options={"causal": True, "softcap": 20.0}),
    Call(128, 0, 0, lens=(130, 1, 0, 300), options={"causal": True}),
    Call(96, 0, 0, lens=(70, 200)),
    Call(128, 200, 512, page_size=128, options={"causal": True}),
    Call(192, 200, 300, head_dim_v=128, options={"causal": True}),
    Call(192, 200, 300),
    Call(256, 200, 300, options={"causal": True}),
    Call(256, 0, 0, lens=(100, 230)),
]


def run(call: Call):
    kernel = get_kernel("org/flash-attention", version=1)
    torch.manual_seed(0)

    def new(rows, heads, dim):
        shape = (sum(call.lens), heads, dim) if call.lens else (2, rows, heads, dim)
        return torch.randn(shape, device="cuda", dtype=torch.bfloat16, requires_grad=True)

    dim_v = call.head_dim_v or call.head_dim
    q = new(call.rows_q, 4, call.head_dim)
    k, v = new(call.rows_k, 2, call.head_dim), new(call.rows_k, 2, dim_v)
    if call.page_size:
        pages = 2 * call.rows_k // call.page_size
        shape = (pages, call.page_size, 2)
        k, v = k.detach().view(*shape, call.head_dim), v.detach().view(*shape, dim_v)
        table = torch.randperm(pages, device="cuda").int().view(2, -1)
        kernel.flash_attn_with_kvcache(
            q.detach(), k, v, cache_seqlens=call.rows_k - 5, block_table=table, **call.options
        )
        return
    if call.lens:
        starts = torch.tensor((0, *call.lens), device="cuda").cumsum(0, dtype=torch.int32)
        longest = max(call.lens)
        out = kernel.flash_attn_varlen_func(
            q, k, v, starts, starts, longest, longest, **call.options
        )
    else:
        out = kernel.flash_attn_func(q, k, v, **call.options)
    torch.autograd.grad(out, (q, k, v), torch.randn_like(out))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--warm", type=int, metavar="N", help="compile only, in N processes")
    args = parser.parse_args()
    if args.warm:
        with multiprocessing.get_context("spawn").Pool(args.warm) as pool:
            pool.map(run, CALLS, chunksize=1)
    for i, call in enumerate(CALLS if not args.warm else []):
        run(call)
        torch.cuda.synchronize()
        print("ran", i, call, flush=True)


if __name__ == "__main__":
    main()

"""GQA, MQA and packed sequences beside dense multi-head attention of equal work, in one run.

    python benchmarks/groups.py --csv FILE.csv

TFLOP/s of forward and backward, causal, 32 query heads: K and V of 32, 8 and 1 heads, 16,384 tokens
in sequences of the anchor lengths; and 64 packed sequences of lengths drawn from 16 to 4,096 beside
as many rows in dense sequences of one length, with the same work.
"""

import argparse
import csv
import os
from pathlib import Path

import torch
from peers import load_kernel
from run import environment, time_ms

HEADS = 32


def tensors(*shapes, dtype, device):
    return [torch.randn(s, dtype=dtype, device=device, requires_grad=True) for s in shapes]


def rates(fn, inputs, flops):
    """-> TFLOP/s forward and backward"""
    with torch.no_grad():
        forward = flops / time_ms(lambda: fn(*inputs), "cuda", 25, 100) / 1e9
    out = fn(*inputs)
    dout = torch.randn_like(out)
    backward = time_ms(
        lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True), "cuda", 25, 100
    )
    return round(forward, 1), round(2.5 * flops / backward / 1e9, 1)


def groups(kernel, dim, seqlen, dtype, device):
    """Rows of K and V in 32, 8 and 1 heads, 16,384 tokens."""
    batch = 16384 // seqlen
    flops = 2.0 * batch * HEADS * seqlen**2 * dim
    for heads_k in (HEADS, 8, 1):
        shapes = [(batch, seqlen, heads, dim) for heads in (HEADS, heads_k, heads_k)]
        inputs = tensors(*shapes, dtype=dtype, device=device)
        found = rates(lambda q, k, v: kernel.flash_attn_func(q, k, v, causal=True), inputs, flops)
        yield (f"{batch} x {seqlen:,}, {heads_k} KV heads", dim, str(dtype)[6:], *found)


def packed(kernel, dim, dtype, device):
    """Rows of 64 sequences, packed, and of as much work in dense ones."""
    lengths = torch.randint(16, 4097, (64,), generator=torch.Generator().manual_seed(0))
    work = int((lengths.double() ** 2).sum())
    cu_seqlens = torch.nn.functional.pad(lengths.cumsum(0), (1, 0)).int().to(device)
    longest, total = int(lengths.max()), int(lengths.sum())
    shape = (total, HEADS, dim)
    flops = 2.0 * HEADS * work * dim

    def varlen(q, k, v):
        lengths = (cu_seqlens, cu_seqlens, longest, longest)
        return kernel.flash_attn_varlen_func(q, k, v, *lengths, causal=True)

    inputs = tensors(shape, shape, shape, dtype=dtype, device=device)
    yield ("64 packed, 16 to 4,096", dim, str(dtype)[6:], *rates(varlen, inputs, flops))
    seqlen = work // total  # of dense sequences with these rows and this work
    batch = round(total / seqlen)
    shape, flops = (batch, seqlen, HEADS, dim), 2.0 * HEADS * batch * seqlen**2 * dim
    inputs = tensors(shape, shape, shape, dtype=dtype, device=device)
    found = rates(lambda q, k, v: kernel.flash_attn_func(q, k, v, causal=True), inputs, flops)
    yield (f"{batch} x {seqlen:,} dense", dim, str(dtype)[6:], *found)


def measured(kernel, device):
    """Every row, as soon as it is measured."""
    for dim in (128, 64):
        yield from packed(kernel, dim, torch.bfloat16, device)
        for seqlen in (4096, 16384, 1024):
            yield from groups(kernel, dim, seqlen, torch.bfloat16, device)
    yield from groups(kernel, 128, 4096, torch.float16, device)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--csv", type=Path, default=Path(os.devnull), help="write the rows here")
    args = parser.parse_args()
    device, kernel = torch.device("cuda"), load_kernel()
    where = environment(device)
    print(", ".join(f"{k} {v}" for k, v in where.items()))
    with args.csv.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow((*where, "batch x seqlen", "head_dim", "dtype", "forward", "backward"))
        for row in measured(kernel, device):
            print("%-26s %4d %-9s forward %6.1f backward %6.1f TFLOP/s" % row, flush=True)
            writer.writerow((*where.values(), *row))
            file.flush()


if __name__ == "__main__":
    main()

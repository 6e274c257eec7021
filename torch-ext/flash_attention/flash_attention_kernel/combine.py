"""Partial attention results merged by their lse: the end of split-KV, and flash_attn_combine."""

from typing import Any, NamedTuple

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from .softmax import merge_splits


class Partial(NamedTuple):
    """A [splits, batch, seqlen, heads(, head_dim)] tensor as a kernel argument: pointer, element
    strides; head_dim's is 1."""

    ptr: Any
    split: int
    batch: int
    seq: int
    head: int


@triton.jit
def row_of(operand, batch, row, head):
    """Pointer to one row of one head, of split 0; 64-bit."""
    offset = tl.cast(batch, tl.int64) * operand.batch + tl.cast(row, tl.int64) * operand.seq
    return operand.ptr + offset + tl.cast(head, tl.int64) * operand.head


@triton.jit(do_not_specialize=("rows", "nheads", "num_splits"))
def combine_kernel(
    out_partial, lse_partial, out, lse, rows, nheads, num_splits,
    DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK_S: tl.constexpr, NO_KEYS: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid: (batch * rows * nheads,), a row each. All operands are Partials, out and lse of one
    split. BLOCK_S splits are read at once; NO_KEYS: the lse of a row without keys; PDL: launched
    before the parts are there."""
    if PDL:
        gdc_wait()
    row = tl.program_id(0) // nheads
    head = tl.program_id(0) % nheads
    batch = row // rows
    row = row % rows
    acc, lse_row = merge_splits(
        row_of(out_partial, batch, row, head), out_partial.split,
        row_of(lse_partial, batch, row, head), lse_partial.split,
        num_splits, DIM, BLOCK_D, BLOCK_S,
    )  # fmt: skip
    offs_d = tl.arange(0, BLOCK_D)
    out_ptrs = row_of(out, batch, row, head) + offs_d
    tl.store(out_ptrs, acc.to(out.ptr.dtype.element_ty), mask=offs_d < DIM)
    lse_row = tl.where(lse_row == float("-inf"), NO_KEYS, lse_row)
    tl.store(row_of(lse, batch, row, head), lse_row)

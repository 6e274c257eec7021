"""What every kernel shares: operands, the compile-time SPEC, constants, and tile load and store."""

from dataclasses import dataclass
from typing import Any, NamedTuple

import triton
import triton.language as tl

LOG2E: tl.constexpr = tl.constexpr(1.4426950408889634)  # log2(e): natural logits -> log2 units
LN2: tl.constexpr = tl.constexpr(0.6931471805599453)  # log(2): log2 units -> natural

TAIL_D: tl.constexpr = tl.constexpr(
    64
)  # decoding: columns of q and k past BLOCK_D, latent attention

# Arguments that change from call to call: a kernel compiled for one value serves all. Not rows_q:
# where 16 divides it, lse and delta load in pairs, without which dkdv_kernel spills.
UNSPECIALIZED = (
    "cu_seqlens_q", "cu_seqlens_k", "seqused_q", "seqused_k", "leftpad_k",
    "rows_k", "batch", "num_tiles", "columns", "entries",
)  # fmt: skip


@dataclass(frozen=True)
class Spec:
    """What a kernel is compiled for, passed as one `tl.constexpr`.

    Plain fields only: Triton's disk cache keys a kernel by this object's repr, so the code of a
    property would not be part of the key.
    """

    head_dim: int
    head_dim_v: int
    causal: bool  # no key beyond the diagonal
    left: bool  # Mods.window_left counts
    right: bool  # Mods.window_right counts
    top_left: bool  # the diagonal begins at key 0, whatever the lengths
    softcap: bool
    dropout: bool
    precise: bool  # float32 inputs
    fast_tanh: bool  # softcap by an NVIDIA GPU's approximate tanh
    defer_scale: bool  # forward: scale inside the exponent, which needs a scale > 0
    page_size: int = 0  # rows of K and V in a page of the cache; 0: not paged
    gathers: bool = False  # paged: a tile's rows may lie in several pages


class Operand(NamedTuple):
    """A [batch, seqlen, heads, head_dim] tensor as a kernel argument: pointer, element strides.

    Packed (varlen) tensors have batch stride 0; a sequence is found by its first row instead.
    """

    ptr: Any
    batch: int
    seq: int
    head: int
    dim: int


class RowOperand(NamedTuple):
    """A contiguous float32 [batch, heads, seqlen] tensor (lse, delta): pointer, element strides."""

    ptr: Any
    batch: int
    head: int


class Queries(NamedTuple):
    """Inside dkdv_kernel: what belongs to the query rows of one head."""

    q: Any  # Operand
    dout: Any
    lse: Any  # RowOperand
    delta: Any


class Mods(NamedTuple):
    """Run-time values that change the scores; pointers are None where there is no such tensor."""

    scale_log2: float  # softmax_scale * log2(e)
    softcap_log2: float = 0.0  # softcap * log2(e)
    tanh_log2: float = 0.0  # 2 * log2(e) * softmax_scale / softcap
    window_left: int = 0
    window_right: int = 0
    drop_below: int = 0  # dropout keeps random int32s from this on
    keep_scale: float = 1.0  # 1 / (1 - dropout_p)
    seed_ptr: Any = None
    alibi_ptr: Any = None  # [batch or 1, heads] float32
    alibi_batch: int = 0
    sink_ptr: Any = None  # [heads]
    bias_ptr: Any = None  # [batch, heads, rows, cols], stride 0 where it is broadcast
    bias_batch: int = 0
    bias_head: int = 0
    bias_row: int = 0
    bias_col: int = 0
    bias_rows: int = 0  # reads end here
    bias_cols: int = 0


class HeadMods(NamedTuple):
    """Inside a kernel: what of Mods one head of one sequence needs; 0 where there is no such thing,
    as a jit function of Triton 3.6 cannot return None."""

    bias_ptr: Any
    slope_log2: Any  # ALiBi's slope * log2(e)
    seed: Any
    batch: Any
    head: Any
    shift: Any  # which key lies on the diagonal at query 0


@triton.jit
def at_head(operand, batch, head, first_row):
    """The operand moved to row `first_row` of one head; 64-bit, as offsets may pass 2^31."""
    ptr = (
        operand.ptr
        + tl.cast(batch, tl.int64) * operand.batch
        + tl.cast(head, tl.int64) * operand.head
        + tl.cast(first_row, tl.int64) * operand.seq
    )
    return Operand(ptr, operand.batch, operand.seq, operand.head, operand.dim)


@triton.jit
def tile_ptrs(operand, start, ROWS: tl.constexpr, COLS: tl.constexpr):
    """[ROWS, COLS] pointers from row `start` on; 64-bit, as one row stride may pass 2^24."""
    offs_row = tl.arange(0, ROWS).to(tl.int64)
    offs_d = tl.arange(0, COLS)
    ptr = operand.ptr + tl.cast(start, tl.int64) * operand.seq
    return ptr + offs_row[:, None] * operand.seq + offs_d[None, :] * operand.dim


@triton.jit
def tile_mask(
    start, rows, ROWS: tl.constexpr, COLS: tl.constexpr, MASK_ROWS: tl.constexpr, DIM: tl.constexpr
):
    """Bool, broadcast to [ROWS, COLS]: rows below `rows` if MASK_ROWS, columns below DIM."""
    in_dims = (tl.arange(0, COLS) < DIM)[None, :]
    if MASK_ROWS:
        in_rows = (start + tl.arange(0, ROWS) < rows)[:, None]
        if DIM < COLS:
            return in_rows & in_dims
        else:
            return in_rows
    else:
        return in_dims


@triton.jit
def load_tile(
    operand, start, rows,
    ROWS: tl.constexpr, COLS: tl.constexpr, MASK_ROWS: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """[ROWS, COLS] from row `start` on. What lies past `rows` or DIM is never read and gives 0."""
    ptrs = tile_ptrs(operand, start, ROWS, COLS)
    if MASK_ROWS or DIM < COLS:
        mask = tile_mask(start, rows, ROWS, COLS, MASK_ROWS, DIM)
        return tl.load(ptrs, mask=mask, other=0.0)
    else:
        return tl.load(ptrs)


@triton.jit
def store_tile(
    operand, start, rows, tile, ROWS: tl.constexpr, COLS: tl.constexpr, DIM: tl.constexpr
):
    """Store [ROWS, COLS] in the operand's dtype; what lies past `rows` or DIM is not written."""
    mask = tile_mask(start, rows, ROWS, COLS, True, DIM)
    tl.store(tile_ptrs(operand, start, ROWS, COLS), tile.to(operand.ptr.dtype.element_ty), mask)


@triton.jit
def row_operand(ptr, nheads, lengths):
    """A RowOperand for the rows that `lengths` describes; packed, it is [heads, total]."""
    head_stride = tl.cast(lengths.rows, tl.int64)
    batch_stride = head_stride * nheads
    if lengths.cu_seqlens is not None:
        batch_stride = tl.cast(0, tl.int64)
    return RowOperand(ptr, batch_stride, head_stride)


@triton.jit
def row_at_head(operand, batch, head, first_row):
    """A RowOperand moved to entry `first_row` of one head."""
    offset = tl.cast(batch, tl.int64) * operand.batch + tl.cast(head, tl.int64) * operand.head
    return RowOperand(operand.ptr + offset + first_row, operand.batch, operand.head)


@triton.jit
def load_row(operand, start, rows, other, ROWS: tl.constexpr, MASK_ROWS: tl.constexpr):
    """[ROWS] from entry `start` on; `other` past `rows`.

    `start` moves the pointer, not the offsets: those stay constants that fold into the load, where
    a 64-bit address per element cost dkdv_kernel 30 registers.
    """
    offs = tl.arange(0, ROWS)
    ptrs = operand.ptr + start + offs
    if MASK_ROWS:
        return tl.load(ptrs, mask=offs < rows - start, other=other)
    else:
        return tl.load(ptrs)


@triton.jit
def store_row(operand, start, rows, values, ROWS: tl.constexpr):
    """Store [ROWS] from entry `start` on; nothing past `rows`."""
    offs = tl.arange(0, ROWS)
    tl.store(operand.ptr + start + offs, values, mask=offs < rows - start)

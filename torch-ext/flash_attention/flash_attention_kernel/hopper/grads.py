"""The end of a work of the backward: its keys' rows of dK and dV."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared

from .compat import async_store
from .pipeline import ROWS, at_head_late, row_layout


class Grads(NamedTuple):
    """Where dK and dV go: Operands, and their descriptors or None."""

    dk: Any
    dv: Any
    dk_tiles: Any
    dv_tiles: Any


@gluon.jit
def store_grad(out, tiles, tile, values, keys, WHICH: gl.constexpr, DIM: gl.constexpr):
    """Write a gradient's rows of this consumer's keys: float32, a part of it, as the products lie;
    else by way of `tile`, and from there by the copy engine, or, if `tiles` is None, by `store`."""
    if out.ptr.dtype.element_ty == gl.float32:
        store(out, values, keys, WHICH, DIM)
        return
    rows = tile.reshape(values.shape)
    rows.store(values.to(tile.dtype))
    if tiles is None:
        store(out, rows.load(row_layout(values.shape[1])), keys, WHICH, DIM)
    fence_async_shared()
    if tiles is not None:
        async_store(tiles, [keys[0], keys[2] + WHICH * ROWS, keys[1], 0], tile)


@gluon.jit
def store(out, values, keys, WHICH: gl.constexpr, DIM: gl.constexpr):
    """Write a gradient's rows of this consumer's keys, DIM columns."""
    seq, head_k, start_n, k_first, seqlen_k = keys
    LAYOUT: gl.constexpr = values.type.layout
    ptr, stride = at_head_late(out, seq, head_k, k_first, DIM)
    rows = start_n + WHICH * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    cols = gl.arange(0, values.shape[1], layout=gl.SliceLayout(0, LAYOUT))
    ptrs = ptr + rows.to(gl.int64)[:, None] * stride + cols[None, :]
    mask = (rows < seqlen_k)[:, None] & (cols < DIM)[None, :]
    gl.store(ptrs, values.to(ptr.dtype.element_ty), mask=mask)

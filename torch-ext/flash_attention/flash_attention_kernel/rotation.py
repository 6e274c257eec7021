"""Rotary embedding's math (Su et al. 2021): angles, and rows turned by them."""

import triton
import triton.language as tl


@triton.jit
def load_angles(table, pos, rows, identity, HALF: tl.constexpr, DIM: tl.constexpr):
    """[BLOCK_M, HALF] of cos or sin [rows, DIM] at positions [BLOCK_M]; `identity` where the table
    ends."""
    offs = tl.arange(0, HALF)
    inside = ((pos >= 0) & (pos < rows))[:, None] & (offs < DIM)[None, :]
    ptrs = table + pos.to(tl.int64)[:, None] * DIM + offs[None, :]
    return tl.load(ptrs, mask=inside, other=identity).to(tl.float32)


@triton.jit
def turn_rows(
    x_rows, x_dim, out_rows, out_dim, inside, cos, sin, pos, table_rows,
    ROTARY_DIM: tl.constexpr, INTERLEAVED: tl.constexpr, CONJUGATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):  # fmt: skip
    """The first ROTARY_DIM columns of the rows at pointers x_rows [BLOCK_M], whose columns are
    x_dim apart, turned by the angles of their positions `pos`, into those at out_rows."""
    HALF: tl.constexpr = BLOCK_D // 2
    DIM: tl.constexpr = ROTARY_DIM // 2
    c = load_angles(cos, pos, table_rows, 1.0, HALF, DIM)
    s = load_angles(sin, pos, table_rows, 0.0, HALF, DIM)
    if CONJUGATE:
        s = -s
    dtype = out_rows.dtype.element_ty
    if INTERLEAVED:  # pairs (2i, 2i + 1)
        offs = tl.arange(0, BLOCK_D)[None, :]
        mask = inside[:, None] & (offs < ROTARY_DIM)
        tile = tl.load(x_rows[:, None] + offs * x_dim, mask=mask, other=0.0).to(tl.float32)
        x0, x1 = tl.split(tl.reshape(tile, [tile.shape[0], HALF, 2]))
        turned = tl.join(x0 * c - x1 * s, x0 * s + x1 * c)
        turned = tl.reshape(turned, [tile.shape[0], BLOCK_D]).to(dtype)
        tl.store(out_rows[:, None] + offs * out_dim, turned, mask=mask)
    else:  # pairs (i, i + ROTARY_DIM / 2)
        offs = tl.arange(0, HALF)[None, :]
        mask = inside[:, None] & (offs < DIM)
        x0 = tl.load(x_rows[:, None] + offs * x_dim, mask=mask, other=0.0).to(tl.float32)
        x1 = tl.load(x_rows[:, None] + (offs + DIM) * x_dim, mask=mask, other=0.0).to(tl.float32)
        ptrs = out_rows[:, None] + offs * out_dim
        tl.store(ptrs, (x0 * c - x1 * s).to(dtype), mask=mask)
        tl.store(ptrs + DIM * out_dim, (x0 * s + x1 * c).to(dtype), mask=mask)

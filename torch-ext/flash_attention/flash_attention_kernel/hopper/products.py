"""The forward's matrix products, of tiles whose columns lie in one ring or, past a power of two, in
two: 192 are 128 and 64."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import warpgroup_mma, warpgroup_mma_wait

from .pipeline import ROWS, inner_product, product_layout, scrub, spares_quarter
from .softmax import scaled


class Rings(NamedTuple):
    """What passes between the warps."""

    q: Any
    k: Any
    q_more: Any  # columns past BLOCK_D, V's past BLOCK_DV, by the barriers of q, k and v; or None
    k_more: Any
    v: Any
    v_more: Any
    notes: Any


@gluon.constexpr_function
def groups_of_products(split, HEAD_DIM, BLOCK_D):
    """How many groups of products `products` has under way."""
    return 2 if split or spares_quarter(HEAD_DIM, BLOCK_D) else 1


@gluon.jit
def products(
    q_count, k_count, rings, SPEC: gl.constexpr, BLOCK_N: gl.constexpr, BLOCK_D: gl.constexpr
):
    """QKᵀ of two tiles, [ROWS, BLOCK_N], under way: one group of products, or two."""
    LAYOUT: gl.constexpr = product_layout(BLOCK_N, rings.q.tiles.dtype)
    zeros = gl.zeros([ROWS, BLOCK_N], gl.float32, LAYOUT)
    q_tile, k_tile = rings.q.tile(q_count, ROWS, BLOCK_D), rings.k.tile(k_count, BLOCK_N, BLOCK_D)
    qk = inner_product(q_tile, k_tile, zeros, SPEC.head_dim, BLOCK_D)
    if rings.k_more is not None:
        MORE: gl.constexpr = rings.k_more.shape[4]
        q_tile = rings.q_more.index(q_count % rings.q.STAGES).reshape([ROWS, MORE])
        k_tile = rings.k_more.index(k_count % rings.k.STAGES).reshape([BLOCK_N, MORE])
        qk = warpgroup_mma(q_tile, k_tile.permute((1, 0)), qk, is_async=True)
    return qk


@gluon.jit
def zero_output(rings, BLOCK_DV: gl.constexpr):
    """The output before the first key: in one part, or two, if V's columns lie in two."""
    DTYPE: gl.constexpr = rings.q.tiles.dtype
    acc = (gl.zeros([ROWS, BLOCK_DV], gl.float32, product_layout(BLOCK_DV, DTYPE)),)
    if rings.v_more is not None:
        MORE: gl.constexpr = rings.v_more.shape[4]
        acc = (acc[0], gl.zeros([ROWS, MORE], gl.float32, product_layout(MORE)))
    return acc


@gluon.jit
def factor_8(weights, LAYOUT: gl.constexpr):
    """e4m3 weights [ROWS, BLOCK_N], as weigh_8 packs them, as a left factor. Its columns are keys
    in the order of a thread's elements: of every 16, column 4 t + 2 b + e is key 8 b + 2 t + e, as
    transpose_values_kernel has V's."""
    BLOCK_N: gl.constexpr = weights.shape[1]
    x = weights.reshape([4, 2, 8, BLOCK_N // 32, 2, 2, 4, 2]).permute((0, 5, 2, 3, 4, 6, 1, 7))
    x = x.reshape([ROWS, BLOCK_N])
    return gl.convert_layout(x, gl.DotOperandLayout(0, LAYOUT, 4), assert_trivial=True)


@gluon.jit
def add_values(acc, weights, count, rings, BLOCK_N: gl.constexpr):
    """acc + weights V of tile number `count`, for which it waits; under way: one product a part."""
    part = acc[0]
    if weights.dtype == gl.float8e4nv:
        LAYOUT: gl.constexpr = part.type.layout
        v_tile = rings.v.receive(count, part.shape[1], BLOCK_N).permute((1, 0))
        return (warpgroup_mma(factor_8(weights, LAYOUT), v_tile, part, is_async=True),)
    else:
        v_tile = rings.v.receive(count, BLOCK_N, part.shape[1])
        left = gl.convert_layout(weights, gl.DotOperandLayout(0, part.type.layout, 2))
        first = warpgroup_mma(left, v_tile, part, is_async=True)
        if len(acc) == 2:
            more = acc[1]
            v_tile = rings.v_more.index(count % rings.v.STAGES).reshape([BLOCK_N, more.shape[1]])
            left = gl.convert_layout(weights, gl.DotOperandLayout(0, more.type.layout, 2))
            return first, warpgroup_mma(left, v_tile, more, is_async=True)
        else:
            return (first,)


@gluon.jit
def awaited(acc, LATER: gl.constexpr):
    """acc, when no more than LATER groups of products are under way."""
    if len(acc) == 2:
        return warpgroup_mma_wait(LATER, deps=[acc[0], acc[1]])
    else:
        return (warpgroup_mma_wait(LATER, deps=[acc[0]]),)


@gluon.jit
def rescaled(acc, factor):
    """acc with each row times its factor."""
    part = acc[0]
    first = part * gl.convert_layout(factor, gl.SliceLayout(1, part.type.layout))[:, None]
    if len(acc) == 2:
        more = acc[1]
        rows = gl.convert_layout(factor, gl.SliceLayout(1, more.type.layout))
        return first, more * rows[:, None]
    else:
        return (first,)


@gluon.jit
def rescaled_if_new(acc, alpha):
    """acc with each row times its alpha [ROWS, 4], where a warp has one that is not 1."""
    if len(acc) == 2:
        return scaled(acc[0], alpha), scaled(acc[1], alpha)
    else:
        return (scaled(acc[0], alpha),)


@gluon.jit
def clean(rings, count, tile, BLOCK_N: gl.constexpr, BLOCK_DV: gl.constexpr):
    """Scrub V's first block, which alone may have rows of another sequence."""
    rows = tile.seqlen_k - tile.last_n
    if rows < BLOCK_N:
        scrub(rings.v.receive(count, BLOCK_N, BLOCK_DV), rows, BLOCK_N, BLOCK_DV)
        if rings.v_more is not None:
            MORE: gl.constexpr = rings.v_more.shape[4]
            v_tile = rings.v_more.index(count % rings.v.STAGES).reshape([BLOCK_N, MORE])
            scrub(v_tile, rows, BLOCK_N, MORE)

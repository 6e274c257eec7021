"""V as float8's products want it, for the forward: wgmma takes eight-bit factors by their columns
alone."""

import triton
import triton.language as tl

from ..common import at_head, load_tile
from ..seqlen import Lengths, find_block, sequence_bounds


@triton.jit(do_not_specialize=("rows", "batch", "num_tiles"))
def transpose_values_kernel(
    v, vt, cu_seqlens, seqused, leftpad, rows, batch, num_tiles,
    BLOCK_N: tl.constexpr, BLOCK_DV: tl.constexpr, DIM: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tiles * nheads_k,) over blocks of BLOCK_N keys. Writes vt [nheads_k, BLOCK_DV,
    num_tiles * BLOCK_N]: of tile number `tile` of `find_block` the transpose from column
    tile * BLOCK_N on, 0 for keys and columns that do not exist. Of every 16 keys, number
    8 b + 2 t + e is column 4 t + 2 b + e: see `factor_8` in products.py.

    v is an Operand of bytes, as is vt, a pointer.
    """
    lengths = Lengths(cu_seqlens, seqused, leftpad, rows, batch)
    head = tl.program_id(0) // num_tiles
    tile = tl.program_id(0) % num_tiles
    seq, block = find_block(tile, lengths, BLOCK_N)
    k_first, seqlen = sequence_bounds(lengths, seq)
    start_n = block * BLOCK_N
    if start_n < 0 or start_n >= seqlen:
        return
    values = load_tile(
        at_head(v, seq, head, k_first), start_n, seqlen, BLOCK_N, BLOCK_DV, True, DIM
    )
    values = tl.reshape(values, [BLOCK_N // 16, 2, 4, 2, BLOCK_DV])
    values = tl.reshape(tl.permute(values, (0, 2, 1, 3, 4)), [BLOCK_N, BLOCK_DV])
    cols = tl.arange(0, BLOCK_DV)
    to = tl.cast(head, tl.int64) * BLOCK_DV + cols
    places = tl.cast(tile, tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    width = tl.cast(num_tiles, tl.int64) * BLOCK_N
    tl.store(vt + to[:, None] * width + places[None, :], tl.trans(values))

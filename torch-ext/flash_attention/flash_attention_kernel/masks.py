"""Which keys a query sees: tile ranges, split into runs that need a mask and runs that do not."""

import triton
import triton.language as tl


@triton.jit
def keep_mask(q_pos, k_pos, seqlen_q, seqlen_k, SPEC: tl.constexpr):
    """Which (query, key) pairs take part. Positions come broadcast, in whatever order suits."""
    keep = k_pos < seqlen_k
    if SPEC.causal:
        keep = keep & (k_pos <= q_pos + (seqlen_k - seqlen_q))  # aligned bottom right
    return keep


@triton.jit
def kv_block_range(
    start_m, seqlen_q, seqlen_k, SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """-> (full_end, end): query rows from start_m see all keys < full_end; from `end` on, none.

    full_end is a multiple of BLOCK_N; the keys between the two need keep_mask.
    """
    end = seqlen_k
    full_end = seqlen_k
    if SPEC.causal:
        diagonal = start_m + seqlen_k - seqlen_q  # last key the first row sees
        end = tl.maximum(tl.minimum(end, diagonal + BLOCK_M), 0)
        full_end = tl.maximum(tl.minimum(full_end, diagonal + 1), 0)
    return full_end // BLOCK_N * BLOCK_N, end


@triton.jit
def q_block_range(
    start_n, seqlen_q, seqlen_k, SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """-> (begin, full_begin, full_end): rows before `begin` see none of the keys from start_n;
    rows in [full_begin, full_end) see all of them; those between, and from full_end on, need
    keep_mask. All three are multiples of BLOCK_M, begin <= full_begin <= full_end.
    """
    begin = 0
    full_begin = 0
    full_end = seqlen_q // BLOCK_M * BLOCK_M
    if SPEC.causal:
        first_row = tl.maximum(start_n - (seqlen_k - seqlen_q), 0)  # sees key start_n
        last_row = tl.maximum(start_n + BLOCK_N - 1 - (seqlen_k - seqlen_q), 0)  # sees them all
        begin = tl.minimum(first_row // BLOCK_M * BLOCK_M, full_end)
        full_begin = tl.minimum(tl.cdiv(last_row, BLOCK_M) * BLOCK_M, full_end)
    return begin, full_begin, full_end

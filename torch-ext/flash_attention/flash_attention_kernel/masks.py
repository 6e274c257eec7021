"""Which keys a query sees: tile ranges, split into runs that need a mask and runs that do not.

Query i sees key j if i + shift - window_left <= j <= i + shift + window_right, each side where the
SPEC bounds it (`causal`: the right one, by 0). The shift aligns the mask's corner: bottom right,
seqlen_k - seqlen_q; top left, 0.
"""

import triton
import triton.language as tl


@triton.jit
def diagonal_shift(seqlen_q, seqlen_k, SPEC: tl.constexpr):
    """Which key lies on the diagonal at query 0."""
    if SPEC.top_left:
        return 0
    else:
        return seqlen_k - seqlen_q


@triton.jit
def right_reach(mods, SPEC: tl.constexpr):
    """How many keys beyond the diagonal a query sees, where SPEC bounds them."""
    if SPEC.causal:
        return 0
    else:
        return mods.window_right


@triton.jit
def keep_mask(
    q_pos, k_pos, shift, seqlen_k, mods, SPEC: tl.constexpr, JOINED: tl.constexpr = False
):
    """Which (query, key) pairs take part. Positions come broadcast, in whatever order suits.

    JOINED: a row's bounds on the right are made one: a comparison fewer for each pair, two
    registers more for each row. In hopper/forward.py that saves 128 bytes of spills at D 64; in
    forward.py it adds 8 at D 128.
    """
    if JOINED:
        last = seqlen_k - 1
        if SPEC.causal or SPEC.right:
            last = tl.minimum(q_pos + (shift + right_reach(mods, SPEC)), last)
        keep = k_pos <= last
    else:
        keep = k_pos < seqlen_k
        if SPEC.causal or SPEC.right:
            keep = keep & (k_pos <= q_pos + (shift + right_reach(mods, SPEC)))
    if SPEC.left:
        keep = keep & (k_pos >= q_pos + (shift - mods.window_left))
    return keep


@triton.jit
def keep_mask_by_key(q_pos, k_pos, shift, seqlen_k, mods, SPEC: tl.constexpr):
    """`keep_mask` with the bounds computed of each key: for threads with fewer keys than queries.
    Positions and seqlen_k may all be counted from some other number than 0."""
    first = -(1 << 30)
    if SPEC.causal or SPEC.right:
        first = k_pos - (shift + right_reach(mods, SPEC))
    keep = q_pos >= tl.where(k_pos < seqlen_k, first, 1 << 30)
    if SPEC.left:
        keep = keep & (q_pos <= k_pos + (mods.window_left - shift))
    return keep


@triton.jit
def kv_block_range(start_m, rows, shift, seqlen_k, mods, SPEC: tl.constexpr, BLOCK_N: tl.constexpr):
    """-> (begin, full_begin, full_end, end): the `rows` query rows from start_m see all keys in
    [full_begin, full_end) and none outside [begin, end); those between need keep_mask.

    All but `end` are multiples of BLOCK_N.
    """
    begin = 0
    full_begin = 0
    full_end = seqlen_k
    end = seqlen_k
    if SPEC.causal or SPEC.right:
        last = start_m + shift + right_reach(mods, SPEC)  # that the first row sees
        end = tl.maximum(tl.minimum(end, last + rows), 0)
        full_end = tl.maximum(tl.minimum(full_end, last + 1), 0)
    full_end = full_end // BLOCK_N * BLOCK_N
    if SPEC.left:
        first = tl.maximum(start_m + shift - mods.window_left, 0)  # that the first row sees
        last_first = tl.maximum(start_m + rows - 1 + shift - mods.window_left, 0)
        begin = first // BLOCK_N * BLOCK_N
        full_end = tl.maximum(full_end, begin)
        full_begin = tl.minimum(tl.cdiv(last_first, BLOCK_N) * BLOCK_N, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def masked_steps(begin, gap_begin, gap_end, end, MASKED: tl.constexpr, SPEC: tl.constexpr):
    """-> (first, last, gap): the steps of a loop over [begin, gap_begin) and [gap_end, end), if
    MASKED; else over [begin, end). `start_of_step` finds a step's keys."""
    gap = 0
    if MASKED:
        if SPEC.left:
            gap = gap_end - gap_begin
        else:  # nothing before the gap
            begin = gap_end
    return begin, end - gap, gap


@triton.jit
def start_of_step(step, gap_begin, gap, MASKED: tl.constexpr, SPEC: tl.constexpr):
    """The first key of a step of `masked_steps`."""
    if MASKED and SPEC.left:
        return tl.where(step < gap_begin, step, step + gap)
    else:
        return step


@triton.jit
def q_block_range(
    start_n, seqlen_q, shift, mods, SPEC: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr
):
    """-> (begin, full_begin, full_end, end): the rows in [full_begin, full_end) see all of the keys
    from start_n, those outside [begin, end) none; those between need keep_mask.

    All but `end` are multiples of BLOCK_M.
    """
    begin = 0
    full_begin = 0
    end = seqlen_q
    full_end = seqlen_q // BLOCK_M * BLOCK_M
    if SPEC.left:
        last_row = start_n + mods.window_left - shift  # that sees key start_n
        end = tl.maximum(tl.minimum(end, last_row + BLOCK_N), 0)
        full_end = tl.minimum(full_end, tl.maximum(last_row + 1, 0) // BLOCK_M * BLOCK_M)
    if SPEC.causal or SPEC.right:
        diagonal = start_n - shift - right_reach(mods, SPEC)
        first_row = tl.maximum(diagonal, 0)  # sees key start_n
        first_full = tl.maximum(diagonal + BLOCK_N - 1, 0)  # sees them all
        if SPEC.left:
            begin = tl.minimum(first_row, end) // BLOCK_M * BLOCK_M
            full_end = tl.maximum(full_end, begin)
        else:
            begin = tl.minimum(first_row // BLOCK_M * BLOCK_M, full_end)
        full_begin = tl.minimum(tl.cdiv(first_full, BLOCK_M) * BLOCK_M, full_end)
    return begin, full_begin, full_end, end


@triton.jit
def blocks_before(
    start_n, start_m, shift, seqlen_k, mods, SPEC: tl.constexpr, BLOCK_N: tl.constexpr
):
    """How many of the blocks of keys before that from start_n have the rows from start_m in their
    q_block_range, where it has them in its own: all, but for those to the left of the window."""
    first = 0
    if SPEC.left:
        first, _, _, _ = kv_block_range(start_m, 1, shift, seqlen_k, mods, SPEC, BLOCK_N)
    return (start_n - first) // BLOCK_N

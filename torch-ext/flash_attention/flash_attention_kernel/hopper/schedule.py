"""Which tiles of queries there are, and in which order programs take them."""

from typing import Any, NamedTuple

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..masks import diagonal_shift, kv_block_range, q_block_range
from ..seqlen import find_block, first_tile, partner_bounds, sequence_bounds
from .pipeline import opaque_zero

# Integers for whose being 1, or a multiple of 16, Triton is not to compile a kernel once more.
UNSPECIALIZED = (
    "rows_q", "rows_k", "batch", "nheads", "nheads_k", "per_head", "heads", "total", "head_group",
    "tiles_q", "columns", "entries",
)  # fmt: skip


class Schedule(NamedTuple):
    """The tiles, longest first, of `group` heads after those of the `group` before."""

    per_head: int  # tiles of one head: of one sequence, or, packed, of all
    heads: int  # times sequences, where these are not packed
    total: int
    group: int  # heads whose K and V are in the L2 together
    counters: Any  # [2] int32, 0 and left so: tiles drawn, programs done


class Call(NamedTuple):
    """What is the same for all tiles."""

    q_lengths: Any
    k_lengths: Any
    mods: Any
    nheads: int
    schedule: Any
    gains: Any = None  # of float8: [2, batch, nheads] float32, of products and of values


class Tile(NamedTuple):
    """BLOCK_M query rows of one head, and the keys that they see."""

    blocks: Any  # of keys; negative: there are no more tiles
    seq: Any
    head: Any
    start_m: Any  # negative: there is no such tile
    q_first: Any
    seqlen_q: Any
    k_first: Any  # the producer's alone
    seqlen_k: Any
    last_n: Any  # where the last block of keys begins, which is the first to be visited
    masked_end: Any  # how many of the first, and of the last that are visited, need a mask
    masked_begin: Any
    v_first: Any = 0  # float8's, for the producer: see transpose_values_kernel
    gain: Any = 0  # of its products, and of its values; in notes their bits
    value_gain: Any = 0


class Work(NamedTuple):
    """BLOCK_N keys of one KV head, and the query rows that see them, for the backward."""

    steps: Any  # blocks of queries, of all heads of the group; negative: there is no more work
    seq: Any
    head_k: Any
    start_n: Any  # negative: there are no such keys
    k_first: Any
    seqlen_q: Any
    seqlen_k: Any
    first_tile: Any  # of the sequence's queries, among those of a head
    begin: Any  # the first row
    full_begin: Any  # from here, up to full_end if SPEC.left, no mask is needed
    full_end: Any
    end: Any
    count: Any  # of the first block of queries, and of the keys, in their rings
    kv_count: Any


AHEAD: gl.constexpr = gl.constexpr(2)  # steps before a tile's or work's end that more is asked for

TILE_FIELDS: gl.constexpr = gl.constexpr(len(Tile._fields))
WORK_FIELDS: gl.constexpr = gl.constexpr(len(Work._fields))


@gluon.jit
def ask(counter, asked, when):
    """Have this warp add 1 to a counter in memory, if `when` -> what `answer` takes; else `asked`.
    The answer takes 1 us and more, for which only `answer` waits: with a plain atomic_add, by four
    warps, the forward took 0.6 to 2.4 % more time at 1k (H200, on zeros)."""
    return gl.inline_asm_elementwise(
        """{
        .reg .pred lead; .reg .b32 lane;
        mov.b32 $0, $2;
        mov.u32 lane, %laneid;
        setp.eq.u32 lead, lane, 0;
        setp.ne.and.b32 lead, $3, 0, lead;
        @lead atom.relaxed.gpu.global.add.u32 $0, [$1], 1;
        }""", "=&r,l,r,r", [counter, asked, gl.to_tensor(when).to(gl.int32)],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def answer(asked):
    """What the counter had been."""
    return gl.inline_asm_elementwise(
        "shfl.sync.idx.b32 $0, $1, 0, 31, 0xffffffff;", "=r,r", [asked],
        dtype=gl.int32, is_pure=False, pack=1,
    )  # fmt: skip


@gluon.jit
def leave(schedule):
    """Say that this program draws no more; the last one leaves the counters as they were."""
    done = gl.atomic_add(schedule.counters + 1, 1, sem="acq_rel")
    if done == gl.num_programs(0) - 1:
        gl.store(schedule.counters, 0)
        gl.store(schedule.counters + 1, 0)


@gluon.jit
def send_end(notes, count):
    """Tell the consumers that there are no more tiles."""
    notes.send(Tile(-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), count)


@gluon.jit
def value_of_note(notes, count):
    """Wait for note number `count` -> its first field, negative at the end."""
    notes.wait(count)
    return notes.field(count, 0)


@gluon.jit
def received_tile(notes, blocks, count, EIGHT: gl.constexpr):
    """The tile that is note number `count`, of so many blocks; EIGHT: of float8."""
    gain = 0.0
    value_gain = 0.0
    if EIGHT:
        gain = notes.field(count, 12).to(gl.float32, bitcast=True)
        value_gain = notes.field(count, 13).to(gl.float32, bitcast=True)
    tile = Tile(
        blocks, notes.field(count, 1), notes.field(count, 2), notes.field(count, 3),
        notes.field(count, 4), notes.field(count, 5), 0, notes.field(count, 7),
        notes.field(count, 8), notes.field(count, 9), notes.field(count, 10), 0, gain, value_gain,
    )  # fmt: skip
    notes.release(count)
    return tile


@gluon.jit
def find_place(index, call, lengths, BLOCK: gl.constexpr, LAST_FIRST: gl.constexpr):
    """-> (sequence, head, block of its rows): blocks in the outer, the heads of a group in the
    inner loop."""
    schedule = call.schedule
    in_group = (schedule.group + opaque_zero()) * schedule.per_head  # see at_head_late
    group = index // in_group
    rest = index % in_group
    members = gl.minimum(schedule.group, schedule.heads - group * schedule.group)
    head = group * schedule.group + rest % members
    block = rest // members
    if LAST_FIRST:
        block = schedule.per_head - 1 - block
    seq = 0
    if lengths.cu_seqlens is None:
        seq = head // call.nheads
        head = head % call.nheads
    else:
        seq, block = find_block(block, lengths, BLOCK)
    return seq, head, block


@gluon.jit
def find_tile(index, call, SPEC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr):
    """Tile number `index`, last rows, which see most keys, first."""
    seq, head, block = find_place(index, call, call.q_lengths, BLOCK_M, True)
    q_first, seqlen_q = sequence_bounds(call.q_lengths, seq)
    k_first, seqlen_k = partner_bounds(call.k_lengths, seq, SPEC.page_size > 0)
    shift = diagonal_shift(seqlen_q, seqlen_k, SPEC)
    start_m = block * BLOCK_M
    begin, full_begin, full_end, end = kv_block_range(
        start_m, BLOCK_M, shift, seqlen_k, call.mods, SPEC, BLOCK_N
    )
    exists = (start_m >= 0) & (start_m < seqlen_q)
    blocks = gl.where(exists, (gl.maximum(end - begin, 0) + BLOCK_N - 1) // BLOCK_N, 0)
    masked_end = (gl.maximum(end - full_end, 0) + BLOCK_N - 1) // BLOCK_N
    v_first = 0
    gain = 0
    value_gain = 0
    if call.gains is not None:
        v_first = first_tile(call.k_lengths, seq, BLOCK_N) * BLOCK_N
        count = call.q_lengths.batch * call.nheads
        ptr = call.gains + seq * call.nheads + head
        gain = gl.load(ptr, mask=exists, other=0.0).to(gl.int32, bitcast=True)
        value_gain = gl.load(ptr + count, mask=exists, other=0.0).to(gl.int32, bitcast=True)
    return Tile(
        blocks, seq, head, gl.where(exists, start_m, -1), q_first, seqlen_q, k_first, seqlen_k,
        begin + (blocks - 1) * BLOCK_N, masked_end, (full_begin - begin) // BLOCK_N, v_first,
        gain, value_gain,
    )  # fmt: skip


@gluon.jit
def find_work(
    index, call, count, kv_count, group_size,
    SPEC: gl.constexpr, BLOCK_M: gl.constexpr, BLOCK_N: gl.constexpr,
):  # fmt: skip
    """Work number `index`, first keys, which most queries see, first. call.nheads: KV heads."""
    seq, head_k, block = find_place(index, call, call.k_lengths, BLOCK_N, False)
    k_first, seqlen_k = sequence_bounds(call.k_lengths, seq)
    _, seqlen_q = partner_bounds(call.q_lengths, seq)
    shift = diagonal_shift(seqlen_q, seqlen_k, SPEC)
    start_n = block * BLOCK_N
    begin, full_begin, full_end, end = q_block_range(
        start_n, seqlen_q, shift, call.mods, SPEC, BLOCK_M, BLOCK_N
    )
    exists = (start_n >= 0) & (start_n < seqlen_k)
    blocks = gl.where(exists, (gl.maximum(end - begin, 0) + BLOCK_M - 1) // BLOCK_M, 0)
    partial = start_n + BLOCK_N > seqlen_k  # keys that do not exist would add to dQ as others do
    if partial | (full_begin >= full_end):
        full_begin = end
    return Work(
        blocks * group_size, seq, head_k, gl.where(exists, start_n, -1), k_first, seqlen_q,
        seqlen_k, first_tile(call.q_lengths, seq, BLOCK_M), begin, full_begin, full_end, end,
        count, kv_count,
    )  # fmt: skip


@gluon.jit
def send_no_work(notes, count):
    """Tell the consumer that there is no more work."""
    notes.send(Work(-1, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0), count)


@gluon.jit
def received_span(notes, count, call):
    """-> k_first and seqlen_k of the work that is note number `count`."""
    lengths = call.k_lengths
    k_first = 0
    seqlen_k = lengths.rows
    if lengths.cu_seqlens is not None or lengths.leftpad is not None or lengths.used is not None:
        k_first = notes.field(count, 4)
        seqlen_k = notes.field(count, 6)
    return k_first, seqlen_k


@gluon.jit
def received_work(notes, steps, count, call, SPEC: gl.constexpr):
    """The work that is note number `count`, of so many steps; what is the same for all work is not
    read, and takes no register."""
    k_first, seqlen_k = received_span(notes, count, call)
    seqlen_q = call.q_lengths.rows
    if call.q_lengths.cu_seqlens is not None or call.q_lengths.used is not None:
        seqlen_q = notes.field(count, 5)
    begin = 0
    if SPEC.causal or SPEC.right:
        begin = notes.field(count, 8)
    return Work(
        steps, notes.field(count, 1), notes.field(count, 2), notes.field(count, 3), k_first,
        seqlen_q, seqlen_k, notes.field(count, 7), begin, notes.field(count, 9),
        notes.field(count, 10), notes.field(count, 11), notes.field(count, 12),
        notes.field(count, 13),
    )  # fmt: skip


@gluon.jit
def received_keys(notes, count, call):
    """-> seq, head_k, start_n, k_first and seqlen_k of `received_work`."""
    k_first, seqlen_k = received_span(notes, count, call)
    return (
        notes.field(count, 1), notes.field(count, 2), notes.field(count, 3), k_first, seqlen_k
    )  # fmt: skip


@gluon.jit
def first_block(work, DOWN: gl.constexpr, BLOCK_M: gl.constexpr):
    """Where the first block of queries begins; DOWN: the last one is the first."""
    start_m = work.begin
    if DOWN:
        start_m = (work.end - 1) // BLOCK_M * BLOCK_M
    return start_m


@gluon.jit
def next_block(start_m, head, work, group_size, DOWN: gl.constexpr, BLOCK_M: gl.constexpr):
    """-> (start_m, head) of the block of queries after this one."""
    start_m += -BLOCK_M if DOWN else BLOCK_M
    if group_size != 1:
        over = start_m < work.begin if DOWN else start_m >= work.end
        if over:
            start_m = first_block(work, DOWN, BLOCK_M)
            head += 1
    return start_m, head

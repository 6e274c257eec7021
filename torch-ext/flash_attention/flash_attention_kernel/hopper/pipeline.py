"""Rings in shared memory between a warp that fills them and the warp groups that read them, and
what these have in common."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
)

from ..common import Operand, at_head
from .compat import aggregate, async_load

ROWS: gl.constexpr = gl.constexpr(64)  # of a consumer: what a warp group's wgmma takes


@aggregate
class Channel:
    """A ring of tiles. `ready`: the copy engine has filled one; `free`: every consumer has read it.
    Both sides count the tiles that passed, from 0."""

    tiles: gl.shared_memory_descriptor  # [STAGES, *block of the descriptor]
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    STAGES: gl.constexpr
    BYTES: gl.constexpr  # of a tile

    @gluon.constexpr_function
    def __init__(self, tiles, ready, free, STAGES, BYTES):
        self.tiles = tiles
        self.ready = ready
        self.free = free
        self.STAGES = gl.constexpr(STAGES)
        self.BYTES = gl.constexpr(BYTES)

    @gluon.jit
    def fill(self, desc, coords, count):
        """Copy the block of `desc` at `coords` into the ring, as tile number `count`."""
        self.claim(count)
        slot = count % self.STAGES
        barrier = self.ready.index(slot)
        mbarrier.expect(barrier, self.BYTES)
        async_load(desc, coords, barrier, self.tiles.index(slot))

    @gluon.jit
    def fill_both(self, desc, coords, more_desc, more_coords, more, count):
        """`fill`, and of the ring `more`, which has no barriers of its own, from more_desc."""
        self.claim(count)
        slot = count % self.STAGES
        barrier = self.ready.index(slot)
        mbarrier.expect(barrier, self.BYTES + more_desc.block_type.nbytes)
        async_load(desc, coords, barrier, self.tiles.index(slot))
        async_load(more_desc, more_coords, barrier, more.index(slot))

    @gluon.jit
    def claim(self, count):
        """Wait until tile number `count`, which the caller writes itself, may be."""
        mbarrier.wait(self.free.index(count % self.STAGES), (count // self.STAGES & 1) ^ 1)

    @gluon.jit
    def announce(self, count):
        """Tile number `count` is written."""
        fence_async_shared()
        mbarrier.arrive(self.ready.index(count % self.STAGES), count=1)

    @gluon.jit
    def wait(self, count, exists=True):
        """Wait for tile number `count`, if it `exists`."""
        slot = count % self.STAGES
        mbarrier.wait(self.ready.index(slot), count // self.STAGES & 1, pred=exists)

    @gluon.jit
    def tile(self, count, HEIGHT: gl.constexpr, COLS: gl.constexpr):
        """Tile number `count`, [HEIGHT, COLS] in shared memory, for which `wait` has waited."""
        return self.tiles.index(count % self.STAGES).reshape([HEIGHT, COLS])

    @gluon.jit
    def receive(self, count, HEIGHT: gl.constexpr, COLS: gl.constexpr):
        """Wait for tile number `count` -> it."""
        self.wait(count)
        return self.tile(count, HEIGHT, COLS)

    @gluon.jit
    def release(self, count, exists=True):
        """Tile number `count`, if it `exists`, may be overwritten, as far as this consumer goes."""
        mbarrier.arrive(self.free.index(count % self.STAGES), count=1, pred=exists)


@gluon.jit
def make_barriers(STAGES: gl.constexpr, ARRIVALS: gl.constexpr):
    """[STAGES] mbarriers that complete at ARRIVALS."""
    barriers = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(STAGES):
        mbarrier.init(barriers.index(slot), count=ARRIVALS)
    return barriers


@gluon.jit
def make_tiles(desc, STAGES: gl.constexpr):
    """Room for STAGES blocks of `desc`."""
    return gl.allocate_shared_memory(desc.dtype, [STAGES] + desc.block_shape, desc.layout)


@gluon.jit
def make_channel(desc, STAGES: gl.constexpr, CONSUMERS: gl.constexpr):
    """A ring for blocks of `desc`, read by CONSUMERS warp groups."""
    tiles = make_tiles(desc, STAGES)
    ready, free = make_barriers(STAGES, 1), make_barriers(STAGES, CONSUMERS)
    return Channel(tiles, ready, free, STAGES, desc.block_type.nbytes)


@gluon.jit
def make_ring(
    DTYPE: gl.constexpr, HEIGHT: gl.constexpr, COLS: gl.constexpr, LAYOUT: gl.constexpr,
    STAGES: gl.constexpr = 2,
):  # fmt: skip
    """A ring of tiles [HEIGHT, COLS] that warps write, for one reader."""
    tiles = gl.allocate_shared_memory(DTYPE, [STAGES, HEIGHT, COLS], LAYOUT)
    return Channel(tiles, make_barriers(STAGES, 1), make_barriers(STAGES, 1), STAGES, 0)


@gluon.constexpr_function
def product_layout(COLS, DTYPE=gl.bfloat16):
    """Of a product [ROWS, COLS] of one warp group, whose factors have that dtype's size."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, COLS, 256 // DTYPE.primitive_bitwidth])


@gluon.constexpr_function
def spares_quarter(HEAD_DIM, BLOCK_D):
    """Whether the last quarter of a tile's columns is all 0, as with head_dim 96, and
    `inner_product` leaves it out."""
    return BLOCK_D > 64 and HEAD_DIM * 4 <= BLOCK_D * 3


@gluon.jit
def inner_product(
    left, right, acc, HEAD_DIM: gl.constexpr, BLOCK_D: gl.constexpr, ADD: gl.constexpr = False
):
    """left @ rightᵀ of two tiles with BLOCK_D columns, plus `acc` if ADD, under way: one group of
    products, or two."""
    if not spares_quarter(HEAD_DIM, BLOCK_D):
        return warpgroup_mma(left, right.permute((1, 0)), acc, use_acc=ADD, is_async=True)
    HALF: gl.constexpr = BLOCK_D // 2
    first, last = right.slice(0, HALF, 1), right.slice(HALF, HALF // 2, 1)
    acc = warpgroup_mma(
        left.slice(0, HALF, 1), first.permute((1, 0)), acc, use_acc=ADD, is_async=True
    )
    return warpgroup_mma(left.slice(HALF, HALF // 2, 1), last.permute((1, 0)), acc, is_async=True)


@gluon.jit
def opaque_zero():
    """0, of which the compiler knows nothing. A tile whose index it is added to has its address, or
    its wgmma descriptor, computed where it is used: else LLVM computes all of a loop's that do not
    change before it, and carries the others round it, and ptxas spills."""
    return gl.inline_asm_elementwise(
        "mov.b32 $0, 0;", "=r", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def at_head_late(operand, seq, head, first_row, DIM: gl.constexpr):
    """-> ptr, stride of rows: at_head of a result, which has DIM columns, next to each other. Of
    its strides the compiler knows nothing before this: it extends them to 64 bits at the kernel's
    entry else, and ptxas keeps them in memory. But that they are multiples of 8, if DIM is: in a
    worker's region Triton 3.6 forgets what it knows of arguments, and then stores 2 bytes at a time
    for 16."""
    zero = opaque_zero()
    batch, row, of_head = operand.batch + zero, operand.seq + zero, operand.head + zero
    if DIM % 8 == 0:
        batch, row = gl.multiple_of(batch, 8), gl.multiple_of(row, 8)
        of_head = gl.multiple_of(of_head, 8)
    to = at_head(Operand(operand.ptr, batch, row, of_head, operand.dim), seq, head, first_row)
    if DIM % 8 == 0:
        return gl.multiple_of(to.ptr, 16), row
    else:
        return to.ptr, row


@gluon.constexpr_function
def row_layout(COLS):
    """Of results that are stored: whole rows, 16 bytes a thread. As the products lie, 4 bytes, a
    tile of the forward took 2 us longer (H200)."""
    return gl.BlockedLayout([1, 8], [256 // COLS, COLS // 8], [4, 1], [1, 0])


# PTX of `first_column`. Operands: the result; the first column.
CODE_OF_FIRST: gl.constexpr = gl.constexpr(
    "{ .reg .b32 x; mov.u32 x, %laneid; and.b32 x, x, 3; shl.b32 x, x, 1; add.s32 $0, x, $1; }"
)


@gluon.jit
def first_column(first, rows):
    """The first of its columns that a thread has of a product whose first is `first`; at `rows`."""
    given = gl.full_like(rows, first)
    return gl.inline_asm_elementwise(
        CODE_OF_FIRST, "=r,r", [given], dtype=gl.int32, is_pure=True, pack=1
    )


@gluon.constexpr_function
def code_of_columns(COUNT):
    """PTX of `columns` for a thread's COUNT elements."""
    return " ".join(f"mov.b32 ${i}, {i // 2 * 8 + i % 2};" for i in range(COUNT))


@gluon.constexpr_function
def operands_of_columns(COUNT):
    return ",".join(["=r"] * COUNT + ["r"] * COUNT)


@gluon.jit
def columns(COLS: gl.constexpr, DTYPE: gl.constexpr):
    """The columns of a product, each counted from its thread's `first_column`: numbers that are
    part of the instructions. LLVM keeps those of gl.arange in a register each all around a loop,
    and ptxas spills."""
    LAYOUT: gl.constexpr = gl.SliceLayout(0, product_layout(COLS, DTYPE))
    COUNT: gl.constexpr = COLS // 4
    return gl.inline_asm_elementwise(
        code_of_columns(COUNT), operands_of_columns(COUNT), [gl.zeros([COLS], gl.int32, LAYOUT)],
        dtype=gl.int32, is_pure=True, pack=COUNT,
    )  # fmt: skip


@gluon.jit
def packed(values, DTYPE: gl.constexpr):
    """float32 values as DTYPE, two to a register, and so they stay until `unpacked`: after the
    compiler's own conversion each has a register."""
    if DTYPE == gl.bfloat16:
        return gl.inline_asm_elementwise(
            "cvt.rn.bf16x2.f32 $0, $2, $1;", "=r,r,r", [values], dtype=gl.bfloat16, is_pure=True,
            pack=2,
        )  # fmt: skip
    else:
        return gl.inline_asm_elementwise(
            "cvt.rn.f16x2.f32 $0, $2, $1;", "=r,r,r", [values], dtype=gl.float16, is_pure=True,
            pack=2,
        )  # fmt: skip


@gluon.jit
def unpacked(values):
    """What `packed` gave, in float32. Not pure: else it might move up, and take the registers."""
    if values.dtype == gl.bfloat16:
        CODE: gl.constexpr = "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;"
    else:
        CODE: gl.constexpr = (
            "{ .reg .b16 low, high; mov.b32 {low, high}, $2; "
            "cvt.f32.f16 $0, low; cvt.f32.f16 $1, high; }"
        )
    return gl.inline_asm_elementwise(
        CODE, "=r,=r,r", [values], dtype=gl.float32, is_pure=False, pack=2
    )


@gluon.jit
def scrub(tile, rows, HEIGHT: gl.constexpr, COLS: gl.constexpr):
    """Zero the rows of a tile from `rows` on, which belong to another sequence: 0 * NaN is NaN."""
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    STEP: gl.constexpr = 4 * gl.num_warps()
    offs = gl.arange(0, STEP, layout=gl.SliceLayout(1, LAYOUT))
    for first in gl.static_range(0, HEIGHT, STEP):
        if first + STEP > rows:
            part = tile.slice(first, STEP)
            values = part.load(LAYOUT)
            keep = (first + offs < rows)[:, None]
            part.store(gl.where(keep, values, gl.zeros_like(values)))
    fence_async_shared()


@aggregate
class Notes:
    """A ring of two notes of FIELDS numbers, each of which every consumer reads."""

    numbers: gl.shared_memory_descriptor  # [2 * FIELDS, 1] int32
    ready: gl.shared_memory_descriptor
    free: gl.shared_memory_descriptor
    FIELDS: gl.constexpr

    @gluon.constexpr_function
    def __init__(self, numbers, ready, free, FIELDS):
        self.numbers = numbers
        self.ready = ready
        self.free = free
        self.FIELDS = gl.constexpr(FIELDS)

    @gluon.jit
    def send(self, fields, count):
        """Hand on note number `count`."""
        slot = count % 2
        mbarrier.wait(self.free.index(slot), (count // 2 & 1) ^ 1)
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        for i in gl.static_range(self.FIELDS):
            number = gl.full([1], fields[i], gl.int32, LAYOUT)
            self.numbers.index(slot * self.FIELDS + i).store(number)
        mbarrier.arrive(self.ready.index(slot), count=1)

    @gluon.jit
    def wait(self, count):
        """Wait for note number `count`."""
        mbarrier.wait(self.ready.index(count % 2), count // 2 & 1)

    @gluon.jit
    def field(self, count, i: gl.constexpr):
        """Field number `i` of note number `count`, for which `wait` has waited."""
        LAYOUT: gl.constexpr = gl.BlockedLayout([1], [32], [gl.num_warps()], [0])
        number = self.numbers.index(count % 2 * self.FIELDS + i).load(LAYOUT)
        # All threads have the same: this leaves it in a uniform register, and what follows of it.
        number = gl.inline_asm_elementwise(
            "redux.sync.max.s32 $0, $1, 0xffffffff;", "=r,r", [number],
            dtype=gl.int32, is_pure=False, pack=1,
        )  # fmt: skip
        return gl.max(number, 0)

    @gluon.jit
    def release(self, count):
        """Note number `count` may be overwritten, as far as this consumer goes."""
        mbarrier.arrive(self.free.index(count % 2), count=1)


@gluon.jit
def make_notes(FIELDS: gl.constexpr, CONSUMERS: gl.constexpr):
    """Notes for CONSUMERS warp groups."""
    LAYOUT: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    numbers = gl.allocate_shared_memory(gl.int32, [2 * FIELDS, 1], LAYOUT)
    return Notes(numbers, make_barriers(2, 1), make_barriers(2, CONSUMERS), FIELDS)

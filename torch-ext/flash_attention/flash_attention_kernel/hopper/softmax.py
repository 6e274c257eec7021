"""The forward's softmax, which takes no maximum of most blocks.

A row's weights are 2^(score - m). m need not be the row's maximum: no weight may overflow, and some
of all that was seen must be near 1. So after a tile's first blocks m stays while a thread's weights
of a row in a block sum to no more than LIMIT; else, which is rare, a warp that has such a row takes
a branch: m becomes the maximum and the weights are computed again. FlashAttention-4 keeps m within
2^8 of the maximum to save the rescaling of the output. This saves the comparisons and shuffles too,
and exponentials need not wait for them: the step's softmax took 1,200 to 1,300 cycles of an H200
(D 128) and takes 1,000 to 1,200.

A thread sums the weights of its own columns, and the four that share a row add up at the tile's
end: what is known of a row is [ROWS, 4]. m is in log2 units, -inf before the first key.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from ..softmax import with_sink
from .pipeline import ROWS

# 2^10; float16's weights end at 2^16. Of normal scores with a standard deviation of 3 a warp takes
# the branch at 1 block in 4,000, of 5 at 1 in 19, of 7 at 1 in 8 (simulated, 8,192 keys).
LIMIT: gl.constexpr = gl.constexpr("0f44800000")
# Blocks of a tile whose maximum m becomes in any case. A weight of 1 is not rounded, and that of
# the maximum makes a tenth of a short row's error: with one block a window of 340 keys had 1.06
# times the error in bfloat16, with two 1.04 (simulated; 1.06 also measured).
EXACT: gl.constexpr = gl.constexpr(2)
# float8's weights are so many times as great: e4m3 begins at 2^-9 and ends at 448.
GAIN_8: gl.constexpr = gl.constexpr(256.0)
SHIFT_8: gl.constexpr = gl.constexpr("0f41000000")  # its binary logarithm


@gluon.constexpr_function
def for_each(line, COUNT, **operands):
    """PTX: the line for element i, for every i < COUNT. A word in `operands` is operand number i
    from that one on; ROW says which of its thread's two rows the element is of: they alternate in
    pairs."""
    lines = []
    for i in range(COUNT):
        text = line.replace("ROW", str(i // 2 % 2))
        for word, number in operands.items():
            text = text.replace(word, f"${number + i}")
        lines.append(text)
    return lines


@gluon.constexpr_function
def weigh(COUNT, score, HALF):
    """PTX: weights, two to an operand, from operand number `score` on, and sums of both rows."""
    lines = ["mov.b32 sum0, 0; mov.b32 sum1, 0;"]
    for i in range(0, COUNT, 2):
        row = i // 2 % 2
        for j in (0, 1):
            lines.append(f"fma.rn.f32 x, ${score + i + j}, scale, minus{row};")
            lines.append(f"ex2.approx.ftz.f32 w{j}, x;")
        lines.append(f"cvt.rn.{HALF}x2.f32 ${i // 2}, w1, w0;")
        # One by one, a warp alone took 878 cycles for 64, by pairs 702; with others no difference.
        lines.append(f"add.f32 x, w0, w1; add.f32 sum{row}, sum{row}, x;")
    return lines


@gluon.constexpr_function
def weigh_8(COUNT, score):
    """`weigh` of e4m3 weights, 2^8 times as great, four to an operand: those of a row that the
    thread has in two neighbours of 8 columns; see `factor_8` in products.py."""
    lines = ["mov.b32 sum0, 0; mov.b32 sum1, 0;"]
    for operand in range(COUNT // 4):
        row = operand % 2
        for half in (0, 1):
            for j in (0, 1):
                i = (operand // 4 * 4 + operand % 4 // 2 * 2 + half) * 4 + 2 * row + j
                lines.append(f"fma.rn.f32 x, ${score + i}, scale, minus{row};")
                lines.append(f"ex2.approx.ftz.f32 w{j}, x;")
            lines.append(f"cvt.rn.satfinite.e4m3x2.f32 pair{half}, w1, w0;")
            lines.append(f"add.f32 x, w0, w1; add.f32 sum{row}, sum{row}, x;")
        lines.append(f"mov.b32 ${operand}, {{pair0, pair1}};")
    return lines


@gluon.constexpr_function
def over_lanes(row, names):
    """PTX: the row's greatest of what each of its four threads has under a name."""
    lines = []
    for lane in (2, 1):
        for name in names:
            lines.append(f"shfl.sync.bfly.b32 x, {name}{row}, {lane}, 31, 0xffffffff;")
            lines.append(f"max.f32 {name}{row}, {name}{row}, x;")
    return lines


@gluon.constexpr_function
def take(row):
    """PTX: x as the row's m, and alpha by what m was; 0 where `none`: m or x is -inf."""
    return f"""sub.f32 alpha{row}, m{row}, x;
        @none mov.b32 alpha{row}, 0;
        ex2.approx.ftz.f32 alpha{row}, alpha{row};
        mov.b32 m{row}, x;"""


@gluon.constexpr_function
def results_of_rows(COUNT, sums):
    """PTX: a row's sum, m and alpha at each of its elements, from operand number `sums` on."""
    lines = for_each("mov.b32 SUM, sumROW;", COUNT, SUM=sums)
    lines += for_each("mov.b32 NEW, mROW;", COUNT, NEW=sums + COUNT)
    return lines + for_each("mov.b32 ALPHA, alphaROW;", COUNT, ALPHA=sums + 2 * COUNT)


@gluon.constexpr_function
def code_of_weights_8(COUNT):
    """PTX of `block_weights` for e4m3, of which m is always the maximum. Operands as in
    `code_of_weights`, but for the last."""
    sums = COUNT // 4
    score = sums + 3 * COUNT
    code = ["{ .reg .pred none; .reg .f32 sum<2>, m<2>, minus<2>, alpha<2>, top<2>, w<2>;"]
    code.append(f".reg .b16 pair<2>; .reg .f32 scale, x; mov.b32 scale, ${score + 2 * COUNT};")
    code.append("mov.b32 top0, 0fFF800000; mov.b32 top1, 0fFF800000;")
    code += for_each("max.f32 topROW, topROW, SCORE;", COUNT, SCORE=score)
    for row in (0, 1):
        code.append(f"mov.b32 m{row}, ${score + COUNT + 2 * row};")
        code += over_lanes(row, ["top"])
        code.append(
            f"""mul.f32 top{row}, top{row}, scale;
            max.f32 x, m{row}, top{row};
            setp.eq.f32 none, x, 0fFF800000;
            {take(row)}
            sub.f32 minus{row}, {SHIFT_8.value}, m{row};
            @none mov.b32 minus{row}, 0;"""
        )
    code += weigh_8(COUNT, score)
    return "\n".join(code + results_of_rows(COUNT, sums) + ["}"])


@gluon.constexpr_function
def renew(row):
    """PTX: the row's maximum as m, if it has none yet or its weights are too great."""
    return over_lanes(row, ["top", "sum"]) + [
        f"""mul.f32 top{row}, top{row}, scale;
        setp.gtu.f32 some, sum{row}, {LIMIT.value};
        setp.eq.f32 none, m{row}, 0fFF800000;
        max.f32 x, m{row}, top{row};
        @!some mov.b32 x, m{row};
        @none mov.b32 x, top{row};
        {take(row)}
        neg.f32 minus{row}, m{row};
        setp.eq.f32 none, m{row}, 0fFF800000;
        @none mov.b32 minus{row}, 0;"""
    ]


@gluon.constexpr_function
def code_of_weights(COUNT, HALF):
    """PTX of `block_weights` for a thread's COUNT elements. Operands: weights, sums, m after,
    alpha; scores, m before, scale, sums before: 0, or inf to take the branch. What is of a row is
    at each of its elements, or read at its first."""
    sums = COUNT // 2
    score = sums + 3 * COUNT
    code = ["{ .reg .pred some, none; .reg .f32 sum<2>, m<2>, minus<2>, alpha<2>, top<2>, w<2>;"]
    code.append(f".reg .f32 scale, x; mov.b32 scale, ${score + 2 * COUNT};")
    for row in (0, 1):
        code.append(
            f"""mov.b32 m{row}, ${score + COUNT + 2 * row};
            mov.b32 sum{row}, ${score + 3 * COUNT}; mov.b32 alpha{row}, 0f3F800000;
            neg.f32 minus{row}, m{row};
            setp.eq.f32 none, m{row}, 0fFF800000;
            @none mov.b32 minus{row}, 0;"""
        )
    code.append(f"setp.gt.f32 some, sum0, {LIMIT.value}; @some bra.uni RENEW;")
    code += weigh(COUNT, score, HALF)
    code.append(
        f"""setp.gtu.f32 some, sum0, {LIMIT.value};
        setp.gtu.or.f32 some, sum1, {LIMIT.value}, some;
        setp.eq.or.f32 some, m0, 0fFF800000, some;
        setp.eq.or.f32 some, m1, 0fFF800000, some;
        vote.sync.any.pred some, some, 0xffffffff; @!some bra.uni DONE;"""
    )
    code.append("RENEW: mov.b32 top0, 0fFF800000; mov.b32 top1, 0fFF800000;")
    code += for_each("max.f32 topROW, topROW, SCORE;", COUNT, SCORE=score)
    code += renew(0) + renew(1) + weigh(COUNT, score, HALF)
    code.append("DONE:")
    return "\n".join(code + results_of_rows(COUNT, sums) + ["}"])


@gluon.constexpr_function
def operands_of_weights(COUNT, PACKED, GIVEN):
    """PACKED: weights to an operand; GIVEN: operands that an element has."""
    return ",".join(["=&r"] * (COUNT // PACKED) + ["=&f"] * (3 * COUNT) + ["f"] * (GIVEN * COUNT))


@gluon.constexpr_function
def code_of_scaling(COUNT):
    """PTX of `scaled` for a thread's COUNT elements. Operands: results; values, factors."""
    factor = 2 * COUNT
    code = ["{ .reg .pred some;"]
    code += for_each("mov.b32 RESULT, VALUE;", COUNT, RESULT=0, VALUE=COUNT)
    code.append(
        f"""setp.neu.f32 some, ${factor}, 0f3F800000;
        setp.neu.or.f32 some, ${factor + 2}, 0f3F800000, some;
        vote.sync.any.pred some, some, 0xffffffff; @!some bra.uni DONE;"""
    )
    code += for_each("mul.f32 RESULT, RESULT, FACTOR;", COUNT, RESULT=0, FACTOR=factor)
    return "\n".join(code + ["DONE: }"])


@gluon.constexpr_function
def operands_of_scaling(COUNT):
    return ",".join(["=&f"] * COUNT + ["f"] * (2 * COUNT))


@gluon.jit
def by_thread(product):
    """[ROWS, columns] as [ROWS, columns // 8, 4, 2], whose last but one are a row's threads."""
    return product.reshape([ROWS, product.shape[1] // 8, 4, 2])


@gluon.jit
def whole(product, LAYOUT: gl.constexpr):
    """What `by_thread` takes apart."""
    COLS: gl.constexpr = product.shape[1] * 8
    return gl.convert_layout(product.reshape([ROWS, COLS]), LAYOUT, assert_trivial=True)


@gluon.jit
def first(a, b):
    return a


@gluon.jit
def of_row(values):
    """[ROWS, 4] of what is alike at all of a thread's elements of a row."""
    return gl.reduce(gl.reduce(values, 3, first), 1, first)


@gluon.jit
def at_elements(row, elements):
    """[ROWS, 4] at each of the elements."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, elements.type.layout))
    row = gl.convert_layout(row, LAYOUT, assert_trivial=True)
    return gl.broadcast(elements, row[:, None, :, None])[1]


@gluon.jit
def initial_sums(product, mods, head, exists, DTYPE: gl.constexpr):
    """-> (l_i, m_i) before the first key, whose scores will be where the product is."""
    LAYOUT: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(3, by_thread(product).type.layout))
    l_i = gl.zeros([ROWS, 4], gl.float32, LAYOUT)
    m_i = gl.full([ROWS, 4], float("-inf"), gl.float32, LAYOUT)
    l_i, m_i = with_sink(l_i, m_i, mods, head, exists, 1.0)
    return l_i * (0.25 * GAIN_8 if DTYPE == gl.float8e4nv else 0.25), m_i


@gluon.jit
def block_weights(scores, i, scale, l_i, m_i, DTYPE: gl.constexpr):
    """Fold block i's scores [ROWS, columns], which `scale` turns into log2 units, into the running
    sums and m. -> (weights, alpha [ROWS, 4] as in `scaled`, l_i, m_i)"""
    LAYOUT: gl.constexpr = scores.type.layout
    COUNT: gl.constexpr = scores.shape[1] // 2
    x = by_thread(scores)
    before = gl.where(i < EXACT, float("inf"), 0.0)
    given = [x, at_elements(m_i, x), gl.full_like(x, scale), gl.full_like(x, before)]
    if DTYPE == gl.float8e4nv:
        weights, sums, m_i, alpha = gl.inline_asm_elementwise(
            code_of_weights_8(COUNT), operands_of_weights(COUNT, 4, 3), given[:3],
            dtype=(gl.float8e4nv, gl.float32, gl.float32, gl.float32), is_pure=True, pack=COUNT,
        )  # fmt: skip
    elif DTYPE == gl.bfloat16:
        weights, sums, m_i, alpha = gl.inline_asm_elementwise(
            code_of_weights(COUNT, "bf16"), operands_of_weights(COUNT, 2, 4), given,
            dtype=(gl.bfloat16, gl.float32, gl.float32, gl.float32), is_pure=True, pack=COUNT,
        )  # fmt: skip
    else:
        weights, sums, m_i, alpha = gl.inline_asm_elementwise(
            code_of_weights(COUNT, "f16"), operands_of_weights(COUNT, 2, 4), given,
            dtype=(gl.float16, gl.float32, gl.float32, gl.float32), is_pure=True, pack=COUNT,
        )  # fmt: skip
    alpha = of_row(alpha)
    return whole(weights, LAYOUT), alpha, l_i * alpha + of_row(sums), of_row(m_i)


@gluon.jit
def scaled(product, alpha):
    """Rows [ROWS, columns], each times its alpha [ROWS, 4], where a warp has one that is not 1."""
    LAYOUT: gl.constexpr = product.type.layout
    COUNT: gl.constexpr = product.shape[1] // 2
    x = by_thread(product)
    x = gl.inline_asm_elementwise(
        code_of_scaling(COUNT), operands_of_scaling(COUNT), [x, at_elements(alpha, x)],
        dtype=gl.float32, is_pure=True, pack=COUNT,
    )  # fmt: skip
    return whole(x, LAYOUT)


@gluon.jit
def of_rows(l_i, m_i, LAYOUT: gl.constexpr, DTYPE: gl.constexpr):
    """-> (sums, m) of whole rows [ROWS]"""
    sums = gl.sum(l_i, 1)
    if DTYPE == gl.float8e4nv:
        sums *= 1.0 / GAIN_8
    return gl.convert_layout(sums, LAYOUT), gl.convert_layout(gl.max(m_i, 1), LAYOUT)

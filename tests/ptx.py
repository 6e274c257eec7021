"""Inline PTX, run on a CPU: a warp's 32 lanes as arrays, for the instructions that ours has."""

import re

import numpy as np
import torch

LANES = np.arange(32)
HALVES = {"bf16x2": torch.bfloat16, "f16x2": torch.float16}


def number(word):
    """0fXXXXXXXX, or an integer, whose bits are a float's."""
    if word.startswith("0f"):
        return np.frombuffer(bytes.fromhex(word[2:]), ">f4").astype(np.float32)[0]
    return np.uint32(int(word, 0)).view(np.float32)


def compute(name, args):
    """The result of an instruction that neither branches nor writes a predicate."""
    operation = name.split(".")[0]
    if operation == "mov" and len(args) == 2:  # of 16 bits each
        low, high = (x.view(np.int32) for x in args)
        return (low & 0xFFFF | high << 16).view(np.float32)
    if operation == "mov":
        return args[0]
    if operation == "shfl":
        return args[0][LANES ^ args[1].view(np.int32)[0]]
    if name.endswith("e4m3x2.f32"):  # two to 16 bits, likewise
        pair = (torch.from_numpy(x.clip(-448, 448)).to(torch.float8_e4m3fn) for x in args)
        high, low = (x.view(torch.uint8).numpy().astype(np.int32) for x in pair)
        return (low | high << 8).view(np.float32)
    if operation == "cvt":  # two to a register, the second operand in the lower half
        high, low = (torch.from_numpy(x.copy()).to(HALVES[name.split(".")[2]]) for x in args)
        return torch.stack([low, high], 1).view(torch.int32)[:, 0].numpy().view(np.float32)
    if name in ("add.s32", "and.b32", "shl.b32"):
        functions = {"add": np.add, "and": np.bitwise_and, "shl": np.left_shift}
        return functions[operation](*(x.view(np.int32) for x in args)).view(np.float32)
    exact = [x.astype(np.float64) for x in args]
    functions = {
        "neg": np.negative, "ex2": np.exp2, "add": np.add, "sub": np.subtract, "mul": np.multiply,
        "max": np.fmax, "fma": lambda x, y, z: x * y + z,
    }  # fmt: skip
    return functions[operation](*exact).astype(np.float32)


def compare(name, args):
    """setp.eq, .gt and .neu, and .gtu, which a NaN satisfies; .or: or the predicate given last."""
    kind = name.split(".")[1]
    left, right = args[:2]
    unordered = np.isnan(left) | np.isnan(right)
    holds = {"eq": left == right, "neu": left != right, "gt": left > right, "gtu": left > right}
    result = holds[kind] | unordered if kind in ("gtu", "neu") else holds[kind]
    return result | args[2] if ".or" in name else result


def execute(code, operands):
    """Run `code` with registers $i = operands[i], float32 [32] or None for a result, and fill
    those. -> the labels to which it branched"""
    registers = {f"${i}": x for i, x in enumerate(operands)}
    registers["%laneid"] = LANES.astype(np.int32).view(np.float32)
    text = re.sub(r"\.reg [^;]*;|[{}]", "", code)
    lines = [line.strip() for line in re.sub(r"(\w+):", r"; \1: ;", text).split(";")]
    labels = {line[:-1]: place for place, line in enumerate(lines) if line.endswith(":")}
    place, taken = 0, []

    def value(word):
        found = registers.get(word)
        return np.full(32, number(word), np.float32) if found is None else found

    while place < len(lines):
        found = re.match(r"(?:@(!?)(\w+) )?([\w.]+) (.*)", lines[place])
        place += 1
        if not found:
            continue
        negated, guard, name, words = found.groups()
        words = [word.strip() for word in words.split(",")]
        active = np.full(32, True) if guard is None else registers[guard] ^ bool(negated)
        with np.errstate(all="ignore"):
            if name == "bra.uni":
                assert active.all() == active.any(), "the warp diverges"
                if active.all():
                    place = labels[words[0]]
                    taken.append(words[0])
            elif name.startswith("vote.sync.any"):
                registers[words[0]] = np.full(32, value(words[1]).any())
            else:
                run = compare if name.startswith("setp") else compute
                result = run(name, [value(word) for word in words[1:]])
                before = registers.get(words[0])
                registers[words[0]] = result if guard is None else np.where(active, result, before)
    for i in range(len(operands)):
        operands[i] = registers[f"${i}"]
    return taken

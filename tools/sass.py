"""Uniform registers that SASS may read before it has written them: a miscompile of ptxas.

ptxas 12.8 (Triton 3.6) did so in hopper/forward.py: a wgmma descriptor was computed before one loop
and read in the next, also where the first was skipped. Nothing but wrong results shows it.
"""

import re
from collections import deque
from typing import NamedTuple, Set

INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]+)\*/\s+(@!?U?P\w+\s+)?([A-Z0-9_.a-z]+)\s*(.*?)\s*;")
WRITES_NO_REGISTER = ("ST", "UTMA", "SYNCS", "HGMMA", "QGMMA")


class Instruction(NamedTuple):
    """One instruction: what it may be followed by, which uniform registers it reads and writes."""

    address: str
    text: str
    target: str  # of a branch, else ""
    falls_through: bool
    reads: Set[int]
    writes: Set[int]


def parse_instruction(address, predicate, name, arguments) -> Instruction:
    reads, writes = set(), set()
    operands = [operand.strip() for operand in arguments.split(",")]
    if name == "R2UR" and operands[0].startswith("P"):  # also says whether all threads agree
        del operands[0]
    uniform, wide = name.startswith("U"), "WIDE" in name
    pairs = uniform and not name.startswith("UTMA") and (".64" in name or wide)
    if re.fullmatch(r"UR\d+", operands[0]) and not name.startswith(WRITES_NO_REGISTER):
        first = int(operands.pop(0)[2:])
        writes = {first, first + 1} if pairs else {first}
    if name.startswith(("HGMMA", "QGMMA")):  # four registers; with A in registers the last two
        first = int(re.search(r"gdesc\[UR(\d+)\]", arguments).group(1))
        reads = set(range(first + (2 if re.fullmatch(r"R\d+", operands[1]) else 0), first + 4))
        operands = []
    for place, operand in enumerate(operands):
        pair = place == len(operands) - 1 if wide and uniform else pairs or "desc[" in operand
        for number in map(int, re.findall(r"UR(\d+)", operand)):
            reads |= {number, number + 1} if pair else {number}
    target = re.search(r"`\(([^)]+)\)", arguments) if name.startswith("BRA") else None
    conditional = bool(predicate) or re.match(r"!?UP\d", arguments) is not None
    ends = name.startswith(("BRA", "EXIT")) and not conditional
    text = f"{name} {arguments}"
    return Instruction(address, text, target.group(1) if target else "", not ends, reads, writes)


def parse(sass: str):
    """-> instructions, labels -> index"""
    instructions, labels = [], {}
    for line in sass.splitlines():
        label = re.match(r"^(\.L_x?_?\w+):", line)
        found = INSTRUCTION.match(line)
        if label:
            labels[label.group(1)] = len(instructions)
        elif found:
            address, predicate, name, arguments = found.groups()
            instructions.append(parse_instruction(address, predicate, name, arguments))
    return instructions, labels


def unwritten_reads(sass: str):
    """The instructions that read a uniform register which some path to them has not written."""
    instructions, labels = parse(sass)
    written = {0: frozenset()}  # index -> registers that every path to it has written
    queue = deque([0])
    while queue:
        index = queue.popleft()
        this = instructions[index]
        after = written[index] | this.writes
        following = [index + 1] if this.falls_through else []
        if this.target in labels:
            following.append(labels[this.target])
        for other in following:
            if other >= len(instructions):
                continue
            merged = after if other not in written else written[other] & after
            if other not in written or merged != written[other]:
                written[other] = merged
                queue.append(other)
    return [
        instructions[index]
        for index, registers in sorted(written.items())
        if instructions[index].reads - registers
    ]

"""Operands with and without their tensors; Triton 3.6's launcher in C, past what precedes it in
Python, and tensor maps kept from call to call.

What precedes it encodes the map of each tensor descriptor anew on every call; a map depends on
nothing but the address where shape and strides are those of a plan. With the maps kept a call of
four takes 8 us of host time instead of 14, one of eight 8 instead of 16 (an H200's host).
"""

from types import SimpleNamespace
from typing import Any, NamedTuple

import triton

MAX_KEPT = 1024  # of one plan, maps and calls' arguments; a map is 128 bytes, these are 1 KiB


def layout_of(operand):
    """An operand without its tensor: strides, or of a descriptor all fields, which is what Triton
    reads of one, or None."""
    if operand is None or isinstance(operand, tuple):
        return operand and operand[1:]
    return {name: value for name, value in vars(operand).items() if name != "base"}


def expanded(tensor, layout):
    """An operand from its tensor and its layout."""
    if layout.__class__ is tuple:
        return (tensor, *layout)
    return layout and SimpleNamespace(base=tensor, **layout)


class Direct(NamedTuple):
    """Triton's C launcher of a compiled kernel, beneath what encodes its descriptors."""

    launch: Any
    base: tuple  # cooperative grid, PDL, and no scratch memory
    encode: Any  # descriptor, metadata -> the arguments that stand for it
    metas: tuple  # of each descriptor
    kept: dict  # (number, address) -> arguments
    whole: dict  # addresses of all operands -> arguments

    def expanded(self, operands, layouts):
        """The operands as the C launcher takes them."""
        if not self.metas:
            return list(map(expanded, operands, layouts))
        key = tuple([t.data_ptr() for t, layout in zip(operands, layouts) if layout is not None])
        arguments = self.whole.get(key)
        if arguments is None:
            arguments = remember(self.whole, key, self.each_expanded(operands, layouts))
        return arguments

    def each_expanded(self, operands, layouts):
        """`expanded`, one after the other."""
        arguments, number = [], 0
        for tensor, layout in zip(operands, layouts):
            if layout.__class__ is dict:
                arguments += self.map_of(tensor, layout, number)
                number += 1
            elif layout is None:
                arguments.append(None)
            else:  # by its address: its memory would be kept, too
                arguments.append((tensor.data_ptr(), *layout))
        return arguments

    def map_of(self, tensor, layout, number):
        """The arguments that stand for descriptor `number`, of that tensor."""
        key = (number, tensor.data_ptr())
        found = self.kept.get(key)
        if found is None:
            encoded = self.encode(expanded(tensor, layout), self.metas[number])
            found = remember(self.kept, key, encoded)
        return found


def remember(memory, key, value):
    """-> value, which `memory` has from now on"""
    if len(memory) >= MAX_KEPT:
        memory.clear()
    memory[key] = value
    return value


def direct(compiled):
    """-> Direct, or None where the launcher is not Triton 3.6's for NVIDIA, or takes memory."""
    runner = compiled.run
    if not triton.__version__.startswith("3.6.") or type(runner).__name__ != "CudaLauncher":
        return None
    if runner.global_scratch_size or runner.profile_scratch_size:
        return None
    base = (runner.launch_cooperative_grid, runner.launch_pdl, None, None)
    code = getattr(runner.launch, "__code__", None)
    if code is None:  # in C: there are no descriptors to encode before it
        return Direct(runner.launch, base, None, (), {}, {})
    cells = dict(zip(code.co_freevars, (cell.cell_contents for cell in runner.launch.__closure__)))
    encode = runner.launch.__globals__["make_tensordesc_arg"]
    return Direct(cells["launcher"], base, encode, tuple(cells["tensordesc_meta"]), {}, {})

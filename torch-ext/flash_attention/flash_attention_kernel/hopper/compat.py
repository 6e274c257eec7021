"""What of Gluon has moved between Triton 3.6 and 3.9."""

from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

aggregate = getattr(gluon, "aggregate", None) or core._aggregate
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
async_store = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global

__all__ = ["aggregate", "async_add", "async_load", "async_store", "reinterpreted"]


@core.builtin
def _async_add(tensor_desc, coord, src, _semantic=None):
    coord = _semantic._convert_to_ir_values(coord, require_i64=False)
    kind = ir.DESCRIPTOR_REDUCE_KIND.ADD
    _semantic.builder.create_async_tma_reduce(kind, tensor_desc.handle, coord, src.handle)


async_add = getattr(tma, "async_atomic_add", None) or _async_add


@core.builtin
def reinterpreted(tiles, dtype, shape, layout, _semantic=None):
    """Shared memory, all that was allocated, as another dtype, shape or layout."""
    method = getattr(tiles, "reinterpret", None) or tiles._reinterpret
    return method(dtype, shape, layout, _semantic=_semantic)

"""What of Gluon has moved between Triton 3.6 and 3.9."""

from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.language import core

aggregate = getattr(gluon, "aggregate", None) or core._aggregate
async_load = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared

__all__ = ["aggregate", "async_load"]

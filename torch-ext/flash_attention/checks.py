"""Checks of the tensors of a problem, and lengths as the kernels read them."""

import torch
from torch import Tensor

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FLOAT8 = torch.float8_e4m3fn
DEVICES = ("cuda", "xpu", "cpu", "meta")
MAX_HEAD_DIM = 512
MAX_CACHE_HEAD_DIM = 576  # latent attention's q and k


def check_tensors(q, k, v, rank, layout):
    """Types, dtypes, devices and shapes that do not depend on dense or packed."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        _check_rank(name, tensor, rank, layout)
    _check_kind(q, k, v, ("k", "v"), (*DTYPES, FLOAT8))
    _check_shapes(q.shape, k.shape, v.shape, ("k", "v"), MAX_HEAD_DIM)
    if not torch.compiler.is_compiling():
        _check_plain(q, k, v)


def check_cache(q, k, v, names, rank, layout, max_head_dim):
    """The same, where K and V are a cache."""
    _check_rank("q", q, rank, layout)
    for name, tensor in zip(names, (k, v)):
        _check_rank(name, tensor, 4, "[batch or pages, rows, nheads_k, head_dim]")
        if tensor.stride(-1) != 1 and tensor.shape[-1] > 1:
            raise ValueError(
                f"{name} must have its columns next to each other, got strides "
                f"{tensor.stride()}; a copy of a cache on every call would cost too much"
            )
    _check_kind(q, k, v, names, DTYPES)
    _check_shapes(q.shape, k.shape, v.shape, names, max_head_dim)
    if not torch.compiler.is_compiling():
        _check_plain(q, k, v)


def check_no_grad(problem, what):
    if problem.needs_grad():
        raise NotImplementedError(
            f"there is no gradient through {what}: call it under torch.no_grad(), or pass the keys "
            "and values themselves to flash_attn_varlen_func"
        )


def _check_rank(name, tensor, rank, layout):
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(tensor).__name__}")
    if tensor.dim() != rank:
        raise ValueError(
            f"{name} must be {rank}-dimensional {layout}, got shape {tuple(tensor.shape)}"
        )


def _check_kind(q, k, v, names, dtypes):
    """dtype and device."""
    dtype, device = q.dtype, q.device
    if dtype not in dtypes:
        if dtype == FLOAT8:
            raise NotImplementedError(
                f"q is {dtype}, which is not implemented for a cache or pages; cast q, "
                f"{names[0]} and {names[1]} to bfloat16"
            )
        if "float8" in str(dtype):
            raise NotImplementedError(
                f"q is {dtype}, which is not implemented; use float8_e4m3fn, or bfloat16"
            )
        raise TypeError(f"q must be float16, bfloat16 or float32, got {dtype}")
    if k.dtype != dtype or v.dtype != dtype:
        raise TypeError(
            f"q, {names[0]} and {names[1]} must have one dtype, got {dtype}, {k.dtype} and "
            f"{v.dtype}"
        )
    if k.device != device or v.device != device:
        raise ValueError(
            f"q, {names[0]} and {names[1]} must be on one device, got {device}, {k.device} and "
            f"{v.device}; move them with .to()"
        )
    if device.type not in DEVICES:
        raise NotImplementedError(f"q must be on {', '.join(DEVICES)}, got {device}; use .cpu()")


def _check_shapes(q_shape, k_shape, v_shape, names, max_head_dim):
    if k_shape[:-1] != v_shape[:-1]:
        raise ValueError(
            f"{names[0]} and {names[1]} must agree in all but head_dim, got shapes "
            f"{tuple(k_shape)} and {tuple(v_shape)}"
        )
    if k_shape[-1] != q_shape[-1]:
        raise ValueError(f"{names[0]} must have q's head_dim {q_shape[-1]}, got {k_shape[-1]}")
    for name, shape, most in (("q", q_shape, max_head_dim), (names[1], v_shape, MAX_HEAD_DIM)):
        if not 1 <= shape[-1] <= most:
            raise ValueError(f"{name}'s head_dim must be 1 to {most}, got {shape[-1]}")
    nheads, nheads_k = q_shape[-2], k_shape[-2]
    if nheads_k < 1 or nheads < 1 or nheads % nheads_k:
        raise ValueError(
            f"q's number of heads must be a multiple of k's, got {nheads} and {nheads_k}"
        )


def _check_plain(q, k, v):
    """Refuse what would compute something else than was meant: nested, DTensor, vmapped."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.is_nested:
            raise NotImplementedError(
                f"{name} is a nested tensor; pass its values() and offsets() to "
                "flash_attn_varlen_func"
            )
        if type(tensor).__name__ == "DTensor":
            raise NotImplementedError(
                f"{name} is a DTensor; pass to_local() of tensors sharded by batch or heads"
            )
    if torch._C._functorch.peek_interpreter_stack() is not None and any(
        torch._C._functorch.is_batchedtensor(tensor) for tensor in (q, k, v)
    ):
        raise NotImplementedError(
            "flash attention has no vmap rule; fold the mapped dimension into the batch"
        )


def int32_lengths(name, lengths, device, batch=None):
    """cu_seqlens (batch + 1,), or one length per sequence if `batch` is given, as the kernels read
    them: int32, contiguous, on `device`."""
    if not isinstance(lengths, Tensor):
        raise TypeError(f"{name} must be an int32 tensor, got {type(lengths).__name__}")
    if lengths.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {lengths.dtype}")
    if batch is not None and tuple(lengths.shape) != (batch,):
        raise ValueError(
            f"{name} must have shape (batch,) = ({batch},), got {tuple(lengths.shape)}"
        )
    if batch is None and (lengths.dim() != 1 or lengths.shape[0] < 1):
        raise ValueError(f"{name} must have shape (batch + 1,), got {tuple(lengths.shape)}")
    if lengths.device != device and lengths.device.type != "cpu":
        raise ValueError(f"{name} must be on {device}, got {lengths.device}")
    return lengths.to(device, torch.int32, non_blocking=True).contiguous()


def int32_table(name, table, device, batch):
    """[batch, columns] int32 with its columns next to each other, on `device`."""
    if not isinstance(table, Tensor):
        raise TypeError(f"{name} must be an int32 tensor, got {type(table).__name__}")
    if table.dtype not in (torch.int32, torch.int64):
        raise TypeError(f"{name} must be int32 (or int64), got {table.dtype}")
    if table.dim() != 2 or table.shape[0] != batch:
        raise ValueError(
            f"{name} must have shape (batch, pages per sequence) with batch = {batch}, got "
            f"{tuple(table.shape)}"
        )
    if table.device != device and table.device.type != "cpu":
        raise ValueError(f"{name} must be on {device}, got {table.device}")
    table = table.to(device, torch.int32, non_blocking=True)
    return table if table.stride(1) == 1 else table.contiguous()


def known(max_seqlen):
    """max_seqlen if it is a number that can be had without waiting for a device."""
    return max_seqlen if isinstance(max_seqlen, (int, torch.SymInt)) else None

"""What calls of one signature share: the problem's checked scalars and the launcher's memo."""

import torch

PLAIN_TYPES = frozenset(
    (bool, int, float, str, type(None), tuple, torch.Size, torch.dtype, torch.device)
)
MAX_KNOWN = 4096
known = {}  # signature of a call -> (the problem's scalars, the launcher's memo)


def signature(tensors, *scalars):
    """What two calls must share for what was checked, and launched, of one to hold for the other;
    None where that cannot be said without a look at data."""
    if torch.compiler.is_compiling() or torch._C._functorch.peek_interpreter_stack() is not None:
        return None
    key = [torch.is_grad_enabled(), *scalars]
    try:
        for tensor in tensors:
            if tensor is None:
                key.append(None)
            elif type(tensor) is torch.Tensor:
                key += (
                    tensor.shape, tensor.stride(), tensor.dtype, tensor.device,
                    tensor.data_ptr() & 15, tensor.requires_grad,
                )  # fmt: skip
            else:
                return None
    except RuntimeError:  # nested, sparse: there are no strides
        return None
    return tuple(key)


def find(key):
    """-> what is known of the calls of this signature, or None"""
    try:
        return known.get(key)
    except TypeError:  # a list among the options
        return None


def keep(key, scalars):
    """Let calls of this signature, if they are on a GPU, skip the checks. -> their memo for the
    launcher, or None"""
    if key is None or not all(type(part) in PLAIN_TYPES for part in key):
        return None
    if any(type(part) is torch.device and part.type != "cuda" for part in key):
        return None
    if len(known) >= MAX_KNOWN:
        known.clear()
    memo = {}
    known[key] = (scalars, memo)
    return memo

"""From padded batches to packed sequences and back: the functions of flash_attn.bert_padding."""

import torch
import torch.nn.functional as F


class _Gather(torch.autograd.Function):
    """Rows `indices` of x; the indices do not repeat, so the gradient is a scatter, not a sum."""

    @staticmethod
    def forward(x, indices):
        return x.index_select(0, indices)

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, indices = inputs
        ctx.rows = x.shape[0]
        ctx.save_for_backward(indices)

    @staticmethod
    def backward(ctx, grad):
        return _Scatter.apply(grad, ctx.saved_tensors[0], ctx.rows), None


class _Scatter(torch.autograd.Function):
    """`rows` rows, of which `indices` are those of x and the others 0."""

    @staticmethod
    def forward(x, indices, rows):
        return x.new_zeros((rows, *x.shape[1:])).index_copy_(0, indices, x)

    @staticmethod
    def setup_context(ctx, inputs, output):
        ctx.save_for_backward(inputs[1])

    @staticmethod
    def backward(ctx, grad):
        return _Gather.apply(grad, ctx.saved_tensors[0]), None, None


def index_first_axis(x, indices):
    """Rows of x, differentiable, without the sort that torch's x[indices] needs backward.

    Arguments:
        x: [rows, ...]
        indices: (n,) int64, none of them twice.

    Returns:
        [n, ...]
    """
    if indices.dim() != 1 or indices.dtype != torch.int64:
        raise ValueError(f"indices must be (n,) int64, got {tuple(indices.shape)} {indices.dtype}")
    return _Gather.apply(x, indices)


def unpad_input(hidden_states, attention_mask, unused_mask=None):
    """Keep the tokens that a mask selects, packed without padding.

    Counting the tokens synchronises with the device.

    Arguments:
        hidden_states: [batch, seqlen, ...]
        attention_mask: [batch, seqlen] bool or int, nonzero where a token is valid.
        unused_mask: likewise, nonzero where a token is allocated and not used; it takes up room in
            the packed tensor but is not counted in seqused. Nowhere nonzero together with
            attention_mask.

    Returns:
        hidden_states: [total, ...], the tokens that either mask selects.
        indices: (total,) int64, their places in the flattened [batch * seqlen].
        cu_seqlens: (batch + 1,) int32, for flash_attn_varlen_func.
        max_seqlen: int, the most tokens of one sequence.
        seqused: (batch,) int32, the tokens of each sequence that attention_mask selects.
    """
    _check_mask("attention_mask", attention_mask, hidden_states)
    allocated = attention_mask != 0
    seqused = allocated.sum(-1, dtype=torch.int32)
    if unused_mask is not None:
        _check_mask("unused_mask", unused_mask, hidden_states)
        allocated = allocated | (unused_mask != 0)
    indices = allocated.flatten().nonzero().flatten()
    lengths = allocated.sum(-1, dtype=torch.int32)
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(lengths), _longest(lengths), seqused


def unpad_input_for_concatenated_sequences(hidden_states, attention_mask_in_length):
    """`unpad_input` where every row of the batch holds several sequences, one behind the other.

    Arguments:
        hidden_states: [batch, seqlen, ...]
        attention_mask_in_length: [batch, seqlen] int: row b begins with the lengths of the
            sequences in row b of hidden_states, and the rest of it is 0. [[2, 3, 0, 0, 0, 0],
            [3, 2, 0, 0, 0, 0]] says that tokens 0 and 1 of the first row are one sequence and 2 to
            4 another.

    Returns:
        (hidden_states, indices, cu_seqlens, max_seqlen) as of `unpad_input`, a sequence being one
        of the concatenated ones.
    """
    _check_mask("attention_mask_in_length", attention_mask_in_length, hidden_states)
    seqlen = attention_mask_in_length.shape[1]
    positions = torch.arange(seqlen, device=attention_mask_in_length.device)
    allocated = positions < attention_mask_in_length.sum(-1, keepdim=True)
    indices = allocated.flatten().nonzero().flatten()
    lengths = attention_mask_in_length.flatten()
    lengths = lengths[lengths != 0].to(torch.int32)
    packed = index_first_axis(hidden_states.flatten(0, 1), indices)
    return packed, indices, _cumulative(lengths), _longest(lengths)


def pad_input(hidden_states, indices, batch, seqlen):
    """The inverse of `unpad_input`: tokens back in their places, zeros elsewhere.

    Arguments:
        hidden_states: [total, ...]
        indices: (total,) int64, as `unpad_input` returned them.
        batch, seqlen: the padded batch's size.

    Returns:
        [batch, seqlen, ...]
    """
    if indices.shape != hidden_states.shape[:1]:
        raise ValueError(
            f"indices must be ({hidden_states.shape[0]},), one for each row of hidden_states, "
            f"got {tuple(indices.shape)}"
        )
    return _Scatter.apply(hidden_states, indices, batch * seqlen).unflatten(0, (batch, seqlen))


def _check_mask(name, mask, hidden_states):
    if mask.shape != hidden_states.shape[:2]:
        raise ValueError(
            f"{name} must be [batch, seqlen] = {tuple(hidden_states.shape[:2])}, "
            f"got {tuple(mask.shape)}"
        )


def _cumulative(lengths):
    """(n,) lengths -> (n + 1,) int32, beginning with 0"""
    return F.pad(lengths.cumsum(0, dtype=torch.int32), (1, 0))


def _longest(lengths) -> int:
    return int(lengths.max()) if lengths.numel() else 0

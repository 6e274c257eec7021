"""Padded to packed and back, against plain loops."""

import pytest
import torch


def loop_unpad(hidden, keep):
    """Rows of hidden [batch, seqlen, ...] where keep [batch, seqlen] holds, by a loop."""
    rows = [hidden[b, s] for b in range(keep.shape[0]) for s in range(keep.shape[1]) if keep[b, s]]
    return torch.stack(rows) if rows else hidden.new_zeros(0, *hidden.shape[2:])


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64))
@pytest.mark.parametrize("unused", (False, True))
def test_unpad_and_pad(kernel, device, dtype, unused):
    hidden = torch.randn(4, 7, 2, 3, device=device, requires_grad=True)
    lengths = torch.tensor([7, 0, 3, 1], device=device)
    mask = torch.arange(7, device=device) < lengths[:, None]
    extra = (torch.arange(7, device=device) == lengths[:, None]) if unused else None
    keep = mask | extra if unused else mask
    extra = extra.to(dtype) if unused else None

    packed, indices, cu_seqlens, longest, seqused = kernel.unpad_input(
        hidden, mask.to(dtype), extra
    )
    assert torch.equal(packed, loop_unpad(hidden, keep))
    assert cu_seqlens.dtype == seqused.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *keep.sum(1).cumsum(0).tolist()]
    assert longest == 7 and type(longest) is int
    assert seqused.tolist() == lengths.tolist()
    padded = kernel.pad_input(packed, indices, 4, 7)
    assert torch.equal(padded, hidden * keep[..., None, None])

    weight = torch.randn_like(padded)
    (grad,) = torch.autograd.grad(padded, hidden, weight)
    assert torch.equal(grad, weight * keep[..., None, None])


def test_concatenated_sequences(kernel, device):
    hidden = torch.randn(3, 6, 5, device=device)
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    packed, indices, cu_seqlens, longest = kernel.unpad_input_for_concatenated_sequences(
        hidden, lengths.to(device)
    )
    assert torch.equal(packed, torch.cat([hidden[0, :5], hidden[1, :5], hidden[2]]))
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16] and longest == 6
    assert torch.equal(kernel.pad_input(packed, indices, 3, 6)[2], hidden[2])


def test_nothing_selected(kernel, device):
    hidden, mask = torch.randn(2, 3, 4, device=device), torch.zeros(2, 3, device=device)
    packed, indices, cu_seqlens, longest, seqused = kernel.unpad_input(hidden, mask)
    assert packed.shape == (0, 4) and longest == 0 and cu_seqlens.tolist() == [0, 0, 0]
    assert kernel.pad_input(packed, indices, 2, 3).count_nonzero() == 0


def test_second_derivative(kernel):
    """Gather and scatter are each other's gradient, to any order."""
    x = torch.randn(5, 2, dtype=torch.double, requires_grad=True)
    indices = torch.tensor([3, 0, 4])
    gather = lambda t: kernel.index_first_axis(t, indices) ** 2  # noqa: E731
    scatter = lambda t: kernel.pad_input(t[:3], indices, 1, 5) ** 2  # noqa: E731
    for fn in (gather, scatter):
        assert torch.autograd.gradcheck(fn, x) and torch.autograd.gradgradcheck(fn, x)


def test_errors(kernel):
    hidden = torch.randn(2, 3, 4)
    with pytest.raises(ValueError, match=r"attention_mask must be .batch, seqlen. = \(2, 3\)"):
        kernel.unpad_input(hidden, torch.ones(2, 4))
    with pytest.raises(ValueError, match="unused_mask"):
        kernel.unpad_input(hidden, torch.ones(2, 3), torch.ones(3))
    with pytest.raises(ValueError, match="indices must be .n,. int64"):
        kernel.index_first_axis(hidden, torch.ones(2))
    with pytest.raises(ValueError, match="indices must be .2,."):
        kernel.pad_input(hidden, torch.arange(3), 1, 3)


def test_through_attention(kernel, device):
    """unpad, attend, pad: what a padded batch's own rows would give."""
    lengths = (5, 2, 7)
    q = torch.randn(3, 7, 2, 16, device=device)
    mask = torch.arange(7, device=device) < torch.tensor(lengths, device=device)[:, None]
    packed, indices, cu, longest, _ = kernel.unpad_input(q, mask)
    out = kernel.flash_attn_varlen_func(packed, packed, packed, cu, cu, longest, longest)
    out = kernel.pad_input(out, indices, 3, 7)
    for b, length in enumerate(lengths):
        alone = q[b : b + 1, :length]
        want = kernel.flash_attn_func(alone, alone, alone)
        torch.testing.assert_close(out[b : b + 1, :length], want)

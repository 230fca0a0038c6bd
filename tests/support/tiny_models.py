"""Small random models for the tests."""

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

"""A small model, batches with padding, and sums in float64: what the tests of calibration share."""

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from lora_null.models.targets import target_linears

VOCABULARY = 128


def llama(layers=2, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def token_ids(rows, columns, seed=0):
    return torch.randint(0, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded_batches():
    batches = []
    for seed, (rows, columns) in enumerate([(3, 20), (1, 33), (4, 9)]):
        mask = torch.ones(rows, columns, dtype=torch.long)
        mask[0, columns // 2 :] = 0  # right padding
        if rows > 1:
            mask[1, :4] = 0  # left padding
        batches.append({"input_ids": token_ids(rows, columns, seed), "attention_mask": mask})
    return batches


def truth(model, batches, masks=None):
    """Sum every target layer's inputs in float64, and in float32 with torch's own product, layer by layer."""
    inputs = {name: [] for name in target_linears(model)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach().clone()))
        for name, module in target_linears(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    exact, plain = {}, {}
    for name, seen in inputs.items():
        kept = [x.flatten(0, -2) if masks is None else x[mask] for x, mask in zip(seen, masks or seen, strict=True)]
        rows = torch.cat(kept)
        exact[name] = rows.double().T @ rows.double()
        plain[name] = rows.float().T @ rows.float()
    return exact, plain


def assert_as_good_as_torch(covariances, exact, plain):
    for name, wanted in exact.items():
        got = covariances[name]
        assert torch.equal(got, got.T), name
        error, own = (got - wanted).abs().max(), (plain[name] - wanted).abs().max()
        assert error <= 2 * own + 1e-7 * wanted.abs().max(), f"{name}: error {error:.2e}, torch's own {own:.2e}"


def assert_equal(one, other):
    assert one.groups == other.groups and one.tokens == other.tokens
    for key, matrix in one.items():
        assert torch.equal(matrix, other[key]), key

"""What the graph of an adapted layer and of an adapted model keeps for the backward pass."""

import copy

import peft
import pytest
import torch

from lora_null.adapters.layer import attach_adapter
from lora_null.adapters.sharing import share_projections

# Matrices this small are slower on two threads, and much slower beside another process.
pytestmark = pytest.mark.usefixtures("one_thread")

T, D, M, R = 60, 24, 36, 5


def kept_by(forward, exclude):
    """Bytes of distinct memory that the graph of ``forward()`` keeps, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in exclude}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = tensor.numel() * tensor.itemsize, tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        alive = forward()
    del alive
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("frozen_a", [True, False])
def test_kept_activations_of_one_layer(frozen_a):
    """With A frozen S stands for x: the layer keeps ``T r`` numbers of its own, and no copy of x."""
    linear = torch.nn.Linear(D, M, bias=False)
    layer = attach_adapter(linear, torch.randn(R, D), torch.randn(M, R), train_a=not frozen_a)
    x = torch.randn(T, D, requires_grad=True)
    assert kept_by(lambda: layer(x), layer.parameters()) == 4 * T * (R if frozen_a else D + R)


def adapted(model, kind, train_a):
    """Adapters on every linear of a LLaMA's layers: PEFT's (``kind == "peft"``) or ours, in one row space per input."""
    model = copy.deepcopy(model)
    if kind == "peft":
        config = peft.LoraConfig(r=R, lora_alpha=R, target_modules="all-linear")
        model = peft.get_peft_model(model, config)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_B" in name or (train_a and "lora_A" in name))
        return model
    model.requires_grad_(False)
    for block in model.model.layers:
        for parent in (block.self_attn, block.mlp):
            shared = torch.randn(R, block.self_attn.q_proj.in_features)
            for name, linear in list(parent.named_children()):
                if isinstance(linear, torch.nn.Linear):
                    same = name in ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
                    lora_A = shared if same else torch.randn(R, linear.in_features)
                    attach_adapter(linear, lora_A.clone(), torch.zeros(linear.out_features, R), train_a=train_a)
    assert share_projections(model) == 2 * len(model.model.layers)
    return model


def constants(model):
    """Parameters, and the groups' r x r factors: held once for the life of the model."""
    groups = {id(g): g for m in model.modules() if (g := getattr(m, "projection_group", None)) is not None}
    for group in groups.values():
        yield from (mixing for _, mixing, *_ in group._mixings.values())
    yield from model.parameters()


def test_a_llama_layer_keeps_less_than_with_peft(llama):
    """Frozen A: below PEFT's usual (trained) adapters by the x of every linear, below PEFT's frozen ones by S."""
    model = llama()
    batch, length = 8, 64
    ids = torch.randint(97, (batch, length), generator=torch.Generator().manual_seed(0))
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()

    def kept(kind, train_a):
        made = adapted(model, kind, train_a)
        made(inputs_embeds=embedded)
        return kept_by(lambda: made(inputs_embeds=embedded).logits, constants(made))

    config, layers = model.config, len(model.model.layers)
    tokens = batch * length
    eager, eager_frozen, ours = kept("peft", True), kept("peft", False), kept("ours", False)
    # Two normalised hidden states and the input of down_proj; attention keeps the input of o_proj in any case.
    not_kept = tokens * (2 * config.hidden_size + config.intermediate_size)
    shared = tokens * 3 * R  # S of k, v and up
    assert eager_frozen - ours == 4 * layers * shared
    assert eager - ours >= 4 * layers * (not_kept + shared)

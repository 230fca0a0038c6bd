"""The written model of bytes and FLOPs against what torch executes and keeps."""

import copy
from math import prod

import peft
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lora_null.layers import attach_adapter
from lora_null.ops import vendor
from lora_null.ops.traffic import Traffic, group_traffic, linear_traffic
from lora_null.projection_groups import share_projections

# Matrices this small are slower on two threads, and much slower beside another process.
pytestmark = pytest.mark.usefixtures("one_thread")

T, D, M, R = 60, 24, 36, 5


class Count(TorchDispatchMode):
    """Bytes read and written by every operator, and FLOPs of the products; views cost nothing."""

    def __init__(self):
        super().__init__()
        self.bytes = self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if name in ("t", "detach", "view", "transpose", "alias", "new_empty", "empty", "expand", "_unsafe_view"):
            return out
        tensors = [t for t in tree_leaves(args) if isinstance(t, torch.Tensor)]
        if name == "addmm_" and (kwargs or {}).get("beta") == 0:
            tensors = tensors[1:]
        if name == "mul_" and tensors[0].numel() == M * R:
            return out  # the scaling of dB, which a GEMM's alpha or a kernel does for nothing
        assert name in ("mm", "addmm_", "mul", "mul_", "add", "add_"), f"unexpected operator {name}"
        self.bytes += sum(t.numel() * t.itemsize for t in (*tensors, out))
        if "mm" in name:
            self.flops += 2 * prod(tensors[-2].shape) * tensors[-1].shape[1]
        return out


def peft_layer(frozen_a):
    base = torch.nn.Sequential(torch.nn.Linear(D, M, bias=False))
    config = peft.LoraConfig(r=R, lora_alpha=2 * R, target_modules=["0"])
    layer = peft.get_peft_model(base, config).base_model.model[0]
    layer.lora_A["default"].weight.requires_grad_(not frozen_a)
    return layer


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
def test_the_eager_path_is_what_peft_executes(frozen_a):
    layer = peft_layer(frozen_a)
    x = torch.randn(T, D, requires_grad=True)
    model = linear_traffic("eager", T, D, M, R, frozen_a=frozen_a, itemsize=4)
    with Count() as forward:
        y = layer(x)
    dy = torch.randn_like(y)
    with Count() as backward:
        y.backward(dy)
    assert forward.bytes == model.forward_bytes
    assert backward.bytes == model.backward_bytes
    assert forward.flops + backward.flops == model.flops
    assert kept_by(lambda: layer(x), layer.parameters()) == model.kept_bytes


@pytest.mark.parametrize("frozen_a", [True, False])
def test_the_accumulate_path_is_what_the_vendor_backend_executes(frozen_a):
    x, W, A, B, dy = (torch.randn(*s) for s in ((T, D), (M, D), (R, D), (M, R), (T, M)))
    model = linear_traffic("accumulate", T, D, M, R, frozen_a=frozen_a, itemsize=4)
    with Count() as forward:
        (S,) = vendor.project(x, (A,))
        vendor.forward(x, W, S, B, scaling=2.0)
    with Count() as backward:
        dS, _ = vendor.backward_dy(dy, S, B, scaling=2.0, need_dS=True, need_dB=True)
        vendor.backward_dx(dy, W, dS, A)
        if not frozen_a:
            vendor.backward_dA(dS, x)
    assert forward.bytes == model.forward_bytes
    assert backward.bytes == model.backward_bytes
    assert forward.flops + backward.flops == model.flops


@pytest.mark.parametrize("frozen_a", [True, False])
def test_kept_activations_of_one_layer(frozen_a):
    linear = torch.nn.Linear(D, M, bias=False)
    layer = attach_adapter(linear, torch.randn(R, D), torch.randn(M, R), train_a=not frozen_a)
    x = torch.randn(T, D, requires_grad=True)
    model = linear_traffic("fused", T, D, M, R, frozen_a=frozen_a, itemsize=4)
    assert kept_by(lambda: layer(x), layer.parameters()) == model.kept_bytes


def test_extra_passes_are_those_of_the_roofline():
    """Passes over a (T, d) matrix beyond the base layer's: 16 eager, 8 accumulating, 3 fused, one less without dA."""
    n, rank = 1 << 12, 1
    for path, frozen_a, units in [
        ("eager", False, 16), ("accumulate", False, 8), ("fused", False, 3),
        ("eager", True, 15), ("accumulate", True, 7), ("fused", True, 2),
    ]:  # fmt: skip
        extra = linear_traffic(path, n, n, n, rank, frozen_a=frozen_a, itemsize=1).bytes
        extra -= linear_traffic("base", n, n, n, rank, itemsize=1).bytes
        assert extra / n**2 == pytest.approx(units, abs=0.01)


def test_a_group_projects_once():
    ms = (M, 12, 12)
    single = sum((linear_traffic("fused", T, D, m, R) for m in ms), Traffic(0, 0, 0, 0))
    group = group_traffic("fused", T, D, ms, R)
    # Two projections x A^T and two products dS A less.
    assert single.flops - group.flops == 2 * 2 * 2 * T * D * R
    assert single.kept_bytes - group.kept_bytes == 2 * 2 * T * R
    assert single.forward_bytes - group.forward_bytes == 2 * 2 * (T * D + T * R + R * D)


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

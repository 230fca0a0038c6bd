"""Whole models under torch.compile and torch.export: same numbers, one graph, no compiling from step to step."""

import copy
from functools import partial

import pytest
import torch
from adapter_tools import trained
from torch._dynamo.utils import counters

import lora_null
from lora_null.adapters import export_adapter
from lora_null.adapters.layer import adapter_layers, disable_adapters

# Matrices this small are slower on two threads, and much slower beside another process.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No program of another test; every fallback is an error."""
    monkeypatch.setenv("LORA_NULL_STRICT", "1")
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def compiled(model, **options):
    return torch.compile(model, **{"fullgraph": True, "backend": "aot_eager", **options})


def step(model, ids, called=None):
    """Return the loss and every gradient."""
    model.zero_grad()
    loss = (model if called is None else called)(input_ids=ids, labels=ids, use_cache=False).loss
    loss.backward()
    return {"loss": loss.detach()} | {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same(got, want, rtol=1e-4):
    assert set(got) == set(want)
    for name, value in want.items():
        assert (got[name] - value).norm() <= rtol * value.norm(), name


@pytest.mark.parametrize("freeze_a", [True, False])
@pytest.mark.parametrize("backend", ["auto", "cublas"])
def test_training_steps(monkeypatch, llama, token_batches, freeze_a, backend):
    """Plain operations traced, and the custom operations, which are the only way on CUDA."""
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", backend)
    model = trained(llama, token_batches, freeze_a=freeze_a).train()
    twin = copy.deepcopy(model)
    called = compiled(model, dynamic=False)
    trainable = [[p for p in it.parameters() if p.requires_grad] for it in (model, twin)]
    optimizers = [torch.optim.AdamW(parameters, lr=1e-3) for parameters in trainable]
    for ids in token_batches(3):
        assert_same(step(model, ids, called), step(twin, ids))
        for optimizer in optimizers:
            optimizer.step()
    assert_same(dict(model.named_parameters()), dict(twin.named_parameters()))
    assert counters["stats"]["unique_graphs"] == 1


def test_sequence_lengths(llama, token_batches):
    model = trained(partial(llama, num_hidden_layers=1), token_batches).train()
    called = compiled(model)
    # Lengths on both sides of what sharing a projection would need.
    for length in (4, 16, 40, 3, 64):
        ids = token_batches(1, 2, length)[0]
        assert_same(step(model, ids, called), step(model, ids))
    assert counters["stats"]["unique_graphs"] == 2


def test_checkpointed_blocks(llama, token_batches):
    model = trained(llama, token_batches).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    # transformers' hook on the embeddings, which only reentrant checkpoints need, is no part of one whole graph
    model.disable_input_require_grads()
    ids = token_batches(1)[0]
    assert_same(step(model, ids, compiled(model)), step(model, ids))


def test_dropout_draws_anew(llama, token_batches):
    model = trained(llama, token_batches, lora_dropout=0.3).train()
    called, ids = compiled(model), token_batches(1)[0]
    found = []
    for seed, it in ((1, called), (1, called), (2, called), (1, None)):
        torch.manual_seed(seed)
        found.append(step(model, ids, it))
    first, again, other, eager = found
    assert_same(again, first, rtol=0)
    assert_same(first, eager)
    assert other["loss"] != first["loss"]
    assert counters["stats"]["unique_graphs"] == 1


@torch.no_grad()
def test_what_is_changed_after_compiling_is_noticed(llama, token_batches):
    llama = partial(llama, num_hidden_layers=1)
    model, base, ids = trained(llama, token_batches), llama(), token_batches(1)[0]
    called = compiled(model)

    def check(want):
        torch.testing.assert_close(called(ids).logits, want(ids).logits)

    check(model)
    with disable_adapters(model):
        check(base)
    check(model)
    for factor in (2.0, 1.5):
        for layer in adapter_layers(model).values():
            layer.scaling *= factor
        check(model)
    with_adapter = model(ids).logits
    lora_null.merge(called)
    check(model)
    torch.testing.assert_close(called(ids).logits, with_adapter)


def test_a_compiled_model_is_calibrated_adapted_and_saved(llama, token_batches, tmp_path):
    """Under the names of the model itself, and without a program for every watched layer."""
    llama = partial(llama, num_hidden_layers=1)
    batches = token_batches()
    ids = batches[0]
    want = lora_null.calibrate(llama(), batches, progress=False)
    model = llama()
    for layer in model.model.layers:
        layer.compile(backend="aot_eager")
    called = compiled(model, fullgraph=False)
    called(ids)
    counters.clear()
    covariances = lora_null.calibrate(called, batches, progress=False)
    by_function = lora_null.calibrate(called, lambda: [called(ids) for ids in batches], progress=False)
    assert not counters["stats"]
    assert covariances.groups == by_function.groups == want.groups
    assert all(torch.equal(covariances[key], matrix) for key, matrix in want.items())
    config = lora_null.LoraNullConfig(r=4)
    assert lora_null.initialize(called, covariances, config, progress=False) is called
    for layer in adapter_layers(model).values():
        torch.nn.init.normal_(layer.lora_B.weight, std=0.1)
    logits = called(ids).logits
    torch.testing.assert_close(logits, model(ids).logits)
    lora_null.save_adapter(called, tmp_path / "adapter")
    fresh = compiled(llama())
    assert lora_null.load_adapter(fresh, tmp_path / "adapter") is fresh
    torch.testing.assert_close(fresh(ids).logits, logits)


@pytest.mark.parametrize("strict", [True, False])
def test_an_exported_model_needs_nothing_of_this_package(llama, token_batches, strict):
    model, ids = trained(llama, token_batches), token_batches(1)[0]

    class Logits(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, ids):
            return self.model(input_ids=ids, use_cache=False).logits

    length = {"ids": {1: torch.export.Dim("length", min=2, max=64)}}
    program = torch.export.export(Logits(), (ids,), strict=strict, dynamic_shapes=length)
    assert not [node for node in program.graph.nodes if "lora_null" in str(node.target) and node.op == "call_function"]
    for shorter in (ids, ids[:, :3]):
        torch.testing.assert_close(program.module()(shorter), model(shorter).logits)


def test_trainer(llama, token_batches, tmp_path):
    from transformers import Trainer, TrainingArguments

    examples = [{"input_ids": ids[0], "labels": ids[0]} for ids in token_batches()]
    weights = []
    for compile_ in (True, False):
        model = trained(llama, token_batches).train()
        arguments = TrainingArguments(
            str(tmp_path / str(compile_)),
            max_steps=3,
            per_device_train_batch_size=2,
            torch_compile=compile_,
            torch_compile_backend="aot_eager" if compile_ else None,
            use_cpu=True,
            report_to=[],
            disable_tqdm=True,
            save_steps=3,
        )
        Trainer(model, arguments, train_dataset=examples).train()
        weights.append(dict(model.named_parameters()))
    assert counters["stats"]["unique_graphs"]
    assert_same(*weights)
    export_adapter(tmp_path / "True" / "checkpoint-3", tmp_path / "adapter")
    loaded, ids = lora_null.load_adapter(llama(), tmp_path / "adapter"), token_batches(1)[0]
    trained_model = trained(llama, token_batches)
    trained_model.load_state_dict(weights[0])
    torch.testing.assert_close(loaded(ids).logits, trained_model(ids).logits)


def test_peft_layers(llama, token_batches):
    import peft

    from lora_null.peft import use_fused_kernels

    llama = partial(llama, num_hidden_layers=1)

    def adapted():
        torch.manual_seed(0)
        return peft.get_peft_model(llama(), peft.LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False))

    model, ids, base = adapted().train(), token_batches(1)[0], llama()
    assert use_fused_kernels(model).patched == 7
    called = compiled(model)
    assert_same(step(model, ids, called), step(adapted().train(), ids))
    with model.disable_adapter(), torch.no_grad():
        torch.testing.assert_close(called(ids).logits, base(ids).logits)

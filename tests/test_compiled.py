"""Whole models under torch.compile and torch.export: same numbers, one graph, no compiling from step to step."""

import copy
from functools import partial

import pytest
import torch
from adapter_tools import trained
from torch._dynamo.utils import counters

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

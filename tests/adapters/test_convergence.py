"""A hundred optimiser steps on a small LLaMA: our layers and plain torch give the same losses within rounding."""

import copy

import pytest
import torch
from torch import nn

from lora_null.adapters.layer import attach_adapter
from lora_null.adapters.sharing import share_projections

# Matrices this small are slower on two threads, and much slower beside another process.
pytestmark = pytest.mark.usefixtures("one_thread")

STEPS, RANK = 100, 4


class PlainLora(nn.Module):
    """The adapted layer as everybody writes it."""

    def __init__(self, linear, lora_A, lora_B, frozen_a):
        super().__init__()
        self.linear = linear
        self.lora_A = nn.Parameter(lora_A, requires_grad=not frozen_a)
        self.lora_B = nn.Parameter(lora_B)

    def forward(self, x):
        return self.linear(x) + (x @ self.lora_A.to(x.dtype).T) @ self.lora_B.to(x.dtype).T


def factors(model):
    """Starting factors by layer name: ``A_i`` of orthogonal rows that span one space per tensor read, B zero."""
    g = torch.Generator().manual_seed(0)

    def orthonormal(n):
        return torch.linalg.qr(torch.randn(n, RANK, generator=g))[0]

    made, bases = {}, {}
    for name, linear in model.named_modules():
        if isinstance(linear, nn.Linear) and name != "lm_head":
            parent, _, own = name.rpartition(".")
            key = parent if own not in ("o_proj", "down_proj") else name
            if key not in bases:
                bases[key] = orthonormal(linear.in_features)
            lora_A = RANK**0.5 * orthonormal(RANK) @ bases[key].T
            made[name] = lora_A, torch.zeros(linear.out_features, RANK)
    return made


def train(model, batches):
    """Return the losses of AdamW on whatever is trainable."""
    adapters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(adapters, lr=1e-2, weight_decay=0.0)
    losses = []
    for ids in batches:
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return torch.tensor(losses, dtype=torch.float64)


@pytest.mark.parametrize("frozen_a", [True, False], ids=["frozen_a", "trained_a"])
def test_same_losses_as_plain_torch(llama, frozen_a):
    base = llama(hidden_size=32, intermediate_size=48, vocab_size=31, initializer_range=0.2).requires_grad_(False)
    start = factors(base)
    g = torch.Generator().manual_seed(1)
    # A sequence with structure, so that there is something to learn: each token is the last plus a step.
    batches = torch.randint(1, 4, (STEPS, 4, 16), generator=g).cumsum(-1) % 31

    def plain(dtype, stored=None):
        model = copy.deepcopy(base).to(stored).to(dtype)
        factor_dtype = torch.promote_types(dtype, torch.float32)
        for name, pair in start.items():
            layer = PlainLora(model.get_submodule(name), *(f.to(factor_dtype) for f in pair), frozen_a)
            model.set_submodule(name, layer)
        return train(model, batches)

    def ours(dtype):
        model = copy.deepcopy(base).to(dtype)
        for name, (lora_A, lora_B) in start.items():
            attach_adapter(model.get_submodule(name), lora_A.clone(), lora_B.clone(), train_a=not frozen_a)
        assert share_projections(model) == (2 * base.config.num_hidden_layers if frozen_a else 0)
        return train(model, batches)

    for dtype in (torch.float32, torch.bfloat16):
        truth = plain(torch.float64, stored=dtype)
        assert truth[-10:].mean() < 0.9 * truth[:10].mean(), "nothing was learnt"
        error, torch_error = (ours(dtype) - truth).abs(), (plain(dtype) - truth).abs()
        slack = torch.finfo(dtype).eps
        assert error[0] <= 2 * torch_error[0] + slack, f"{dtype}, first step"
        # Rounding errors grow along a run in a way that is a matter of chance: the runs are compared as a whole.
        rms, torch_rms = (e.square().mean().sqrt() for e in (error, torch_error))
        print(f"{dtype}: rms difference to float64 {rms:.2e}, plain torch {torch_rms:.2e}")
        assert rms <= 2 * torch_rms + slack, f"{dtype}: {rms:.3g}, plain torch {torch_rms:.3g}"

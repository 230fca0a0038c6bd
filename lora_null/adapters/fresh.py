"""An adapter at its start, made beside the model: what ``initialize`` and ``save_adapter`` together would write."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch
from torch import Tensor, nn

from .basis import BasisFactor
from .delta import stack
from .extras import Extras
from .files import Adapter
from .save import described
from .start import Start
from .state import AdapterState


def starting_delta(name: str, start: Start, state: AdapterState) -> tuple[Tensor, Tensor]:
    """Return ``(A, B)`` in fp32 with ``B A`` the change of the pre-trained weight of a layer: zero at the start."""
    lora_A, lora_B = start.factors[name]
    scaling = state.config.scaling_of(name)
    if state.config.train == "ab":
        return stack(lora_A, lora_B, scaling, (lora_A, lora_B))
    free = start.directions.get(name)
    A = lora_A if free is None else BasisFactor(lora_A, free).weight.detach()
    return stack(A, torch.zeros_like(lora_B), scaling, None)


def fresh_adapter(model: nn.Module, deltas: Mapping[str, tuple[Tensor, Tensor]], state: AdapterState) -> Adapter:
    """Return the adapter of these deltas on ``model``, which may lie on the device meta."""
    return described(model, deltas, replace(state, stacked=state.config.train == "ab"), Extras())

"""Resume an adapter that lives in PEFT's layers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

from peft import PeftModel
from torch import nn

from ..adapters.basis import factor_within
from ..adapters.load import require_covariances
from ..adapters.start import directions_of
from ..adapters.state import AdapterState, read_state, require_sealed
from ..covariances.covariances import Covariances
from ..models.arguments import PATH, takes
from .basis import BasisLinear
from .initialize import ALIASES, linears_of
from .layers import freeze_lora_A, lora_layers
from .recipe import recipe_of, restore
from .record import remember


@takes(base_model=nn.Module, path=PATH)
def load_trainable(
    base_model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    covariances: Covariances | None = None,
) -> PeftModel:
    """``PeftModel.from_pretrained(..., is_trainable=True)`` that goes on as the run did.

    A stays frozen where it was trained frozen, and the adapter has the scaling and dropout of the run, whatever the
    file made of them. On disk an adapter is relative to the untouched base; on that it is trained, without a shift.

    With ``train="b_in_basis"`` it needs the ``covariances`` of the run, which say which directions are free.

    Raises:
        ValueError: ``lora_null.json`` is damaged, or of a newer format than this version knows; the covariances are
            missing, or not those of the run.
    """
    state = read_state(Path(path))
    require_sealed(Path(path))
    peft_model = PeftModel.from_pretrained(base_model, str(path), adapter_name=adapter_name, is_trainable=True)
    if state is not None:
        go_on(peft_model, state, adapter_name, covariances)
    return peft_model


def go_on(
    peft_model: nn.Module,
    state: AdapterState,
    adapter_name: str = "default",
    covariances: Covariances | None = None,
) -> None:
    """Let an adapter that PEFT has loaded as trainable go on in the mode, scaling and dropout of its run."""
    if state.config.train == "b_in_basis":
        _learn_within(peft_model, state, adapter_name, require_covariances("The adapter", covariances))
    restore(peft_model, adapter_name, state.config)
    if state.config.freeze_a:
        freeze_lora_A(peft_model, adapter_name)
    config = recipe_of(peft_model, adapter_name, state.config)
    remember(peft_model, adapter_name, replace(state, config=config, stacked=False))


def _learn_within(peft_model: nn.Module, state: AdapterState, adapter_name: str, covariances: Covariances) -> None:
    layers = lora_layers(peft_model, adapter_name)
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    directions = directions_of(linears_of(peft_model), ranks, covariances, state.config, aliases=ALIASES)
    weights = {name: layer.lora_A[adapter_name].weight for name, layer in layers.items()}
    factors = {name: factor_within(name, weight, directions[name], BasisLinear) for name, weight in weights.items()}
    for name, layer in layers.items():
        layer.lora_A[adapter_name] = factors[name]

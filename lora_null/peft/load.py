"""Resume an adapter that lives in PEFT's layers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..adapters.basis import factor_within
from ..adapters.layer import refuse_adapted
from ..adapters.load import require_base, require_covariances
from ..adapters.names import WEIGHTS, tensor_names
from ..adapters.start import directions_of
from ..adapters.state import AdapterState, read_state, require_sealed
from ..covariances.covariances import Covariances
from ..models.arguments import PATH, takes
from ..models.identity import fingerprint
from ..models.targets import survey
from ..system.tensors import opened
from .basis import BasisLinear
from .experts import directions_of_experts, names_of
from .initialize import ALIASES, linears_of
from .layers import expert_layers, freeze, freeze_lora_A, lora_layers
from .recipe import recipe_of, restore
from .record import remember


@takes(base_model=nn.Module, path=PATH)
def load_trainable(
    base_model: nn.Module,
    path: str | os.PathLike,
    adapter_name: str = "default",
    covariances: Covariances | None = None,
    *,
    verify_base: bool = True,
) -> PeftModel:
    """``PeftModel.from_pretrained(..., is_trainable=True)`` that goes on as the run did.

    A stays frozen where it was trained frozen, and the adapter has the scaling and dropout of the run, whatever the
    file made of them. On disk an adapter is relative to the untouched base; on that it is trained, without a shift.

    With ``train="b_in_basis"`` it needs the ``covariances`` of the run, which say which directions are free.
    ``verify_base`` compares the base weights with the fingerprints saved with the adapter and the covariances.

    Raises:
        ValueError: ``lora_null.json`` is damaged, or of a newer format than this version knows; the adapter was trained
            on other weights; the covariances are missing, or not those of the run.
    """
    state = read_state(Path(path))
    require_sealed(Path(path))
    targets = survey(base_model).matrices
    refuse_adapted(targets)
    if verify_base and state is not None:
        with opened(Path(path) / WEIGHTS, "the adapter's weights") as file:
            adapted = set(file.keys())
        linears = {name: target.linear for name, target in targets.items()}
        parameters = state.config.target_parameters or ()
        own = {
            name: linear
            for name, linear in linears.items()
            if tensor_names(name)[0] in adapted or name.rpartition(".")[0] in parameters
        }
        require_base(base_model, Path(path), state, fingerprint(own))
    peft_model = PeftModel.from_pretrained(base_model, str(path), adapter_name=adapter_name, is_trainable=True)
    if state is not None:
        go_on(peft_model, state, adapter_name, covariances, verify_base=verify_base)
    return peft_model


def go_on(
    peft_model: nn.Module,
    state: AdapterState,
    adapter_name: str = "default",
    covariances: Covariances | None = None,
    *,
    verify_base: bool = True,
) -> None:
    """Let an adapter that PEFT has loaded as trainable go on in the mode, scaling and dropout of its run."""
    if state.config.train == "b_in_basis":
        known = require_covariances("The adapter", covariances)
        _learn_within(peft_model, state, adapter_name, known, verify_base)
    restore(peft_model, adapter_name, state.config)
    if state.config.freeze_a:
        freeze_lora_A(peft_model, adapter_name)
        for layer in _started(peft_model, state, adapter_name).values():
            freeze(layer, adapter_name)
    config = recipe_of(peft_model, adapter_name, state.config)
    remember(peft_model, adapter_name, replace(state, config=config, stacked=False))


def _started(peft_model: nn.Module, state: AdapterState, adapter_name: str) -> dict[str, Any]:
    """Return the adapters of experts that began in null spaces."""
    layers = expert_layers(peft_model, adapter_name)
    return {name: layers[name] for name in state.config.target_parameters or () if name in layers}


def _learn_within(
    peft_model: nn.Module, state: AdapterState, adapter_name: str, covariances: Covariances, verify_base: bool
) -> None:
    layers = lora_layers(peft_model, adapter_name)
    experts = _started(peft_model, state, adapter_name)
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    ranks |= {name: experts[owner].r[adapter_name] for name, owner in names_of(experts).items()}
    linears = linears_of(peft_model)
    directions = directions_of(linears, ranks, covariances, state.config, aliases=ALIASES, verify_base=verify_base)
    within: dict[str, Any] = {name: directions[name] for name in layers}
    within |= {name: directions_of_experts(name, layer, directions) for name, layer in experts.items()}
    layers |= experts
    weights = {name: layer.lora_A[adapter_name].weight for name, layer in layers.items()}
    factors = {name: factor_within(name, weight, within[name], BasisLinear) for name, weight in weights.items()}
    for name, layer in layers.items():
        layer.lora_A[adapter_name] = factors[name]

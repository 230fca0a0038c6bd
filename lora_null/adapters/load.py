"""Load an adapter folder into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import LoraNullConfig
from ..models.identity import fingerprint
from ..models.refusals import refuse_sharded, require_writable
from ..models.weights import home_of, shared_weights
from ..models.wrappers import uncompiled
from .delta import shift_base, unstack
from .files import Adapter
from .layer import adapter_layers, attach_adapter, require_adaptable
from .sharing import share_projections
from .state import OWN_CONFIG, AdapterState, set_state


# Tensors made in inference mode could never be trained.
@torch.inference_mode(False)
def load_adapter(
    base_model: nn.Module,
    path: str | os.PathLike,
    *,
    is_trainable: bool = False,
    adapter_dtype: torch.dtype = torch.float32,
    verify_base: bool = True,
) -> nn.Module:
    """Attach a saved LoRA adapter, ours or any plain one in PEFT's format, to the untouched base model in place.

    Args:
        base_model: The pre-trained model that the adapter was trained on.
        path: An adapter folder.
        is_trainable: Go on training, in the mode that the adapter was trained in: with A frozen again, or on
            the base shifted as before. The default freezes everything.
        adapter_dtype: Of the factors in memory.
        verify_base: Compare the base weights with the fingerprint saved with the adapter.

    Returns:
        The same model. Nothing is changed when an error is raised.

    Raises:
        FileNotFoundError: ``path`` is not an adapter folder.
        ValueError: A file is damaged or foreign, or the adapter belongs to another model.
    """
    wrapper, base_model, folder = base_model, uncompiled(base_model), Path(path)
    adapter = Adapter.read(folder)
    factors, state = adapter.factors, adapter.state
    linears = _matching_linears(base_model, factors, folder)
    refuse_sharded(linears, "load_adapter")
    require_adaptable(linears)
    base = fingerprint(linears)
    if verify_base and base and state and state.base_fingerprint and base != state.base_fingerprint:
        raise ValueError(
            f"{folder} was trained on other weights than those of this {type(base_model).__name__}: the shapes agree, "
            "the values do not. Load the base model that the adapter was trained on "
            f"({adapter.base_model!r}), unmerged and without other adapters, or pass "
            "verify_base=False if the difference is intended: a base that was rounded to float16, say."
        )
    config = state.config if state else _config_of(adapter)
    shifted = state is not None and state.stacked and is_trainable
    if shifted:
        shared = shared_weights(base_model)
        for name, linear in linears.items():
            require_writable(name, linear, "Training A on", shared)
            if factors[name][0].shape[0] % 2:
                raise ValueError(
                    f"{folder / OWN_CONFIG} says that the adapter has the rank-2r form, but that of {name} has the odd "
                    f"rank {factors[name][0].shape[0]}. The two files do not belong together; save the adapter again."
                )
    else:
        # On disk the scaling is part of B. Training goes on with that of the run, so that a step of B means the same.
        r = adapter.r
        scaling = config.scaling if is_trainable else adapter.scaling
        config = replace(config, r=r, lora_alpha=scaling * r)
    base_model.requires_grad_(False)
    for name, linear in linears.items():
        home = home_of(linear)
        lora_A, lora_B = (factor.to(home, torch.float32) for factor in factors[name])
        if shifted:
            _resume_shifted(linear, lora_A.to(adapter_dtype), lora_B.to(adapter_dtype), config)
            continue
        attach_adapter(
            linear,
            lora_A.to(adapter_dtype),
            (lora_B * (adapter.scaling / config.scaling)).to(adapter_dtype),
            scaling=config.scaling,
            train_a=is_trainable and not config.freeze_a,
            lora_dropout=config.lora_dropout,
        )
        linear.lora_B.requires_grad_(is_trainable)
    share_projections(base_model)
    set_state(base_model, AdapterState(config, base, state.energies if state else {}))
    return wrapper


def _resume_shifted(linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, config: LoraNullConfig) -> None:
    r = lora_A.shape[0] // 2
    trained_A, change_B, initial_A, initial_B = unstack(lora_A, lora_B, config.scaling, r)
    shift_base(linear, initial_A, initial_B, -config.scaling)
    attach_adapter(
        linear,
        trained_A.clone(),
        change_B + initial_B,
        scaling=config.scaling,
        train_a=True,
        lora_dropout=config.lora_dropout,
        initial=(initial_A, initial_B),
    )


def _config_of(adapter: Adapter) -> LoraNullConfig:
    """Return the configuration with which the training of another program's adapter goes on."""
    alpha = adapter.scaling * adapter.r
    return LoraNullConfig(r=adapter.r, lora_alpha=alpha, freeze_a=False, lora_dropout=adapter.lora_dropout)


def _matching_linears(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path
) -> dict[str, nn.Linear]:
    if adapted := adapter_layers(model):
        raise ValueError(
            f"The model carries {len(adapted)} lora_null adapters already. Merge them first (lora_null.merge), or load "
            "the base model afresh."
        )
    modules = dict(model.named_modules())
    for name, (lora_A, lora_B) in factors.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            found = "no module" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                f"{folder} adapts {name}, "
                f"which is {found} in this {type(model).__name__}; expected a linear layer. The "
                "adapter belongs to another model."
            )
        if (lora_B.shape[0], lora_A.shape[1]) != (module.out_features, module.in_features):
            raise ValueError(
                f"{folder} adapts {name} with d={lora_A.shape[1]}, m={lora_B.shape[0]}, but the layer has "
                f"d={module.in_features}, m={module.out_features}. The adapter belongs to another model."
            )
    return {name: modules[name] for name in modules if name in factors}

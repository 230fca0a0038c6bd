"""Save an adapter that lives in PEFT's layers."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model_state_dict
from torch import Tensor, nn

from ..adapters.extras import Extras
from ..adapters.files import Adapter
from ..adapters.names import PREFIX, published_name, short_names, tensor_names
from ..adapters.plain import shifting_start
from ..adapters.save import save_from
from ..adapters.state import AdapterState
from ..config import LoraNullConfig
from ..models.arguments import PATH, takes
from ..models.weights import gathered
from ..models.wrappers import plain_name, unwrapped
from .basis import BasisLinear, drop_coefficients
from .complete import named_tensors, require_complete
from .layers import base_names, base_of, expert_layers, holds_experts, holds_linear, lora_layers, lora_modules
from .recipe import recipe_of
from .record import held_before, recalled
from .untouched import change_of, is_stacked, pattern_of

# Settings of PEFT under which more than LoRA on linear layers was trained, or names mean something else.
_BESIDE = (
    "bias",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "target_parameters",
    "layer_replication",
    "fan_in_fan_out",
    "ensure_weight_tying",
)


@takes(peft_model=nn.Module, path=PATH)
def save_adapter(
    peft_model: nn.Module,
    path: str | os.PathLike,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write the adapter as plain LoRA on the untouched base; see :func:`lora_null.save_adapter`.

    With a frozen A this is what ``save_pretrained`` writes, with uniform rank and the scaling folded in. With a
    trained A it is the rank-``2 r`` form, which does not cancel in low precision as PEFT's conversion does.

    What PEFT trains beside LoRA on linear layers (``modules_to_save``, ``lora_bias``, ``trainable_token_indices``,
    embeddings, ``target_parameters``) is written as PEFT does and for PEFT to load; other readers may refuse it.

    Args:
        peft_model: Made by ``get_peft_model``, ``add_adapter`` or ``inject_adapter_in_model``.
        path: The folder to make; the adapter appears in it whole or not at all.
        adapter_name: Of the adapter.
        dtype: Of the tensors on disk; the default keeps fp32.
        overwrite: Replace an existing adapter folder.
        base_model_name_or_path: Written for readers that load the base by it; the default is the model's own name,
            without the leading folders of an absolute path.

    Raises:
        ValueError: Something was trained that PEFT's format cannot hold, or the adapter is no plain LoRA. Nothing is
            written then.
        FileExistsError: ``path`` exists and must not be replaced.
    """
    peft_model = unwrapped(peft_model)
    lora_layers(peft_model, adapter_name)  # which says if there are none
    require_complete(peft_model, *held_before(peft_model))
    adapter = of_peft(peft_model, adapter_name, base_model_name_or_path)
    save_from(peft_model, adapter, path, dtype=dtype, overwrite=overwrite)


def changes_of(peft_model: nn.Module, adapter_name: str = "default") -> dict[str, tuple[Tensor, Tensor]]:
    """Return by layer the change of the untouched weight as ``A (k, d)`` and ``B (m, k)``; sharded ones are gathered.

    Raises:
        ValueError: The adapter is no plain LoRA.
    """
    layers = lora_layers(peft_model, adapter_name)
    config: Any = peft_model.peft_config[adapter_name]  # type: ignore[index, union-attr]
    if start := shifting_start(getattr(config, "init_lora_weights", None)):
        raise ValueError(
            f"The adapter {adapter_name!r} began with init_lora_weights={start!r}, by which PEFT moved the base "
            "weights, so that it fits no other base. Convert it with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    for name, layer in lora_modules(peft_model):
        if adapter_name in layer.lora_variant:
            raise ValueError(
                f"{name} uses {type(layer.lora_variant[adapter_name]).__name__}; expected plain LoRA. Save it with the "
                "model's own save_pretrained."
            )
    return {
        plain_name(name): change_of(
            layer, adapter_name, layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
        )
        for name, layer in layers.items()
        if holds_linear(layer, adapter_name)
    }


def of_peft(peft_model: Any, adapter_name: str = "default", base_model_name_or_path: str | None = None) -> Adapter:
    """Return an adapter of ``peft_model``, unwrapped, for the untouched base; ValueError as in :func:`changes_of`."""
    factors = changes_of(peft_model, adapter_name)
    layers = lora_layers(peft_model, adapter_name)
    peft_config = peft_model.peft_config[adapter_name]
    default = LoraConfig()
    settings: dict[str, Any] = {
        name: getattr(peft_config, name)
        for name in _BESIDE
        if getattr(peft_config, name, None) != getattr(default, name, None)
    }
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    others: list[str] = []
    r = max((len(lora_A) for lora_A, _ in factors.values()), default=peft_config.r)
    for name, layer in lora_modules(peft_model):
        if adapter_name in layer.r and not holds_linear(layer, adapter_name):
            rank, alpha = pattern_of(name, layer, adapter_name)
            if holds_experts(layer):
                # Their scaling is part of B, too: not every reader knows patterns.
                rank = {key: own for key, own in rank.items() if own != r}
                alpha = dict(rank)
            ranks |= rank
            alphas |= alpha
            others += [] if hasattr(layer, "parameter_name") else [name.removeprefix(PREFIX)]
    if ranks:
        settings |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    state = recalled(peft_model, adapter_name) or AdapterState(LoraNullConfig(freeze_a=False))
    stacked = all(is_stacked(layer, adapter_name, layer.lora_A[adapter_name].weight) for layer in layers.values())
    return Adapter(
        factors,
        short_names(base_names(peft_model), [*factors, *others]),
        base_model_name_or_path or published_name(peft_config.base_model_name_or_path),
        peft_config.task_type,
        replace(state, config=recipe_of(peft_model, adapter_name, state.config), stacked=stacked),
        extras=Extras(others=_beside(peft_model, adapter_name, factors, layers), settings=settings),
    )


def _beside(
    peft_model: Any, adapter_name: str, factors: Mapping[str, Any], layers: Mapping[str, Any]
) -> dict[str, Tensor]:
    """Return what PEFT writes of the adapter beside the factors of linear layers, by name on disk."""
    # The parameters, and not their state dict: where they are divided, it has nothing that could be gathered.
    named = named_tensors(peft_model)
    drop_coefficients(named, adapter_name)
    modules = peft_model.named_modules()
    named |= {f"{plain_name(name)}.weight": part.weight for name, part in modules if isinstance(part, BasisLinear)}
    tensors = get_peft_model_state_dict(peft_model, named, adapter_name)
    if not isinstance(peft_model, PeftModel):
        tensors = {PREFIX + key: tensor for key, tensor in tensors.items()}
    for name in factors:
        for key in tensor_names(name):
            tensors.pop(key, None)
    # The scaling is part of B, and so of its bias.
    scaled = {f"{PREFIX}{plain_name(name)}.lora_B.bias": layer for name, layer in layers.items()}
    wrappers = {id(layer) for layer in expert_layers(peft_model, adapter_name).values()}
    for name, layer in lora_modules(base_of(peft_model)):
        if id(layer) in wrappers:
            scaled[f"{PREFIX}{name}.lora_B.weight"] = layer
    for key, layer in scaled.items():
        if key in tensors:
            tensors[key] = float(layer.scaling[adapter_name]) * gathered(tensors[key]).float()
    return {key: gathered(tensor).detach() for key, tensor in tensors.items()}

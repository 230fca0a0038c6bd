"""Whether an adapter's file in PEFT's format holds all that was trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from ..adapters.extras import differs, tensors_of
from ..models.wrappers import plain_name
from ..system.tensors import PLAIN_TENSORS
from .layers import lora_modules

# Of each base weight, whether it is where it was; how far it may be off, relative to its largest entry: PEFT itself
# merges adapters into it and takes them out again, which rounds it a few times.
_SAMPLES, _OFF, _ROUNDINGS = 64, 1e-4, 6


def require_complete(
    peft_model: Any,
    before: Mapping[str, str],
    weights: Mapping[str, Tensor],
    save_embedding_layers: bool | str = "auto",
) -> None:
    """Refuse a model of which something was trained that PEFT writes into no adapter's file.

    Args:
        peft_model: Holds the adapters.
        before: Hashes of what the model held beside them when they were started.
        weights: From :func:`samples_of`, then.
        save_embedding_layers: As PEFT is asked.

    Raises:
        ValueError: Tensors outside the adapters require gradients or have changed; they are named.
    """
    named = named_tensors(peft_model)
    trained = {plain_name(name) for name, value in peft_model.named_parameters() if value.requires_grad}
    for name, tensor in tensors_of(peft_model).items():
        if name not in trained and ".base_layer." not in name and differs(tensor, before.get(name)):
            trained.add(name)
    trained |= _moved(weights, samples_of(peft_model))
    adapters = list(peft_model.peft_config)
    lost = _beyond(peft_model, trained, named, adapters, False)
    if lost and save_embedding_layers:
        lost = _beyond(peft_model, lost, named, adapters, save_embedding_layers)
    if lost:
        some = ", ".join(sorted(lost)[:3]) + (", ..." if len(lost) > 3 else "")
        raise ValueError(
            f"{len(lost)} tensors outside the adapters require gradients or have changed since the adapters were "
            f"started, and no adapter's file would hold them: {some}. Expected what PEFT can write: name their modules "
            "in the LoraConfig's modules_to_save before training. If they were not meant to learn, call "
            "requires_grad_(False) on them, and restore them."
        )


@torch.no_grad()
def samples_of(peft_model: Any) -> dict[str, Tensor]:
    """Return by name some values of every base weight that has an adapter; not of merged, divided, quantised ones."""
    found: dict[str, Tensor] = {}
    for name, layer in lora_modules(peft_model):
        weight: Any = getattr(layer.get_base_layer(), "weight", None)
        if type(weight) in PLAIN_TENSORS and weight.is_floating_point() and not weight.is_meta and not layer.merged:
            values = weight.detach().reshape(-1)
            found[f"{name}.base_layer.weight"] = values[:: max(1, len(values) // _SAMPLES)].to("cpu", copy=True)
    return found


def _moved(before: Mapping[str, Tensor], now: Mapping[str, Tensor]) -> set[str]:
    """Return the names of weights that differ by more than rounding, of those that lie there as before."""
    moved = set()
    for name in before.keys() & now.keys():
        then, value = before[name], now[name]
        off = max(_OFF, *(_ROUNDINGS * torch.finfo(each.dtype).eps for each in (then, value)))
        # of what FSDP1 has flattened nothing is known
        if then.shape == value.shape and bool((value.float() - then.float()).abs().max() > off * then.abs().max()):
            moved.add(name)
    return moved


def named_tensors(peft_model: Any) -> dict[str, Any]:
    """Return parameters and buffers as a state dict names them, not gathered where they are divided.

    Tied ones have all their names: a wrapper of PEFT looks for its own.
    """
    named = dict(peft_model.named_parameters(remove_duplicate=False))
    named |= dict(peft_model.named_buffers(remove_duplicate=False))
    return {plain_name(name): tensor for name, tensor in named.items()}


def _beyond(
    peft_model: Any, trained: set[str], named: dict[str, Any], adapters: list[str], embeddings: bool | str
) -> set[str]:
    """Return the trained parameters that are in no adapter's file."""
    kept: set[str] = set()
    for adapter in adapters:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            kept |= set(get_peft_model_state_dict(peft_model, named, adapter, save_embedding_layers=embeddings))
    # Tied ones are in the file under one of their names.
    held = {id(tensor) for name, tensor in named.items() if kept & set(_forms(name, adapters))}
    return {name for name in trained if "_flat_param" not in name and id(named.get(name)) not in held}


def _forms(name: str, adapters: list[str]) -> list[str]:
    """Return what a parameter may be called in an adapter's file."""
    parts = [part for part in name.split(".") if part != "modules_to_save"]
    return [name, *(".".join(part for part in parts if part != adapter) for adapter in adapters)]

"""Whether an adapter's file in PEFT's format holds all that was trained."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

from peft import get_peft_model_state_dict

from ..adapters.extras import differs, tensors_of
from ..models.wrappers import plain_name


def require_complete(peft_model: Any, before: Mapping[str, str], save_embedding_layers: bool | str = "auto") -> None:
    """Refuse a model of which something was trained that PEFT writes into no adapter's file.

    Args:
        peft_model: Holds the adapters.
        before: Hashes of what the model held beside them when they were started.
        save_embedding_layers: As PEFT is asked.

    Raises:
        ValueError: Tensors outside the adapters require gradients or have changed; they are named.
    """
    named = named_tensors(peft_model)
    trained = {plain_name(name) for name, value in peft_model.named_parameters() if value.requires_grad}
    for name, tensor in tensors_of(peft_model).items():
        # PEFT itself merges adapters into what it has wrapped, and takes them out again, with some rounding.
        if name not in trained and ".base_layer." not in name and differs(tensor, before.get(name)):
            trained.add(name)
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

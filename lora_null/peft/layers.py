"""PEFT's LoRA layers of a model, and what we keep on them."""

from __future__ import annotations

from typing import Any

from peft import PeftModel
from peft.tuners import lora
from torch import nn

from ..adapters.state import AdapterState, set_state
from ..models.wrappers import plain_name
from .record import record_adapter


def freeze_lora_A(peft_model: PeftModel, adapter_name: str = "default") -> int:
    """Freeze ``lora_A`` so that PEFT's own switches keep it frozen; return the number of layers.

    Needed after ``PeftModel.from_pretrained(..., is_trainable=True)``, which does not know that A was frozen.
    """
    layers = lora_layers(peft_model, adapter_name)
    for layer in layers.values():
        freeze(layer, adapter_name)
    return len(layers)


def lora_layers(peft_model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """Return the layers that hold the adapter, by their name in the base model."""
    model = peft_model.get_base_model() if isinstance(peft_model, PeftModel) else peft_model
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, lora.LoraLayer) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(
            f"{type(peft_model).__name__} has no LoRA layer with an adapter named {adapter_name!r}. Expected a model "
            "from peft.get_peft_model(model, LoraConfig(...)); for a plain model use lora_null.initialize."
        )
    return layers


def remember(peft_model: PeftModel, adapter_name: str, state: AdapterState) -> None:
    """Keep ``state`` on the model, and where PEFT's ``save_pretrained`` finds it."""
    set_state(peft_model, state)
    record_adapter(peft_model, adapter_name, state, lora_layers(peft_model, adapter_name))


def base_names(peft_model: PeftModel) -> set[str]:
    """Return the names that modules have in the base model without its adapters."""
    names = {plain_name(name) for name, _ in peft_model.get_base_model().named_modules()}
    return {name for name in names if not any(part in name.split(".") for part in ("lora_A", "lora_B", "base_layer"))}


def freeze(layer: Any, adapter_name: str) -> None:
    """Freeze ``lora_A`` of one layer."""
    # set_adapter() and the end of disable_adapter() undo requires_grad_(False) alone; names listed here stay frozen.
    frozen = dict(layer.frozen_peft_weight_names)
    frozen[adapter_name] = tuple(dict.fromkeys((*frozen.get(adapter_name, ()), "lora_A")))
    layer.frozen_peft_weight_names = frozen
    layer.lora_A[adapter_name].weight.requires_grad_(False)

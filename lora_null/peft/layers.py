"""PEFT's LoRA layers of a model, and what we keep on them."""

from __future__ import annotations

from typing import Any

from peft import PeftMixedModel, PeftModel
from peft.tuners import lora
from peft.tuners.lora.layer import ParamWrapper
from torch import nn

from ..models.arguments import takes
from ..models.wrappers import plain_name


@takes(on_meta=True, peft_model=nn.Module)
def freeze_lora_A(peft_model: nn.Module, adapter_name: str = "default") -> int:
    """Freeze ``lora_A`` so that PEFT's own switches keep it frozen; return the number of layers.

    Needed after ``PeftModel.from_pretrained(..., is_trainable=True)``, which does not know that A was frozen.
    """
    layers = lora_layers(peft_model, adapter_name)
    for layer in layers.values():
        freeze(layer, adapter_name)
    return len(layers)


@takes(on_meta=True, peft_model=nn.Module)
def lora_layers(peft_model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """Return the layers that hold the adapter, by their name in the base model.

    Embeddings are not among them, nor what PEFT adapts by ``target_parameters``, such as fused experts.
    """
    if isinstance(peft_model, PeftMixedModel):
        raise ValueError(
            "The model was made by get_peft_model(..., mixed=True), where layers may carry adapters of other kinds at "
            "once, and which PEFT cannot save. Expected one of get_peft_model without mixed=True."
        )
    layers = {
        name: module
        for name, module in base_of(peft_model).named_modules()
        if isinstance(module, lora.LoraLayer) and not isinstance(module, ParamWrapper) and adapter_name in module.lora_A
    }
    if not layers and not expert_layers(peft_model, adapter_name):
        raise ValueError(
            f"{type(peft_model).__name__} has no LoRA layer with an adapter named {adapter_name!r}. Expected a model "
            "from peft.get_peft_model(model, LoraConfig(...)); for a plain model use lora_null.initialize."
        )
    return layers


def expert_layers(peft_model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """Return what holds the adapter of parameters of several matrices, such as fused experts, by their names."""
    found = {}
    for name, module in base_of(peft_model).named_modules():
        if holds_experts(module) and adapter_name in module.lora_A:
            found[parameter_of(name, module)] = module
    return found


def scaled_layers(peft_model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """Return the layers that compute ``s (x A^T) B^T``, of linear layers and of experts, by name."""
    return {**lora_layers(peft_model, adapter_name), **expert_layers(peft_model, adapter_name)}


def holds_experts(layer: Any) -> bool:
    """Tell whether the layer adapts a parameter that holds several matrices."""
    return isinstance(layer, ParamWrapper) and layer.num_experts > 1


def parameter_of(name: str, wrapper: Any) -> str:
    """Return the name of the parameter that a layer called ``name`` adapts, in the base model without its adapters."""
    parts = [part for part in plain_name(name).split(".") if part != "base_layer"]
    return ".".join([*parts, wrapper.parameter_name])


def base_of(peft_model: nn.Module) -> nn.Module:
    """Return the model that carries the adapters: inside a ``PeftModel``, or itself after ``add_adapter``."""
    return peft_model.get_base_model() if isinstance(peft_model, PeftModel) else peft_model


def lora_modules(model: nn.Module) -> list[tuple[str, Any]]:
    """Return all layers of LoRA, on whatever they are, by name in ``model`` as its state dict has it."""
    modules = model.named_modules()
    return [(plain_name(name), module) for name, module in modules if isinstance(module, lora.LoraLayer)]


def holds_linear(layer: Any, adapter_name: str) -> bool:
    """Tell whether the layer computes ``s (x A^T) B^T`` for the adapter."""
    if isinstance(layer, ParamWrapper) or adapter_name not in layer.lora_A:
        return False
    return isinstance(layer.lora_A[adapter_name], nn.Linear)


def base_names(peft_model: nn.Module) -> set[str]:
    """Return the names that modules have in the base model without its adapters."""
    names = {plain_name(name) for name, _ in base_of(peft_model).named_modules()}
    return {name for name in names if not any(part in name.split(".") for part in ("lora_A", "lora_B", "base_layer"))}


def freeze(layer: Any, adapter_name: str) -> None:
    """Freeze ``lora_A`` of one layer."""
    # set_adapter() and the end of disable_adapter() undo requires_grad_(False) alone; names listed here stay frozen.
    frozen = dict(layer.frozen_peft_weight_names)
    frozen[adapter_name] = tuple(dict.fromkeys((*frozen.get(adapter_name, ()), "lora_A")))
    layer.frozen_peft_weight_names = frozen
    layer.lora_A[adapter_name].requires_grad_(False)

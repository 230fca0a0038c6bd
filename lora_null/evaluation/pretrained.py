"""The pre-trained model inside the tuned one: the same weights with the adapters off, whoever attached them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from ..adapters.extras import changed_since
from ..adapters.layer import adapter_layers, disable_adapters
from ..adapters.plain import shifting_start
from ..adapters.state import get_state
from ..models.wrappers import unwrapped


def require_comparable(model: nn.Module, base: nn.Module | None) -> None:
    """Refuse a model whose pre-trained state cannot be had.

    Raises:
        ValueError: There is neither an adapter to switch off nor another model, or switching it off would not give
            the pre-trained weights.
    """
    if base is not None:
        if base is model:
            raise ValueError(
                "base is the model itself; expected the pre-trained model, or None to switch adapters off."
            )
        return
    state = get_state(unwrapped(model)) if adapter_layers(model) else None
    besides = changed_since(unwrapped(model), state.before) - set(state.originals) if state else set()
    if besides:
        raise ValueError(
            f"{len(besides)} tensors outside the adapters have changed, for instance {min(besides)}, so that the model "
            "with its adapters off is not the pre-trained one. Pass base=, the pre-trained model."
        )
    layers = _peft_layers(model)
    if not adapter_layers(model) and not layers and not hasattr(model, "peft_config"):
        raise ValueError(
            f"{type(model).__name__} carries no adapter, so that there is no before and after. Expected a model with "
            "an adapter of lora_null or PEFT; for a merged or fully fine-tuned model, pass base=, the pre-trained one."
        )
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise ValueError(
            f"{merged[0]} has its adapter merged, which switching adapters off would undo. Call unmerge_adapter() "
            "first, or pass base=, the pre-trained model."
        )
    for name, config in getattr(model, "peft_config", {}).items():
        start = shifting_start(getattr(config, "init_lora_weights", None))
        if start:
            raise ValueError(
                f"The adapter {name!r} began with init_lora_weights={start!r}, by which PEFT changes the base weights: "
                "without the adapter the model is not the pre-trained one. Pass base=, the pre-trained model."
            )


@contextmanager
def pretrained(model: nn.Module, base: nn.Module | None = None) -> Iterator[nn.Module]:
    """Yield the pre-trained model for the length of the block: ``base`` if given, else ``model`` with adapters off.

    On a base that was shifted by ``- s B0 A0``, ours or in PEFT's layers, these add the initial factors back: exact up
    to the rounding of the shift. Afterwards the same adapters are active and the same parameters trained as before.
    """
    if base is not None:
        yield base
        return
    with ExitStack() as stack:
        stack.enter_context(disable_adapters(model))
        layers = _peft_layers(model)
        if layers or hasattr(model, "peft_config"):
            stack.enter_context(_flags_kept(model))
            stack.enter_context(_disabled(model, layers))
        yield model


def _peft_layers(model: nn.Module) -> dict[str, Any]:
    # Whoever has not imported PEFT has no layer of it.
    tuners: Any = sys.modules.get("peft.tuners.tuners_utils")
    if tuners is None:
        return {}
    return {name: module for name, module in model.named_modules() if isinstance(module, tuners.BaseTunerLayer)}


@contextmanager
def _flags_kept(model: nn.Module) -> Iterator[None]:
    """Give every parameter its own ``requires_grad`` back: the end of PEFT's ``disable_adapter`` sets them anew."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


@contextmanager
def _disabled(model: Any, layers: dict[str, Any]) -> Iterator[None]:
    """Switch off all that PEFT has added, in a ``PeftModel`` or in a model of transformers with adapters."""
    if hasattr(model, "disable_adapter"):
        with model.disable_adapter():
            yield
        return
    before = [(layer, layer.disable_adapters) for layer in layers.values()]
    try:
        for layer, _ in before:
            layer.enable_adapters(False)
        yield
    finally:
        for layer, disabled in before:
            layer.enable_adapters(not disabled)

"""Which linear layers of a model receive an adapter, and the only place that decides it."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from torch import nn

from .config import ALL_LINEAR


def output_head_names(model: nn.Module) -> set[str]:
    """Return the module names of the output head (``lm_head`` in LLaMA), which stays without an adapter."""
    getter: Any = getattr(model, "get_output_embeddings", None)
    head = getter() if getter is not None else None
    return {name for name, module in model.named_modules() if head is not None and module is head} | {"lm_head"}


def target_linears(model: nn.Module, target_modules: str | Sequence[str] = ALL_LINEAR) -> dict[str, nn.Linear]:
    """Select linear layers as PEFT does, by name.

    Args:
        model: Any model; only ``nn.Linear`` and its subclasses are considered.
        target_modules: ``"all-linear"``, a regular expression that must match the whole name, or names: a
            module is selected when its name equals one or ends in ``.`` and one of them.

    Returns:
        Name to module, in the model's own order.

    Raises:
        ValueError: The model has no linear layer, or a wish matches none.
    """
    linears = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    # PEFT's own factors are linear layers too; only what they adapt counts.
    adapted = [name for name, module in model.named_modules() if hasattr(module, "base_layer")]
    inside = tuple(f"{name}.lora_" for name in adapted)
    linears = {name: module for name, module in linears.items() if not name.startswith(inside)}
    heads = output_head_names(model)
    if not set(linears) - heads:
        raise ValueError(
            f"{type(model).__name__} has no linear layer to adapt (found {len(linears)}, output heads aside). "
            "Expected a model built of torch.nn.Linear: layers of other kinds (GPT-2's Conv1D, experts fused into one "
            "parameter, layers replaced by another library) cannot be adapted."
        )
    if target_modules == ALL_LINEAR:
        return {name: module for name, module in linears.items() if name not in heads}
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules={target_modules!r} is not a regular expression ({error}). For name suffixes "
                "pass a list."
            ) from None
        chosen = {name: module for name, module in linears.items() if pattern.fullmatch(name)}
        missing = [] if chosen else [target_modules]
    else:
        matched = {wish: [n for n in linears if n == wish or n.endswith("." + wish)] for wish in target_modules}
        names = {name for found in matched.values() for name in found}
        chosen = {name: module for name, module in linears.items() if name in names}
        missing = [wish for wish, found in matched.items() if not found]
    if missing:
        endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
        raise ValueError(
            f"target_modules names {missing}, which match no linear layer of {type(model).__name__}. Its linear "
            f'layers end in {endings}; use a list of these, a regular expression over whole names, or "all-linear".'
        )
    return chosen

"""Which linear layers of a model receive an adapter, and the only place that decides it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from ._logging import warn_once
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
        Name to module, in the model's own order. What was wished for but is no linear layer of its own, such as
        experts fused into one parameter, is named in a warning.

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
    stacks = _stacked_weights(model)
    if target_modules == ALL_LINEAR:
        _warn_of_stacks(model, stacks)
        return {name: module for name, module in linears.items() if name not in heads}
    if isinstance(target_modules, str):
        try:
            pattern = re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"target_modules={target_modules!r} is not a regular expression ({error}). For name suffixes "
                "pass a list."
            ) from None
        wishes: dict[str, Callable[[str], object]] = {target_modules: pattern.fullmatch}
    else:
        wishes = {
            wish: lambda name, wish=wish: name == wish or name.endswith("." + wish)  # type: ignore[misc]
            for wish in target_modules
        }
    matched = {wish: {name for name in linears if selects(name)} for wish, selects in wishes.items()}
    wished = {name: size for name, size in stacks.items() if any(selects(name) for selects in wishes.values())}
    missing = [wish for wish, found in matched.items() if not found]
    if missing:
        endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
        fused = f" ({_starred(wished)}: matrices fused into one parameter, which get no adapter)" if wished else ""
        raise ValueError(
            f"target_modules names {missing}, which match no linear layer of {type(model).__name__}{fused}. Its linear "
            f'layers end in {endings}; use a list of these, a regular expression over whole names, or "all-linear".'
        )
    _warn_of_stacks(model, wished)
    names = set().union(*matched.values())
    return {name: module for name, module in linears.items() if name in names}


def _stacked_weights(model: nn.Module) -> dict[str, int]:
    """Return the matrices stacked into one parameter, as transformers 5 keeps a layer's experts, with their sizes."""
    return {
        f"{prefix}.{name}".lstrip("."): parameter.numel()
        for prefix, module in model.named_modules()
        if not isinstance(module, nn.modules.conv._ConvNd)
        for name, parameter in module.named_parameters(recurse=False)
        if parameter.dim() > 2 and min(parameter.shape) > 1
    }


def _starred(names: Iterable[str]) -> str:
    """Name parameters with a star for their numbers: the layers of a model differ by these only."""
    return ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


def _warn_of_stacks(model: nn.Module, sizes: Mapping[str, int]) -> None:
    if not sizes:
        return
    share = sum(sizes.values()) / sum(parameter.numel() for parameter in model.parameters())
    message = (
        f"{type(model).__name__} keeps matrices, such as the experts of a layer, fused into one parameter each: "
        f"{_starred(sizes)} ({len(sizes)} parameters, {share:.0%} of all weights). They are no torch.nn.Linear and get "
        "no covariance and no adapter; only the linear layers do. If the experts must learn, adapt them by other "
        "means, such as PEFT's target_parameters."
    )
    warn_once(message, message)

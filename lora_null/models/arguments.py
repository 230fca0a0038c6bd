"""What a public function takes, checked before anything is done."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar

from torch import nn

F = TypeVar("F", bound=Callable[..., Any])

# A path, as functions that read and write take it.
PATH = (str, os.PathLike)
_WORDS = {nn.Module: "a model (torch.nn.Module)", str: "a path"}


def takes(*, on_meta: bool = False, **kinds: Any) -> Callable[[F], F]:
    """Decorate a function that refuses arguments of other types; a default passes, whatever its type.

    A model must hold values, too: on the device meta it has none, unless accelerate brings them.

    Args:
        on_meta: Let models pass that hold none.
        kinds: Argument name to its type, or to a tuple of types.
    """

    def decorate(function: F) -> F:
        known = signature(function)

        @wraps(function)
        def checked(*args: Any, **kwargs: Any) -> Any:
            try:
                given = known.bind(*args, **kwargs).arguments
            except TypeError:
                given = {}  # Python says below what is missing
            for name, kind in kinds.items():
                if name in given and given[name] is not known.parameters[name].default:
                    _require(function.__name__, name, given[name], kind, list(known.parameters), on_meta)
            return function(*args, **kwargs)

        return checked  # type: ignore[return-value]

    return decorate


def _require(function: str, name: str, value: Any, kind: Any, names: list[str], on_meta: bool) -> None:
    first = kind[0] if isinstance(kind, tuple) else kind
    if not isinstance(value, kind):
        got = repr(value) if value is None or isinstance(value, int | float | str) else f"a {type(value).__name__}"
        raise TypeError(
            f"{function}: {name} is {got}; expected {_WORDS.get(first, f'a {first.__name__}')}. Were arguments swapped "
            f"or left out? Their order is {', '.join(name for name in names if name not in ('self', 'cls'))}."
        )
    if first is nn.Module and not on_meta and _is_empty(value):
        raise ValueError(
            f"{function}: {name} is a {type(value).__name__} on the device meta, which holds no values; expected a "
            "model with its weights. Load them with from_pretrained, or move it with to_empty and load_state_dict."
        )


def _is_empty(model: nn.Module) -> bool:
    # accelerate keeps offloaded weights on meta, and its hooks bring them
    return any(parameter.is_meta for parameter in model.parameters()) and not any(
        hasattr(module, "_hf_hook") for module in model.modules()
    )

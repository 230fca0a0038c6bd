"""The parts of a transformers model: what reads text, on one side or two, and what reads other things beside it."""

from __future__ import annotations

import inspect
import re
from typing import Any

from torch import nn


def is_encoder_decoder(model: nn.Module) -> bool:
    """Tell whether a transformers model, or the language model in it, reads two sequences."""
    config: Any = getattr(model, "config", None)
    if not hasattr(model, "get_encoder") or not hasattr(config, "get_text_config"):
        return False
    return bool(config.is_encoder_decoder or getattr(config.get_text_config(), "is_encoder_decoder", False))


def cache_name(model: Any) -> str:
    """Return what a transformers model calls its KV cache, as an argument and in its output."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    # since transformers 5.24, which says that 5.40 will not know the older name
    return "cache" if "cache" in inspect.signature(base.forward).parameters else "past_key_values"


def text_modules(model: nn.Module) -> set[int] | None:
    """Return the ids of the modules inside the language model; ``None`` where the model reads nothing but text."""
    names = getattr(getattr(model, "config", None), "sub_configs", {})
    if not any(re.match("vision|image|video|audio|speech", name) for name in names):
        return None
    known: Any = model
    parts = [known.get_decoder(), *([known.get_encoder()] if is_encoder_decoder(model) else [])]
    return {id(module) for part in parts for module in part.modules()}

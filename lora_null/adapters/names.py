"""How modules, tensors and models are called in an adapter folder."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from ..system.log import warn_once

# What PEFT calls the two files of an adapter, and puts before and behind a module's name.
WEIGHTS, PEFT_CONFIG = "adapter_model.safetensors", "adapter_config.json"
PREFIX, SUFFIX_A = "base_model.model.", ".lora_A.weight"


def tensor_names(module_name: str) -> tuple[str, str]:
    """Return PEFT's names on disk of ``lora_A`` and ``lora_B``."""
    return PREFIX + module_name + SUFFIX_A, PREFIX + module_name + ".lora_B.weight"


def short_names(names: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """Return last name components where they select exactly ``chosen`` among ``names``, else whole names."""
    chosen = set(chosen)
    endings = {name.rsplit(".", 1)[-1] for name in chosen}
    selected = {name for name in names if name.rsplit(".", 1)[-1] in endings}
    return sorted(endings if selected == chosen else chosen)


def published_name(name: str | None) -> str | None:
    """Return a model's name without the leading folders of an absolute path, which tell others about this machine.

    A warning says so: readers that load the base by its name do not find it.
    """
    if not name or not os.path.isabs(name):
        return name
    short = Path(name).name
    warn_once(
        f"local-base-{name}",
        f"The base model came from a folder, and the adapter names it {short!r}, without the folders above. Programs "
        "that load the base by this name will look for it beside them or on the hub: pass base_model_name_or_path.",
    )
    return short

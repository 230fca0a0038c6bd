"""Launch configurations and backend choices as data, one JSON file per architecture.

A file maps a kernel's name and the element size of its operands to a list of entries. An entry's ``when``
holds bounds on the sizes of a call (``d_max``, ``T_min``, ``r_max``, ...); the first entry whose bounds all
hold is used, and the last one has none. Nothing is tuned while a model trains: two ranks that time the same
kernels would choose differently, and their sums would differ in the last bits. ``python -m
lora_null.kernels.tune`` measures and rewrites the data.
"""

import json
import os
from functools import cache
from pathlib import Path
from typing import Any

import torch

__all__ = ["architecture", "backend", "launch_config", "matches", "shipped", "table", "tuned_path"]

FOLDER = Path(__file__).parent / "configs"


def architecture(device: torch.device | str) -> str:
    """Return the name under which the data of ``device`` is kept: ``sm_90``, ``gfx942``, or ``cpu``."""
    device = torch.device(device)
    if device.type != "cuda":
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    major, minor = torch.cuda.get_device_capability(device)
    return f"sm_{major}{minor}"


def tuned_path(arch: str) -> Path:
    """Return where the tuning command keeps its result for ``arch``: below ``LORA_NULL_CACHE``."""
    base = os.environ.get("LORA_NULL_CACHE")
    if base is None:
        base = str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "lora_null")
    return Path(base) / "kernels" / f"{arch}.json"


def _overlaid(base: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Return ``base`` with the entry lists of ``over`` in place of its own, per kernel or operation and size."""
    sections = {
        section: {
            name: {**base[section].get(name, {}), **over.get(section, {}).get(name, {})}
            for name in {**base[section], **over.get(section, {})}
        }
        for section in ("dispatch", "kernels")
    }
    return {**base, **over, **sections}


@cache
def shipped(arch: str) -> dict[str, Any]:
    """Return the table that comes with the package for ``arch``.

    What an architecture's own file leaves out is the default's. One without a file gets that of a relative with
    no more shared memory (``aliases`` in ``default.json``); any other the default, which fits 64 KiB of shared
    memory and uses no descriptors.
    """
    default = json.loads((FOLDER / "default.json").read_text())
    path = FOLDER / f"{default['aliases'].get(arch, arch)}.json"
    return _overlaid(default, json.loads(path.read_text())) if path.exists() else default


@cache
def _tuned(arch: str, path: str, stamp: float) -> dict[str, Any]:
    return _overlaid(shipped(arch), json.loads(Path(path).read_text()))


def table(arch: str) -> dict[str, Any]:
    """Return the data of ``arch``: the package's, overlaid with what the tuning command measured here."""
    path = tuned_path(arch)
    try:
        stamp = path.stat().st_mtime
    except FileNotFoundError:
        return shipped(arch)
    return _tuned(arch, str(path), stamp)


def matches(entry: dict[str, Any], sizes: dict[str, int]) -> bool:
    """Say whether every bound in the entry's ``when`` holds; a size that is not given meets any bound."""
    for key, bound in entry.get("when", {}).items():
        name, _, kind = key.rpartition("_")
        size = sizes.get(name)
        if size is not None and (size > bound if kind == "max" else size < bound):
            return False
    return True


def _first(entries: list[dict[str, Any]], sizes: dict[str, int]) -> dict[str, Any]:
    return next(entry for entry in entries if matches(entry, sizes))


def launch_config(kernel: str, dtype: torch.dtype, arch: str, *, tma: bool = False, **sizes: int) -> dict[str, Any]:
    """Return a fresh copy of the launch configuration of ``kernel`` for operands of ``dtype`` and these sizes.

    Entries that use tensor descriptors (``TMA``) are passed over unless ``tma`` says that the operands allow it.
    """
    bits = "32" if dtype.itemsize >= 4 else "16"
    entries = table(arch)["kernels"][kernel][bits]
    entry = _first([entry for entry in entries if tma or not entry.get("TMA")], sizes)
    return {key: value for key, value in entry.items() if key != "when"}


def backend(operation: str, dtype: torch.dtype, arch: str, **sizes: int) -> str:
    """Return the implementation that the data of ``arch`` prefers for an operation of these sizes."""
    bits = "32" if dtype.itemsize >= 4 else "16"
    return _first(table(arch)["dispatch"][operation][bits], sizes)["backend"]

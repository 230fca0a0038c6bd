"""Posteriors in safetensors files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ..system.files import parse_json, replacing, require_regular
from .inducing import Inducing
from .noise import Gaussian, Noise

_KIND = "lora_null.posterior"
_VERSION = 1
_READERS: dict[str, Callable[[dict[str, Tensor]], Noise]] = {
    Gaussian.kind: Gaussian.of_tensors,
    Inducing.kind: Inducing.of_tensors,
}


def write(
    path: Path,
    noise: Mapping[str, Noise],
    norms: Mapping[str, float],
    method: str,
    facts: Mapping[str, float],
    *,
    overwrite: bool,
) -> None:
    """Write a posterior; FileExistsError where ``path`` exists and ``overwrite`` is not set."""
    from safetensors.torch import save_file

    if path.exists() and not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True to replace it, or choose another path.")
    # cloned: safetensors refuses tensors that share memory
    tensors = {
        f"{key}/{one.kind}/{field}": tensor.detach().cpu().clone().contiguous()
        for key, one in noise.items()
        for field, tensor in one.tensors().items()
    }
    metadata = {"kind": _KIND, "version": str(_VERSION), "method": method}
    metadata |= {"norms": json.dumps(norms), "facts": json.dumps(facts)}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata)


def read(path: Path) -> tuple[dict[str, Noise], dict[str, float], str, dict[str, float]]:
    """Read a file of :func:`write`: noise, norms, method and facts.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is damaged, of another kind or of a newer version.
    """
    from safetensors import SafetensorError, safe_open

    require_regular(path, "a posterior that was saved")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            if metadata.get("kind") != _KIND or metadata.get("version") != str(_VERSION):
                raise ValueError(
                    f"it is of kind {metadata.get('kind')!r}, version {metadata.get('version')!r}; expected "
                    f"{_KIND!r}, version {_VERSION}. Is it another file, or of a newer lora_null?"
                )
            parts: dict[tuple[str, str], dict[str, Tensor]] = {}
            for name in file.keys():
                key, kind, field = name.split("/")
                parts.setdefault((key, kind), {})[field] = file.get_tensor(name)
        noise = {key: _READERS[kind](fields) for (key, kind), fields in parts.items()}
        norms, facts = (_numbers(metadata[name]) for name in ("norms", "facts"))
        if set(norms) != set(noise) or len(noise) != len(parts):
            raise ValueError("its norms belong to other factors than its noise")
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} cannot be read as a posterior ({error}). Fit and save it again.") from error
    return noise, norms, metadata.get("method", ""), facts


def _numbers(text: str) -> dict[str, float]:
    values: Any = parse_json(text)
    if not isinstance(values, dict) or not all(isinstance(value, int | float) for value in values.values()):
        raise ValueError("its header holds something else than numbers by name")
    numbers = {key: float(value) for key, value in values.items()}
    if not all(math.isfinite(value) for value in numbers.values()):
        raise ValueError("its header holds an infinite number")
    return numbers

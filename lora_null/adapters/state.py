"""What an adapter remembers about how it began, on the model and in ``lora_null.json``."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from torch import Tensor, nn

from ..config import LoraNullConfig
from ..models.wrappers import STATE
from ..system.files import digest_of_file, digest_of_json, read_json, write_json
from ..system.tensors import opened
from ..system.version import __version__
from .names import PEFT_CONFIG, WEIGHTS

OWN_CONFIG = "lora_null.json"
# Under this name a model's own configuration, and so config.json in a trainer's checkpoint, says the same.
CONFIG_KEY = "lora_null"
# 2: with checksums.
_FORMAT = 2
# Of adapter_config.json, what people and programs write anew; it changes no number.
_FREE = {"base_model_name_or_path", "revision", "inference_mode"}
_KINDS: dict[str, Any] = {
    "format": int,
    "version": str,
    "config": dict,
    "base_fingerprint": str | None,
    "energies": dict,
    "free": dict,
    "stacked": bool,
    "before": dict,
    "files": dict,
    "checksum": str,
}


@dataclass(frozen=True)
class AdapterState:
    """What a patched model remembers of its initialisation; kept as ``model.lora_null_state``.

    Attributes:
        config: The configuration that the adapters were made with.
        base_fingerprint: Identifies the pre-trained weights; ``None`` for a quantised base.
        energies: Per sharing group, ``tr(U^T C U) / tr(C)``: the share of the activations' energy that the
            adapters can see.
        stacked: Whether the adapter in the same folder has the rank-``2 r`` form of a trained A.
        version: Of this package, when the adapter was made or last trained.
        free: Per sharing group, how many directions are free; empty where the configuration has no ``energy``.
    """

    config: LoraNullConfig
    base_fingerprint: str | None = None
    energies: dict[str, float] = field(default_factory=dict)
    stacked: bool = False
    version: str = __version__
    free: dict[str, int] = field(default_factory=dict)
    # Not in files of adapters: hashes of what the model holds besides them, and the values that modules_to_save had.
    before: Mapping[str, str] = field(default_factory=dict, compare=False, repr=False)
    originals: Mapping[str, Tensor] = field(default_factory=dict, compare=False, repr=False)

    def to_dict(self, files: Mapping[str, str] | None = None, *, whole: bool = False) -> dict[str, Any]:
        """Return the contents of ``lora_null.json``, with the checksums of the ``files`` beside it.

        ``whole`` is for the configuration of a model: its checkpoint holds all weights, and not which were trained.
        """
        values: dict[str, Any] = {
            "format": _FORMAT,
            "version": self.version,
            "config": self.config.to_dict(),
            "base_fingerprint": self.base_fingerprint,
            "energies": dict(self.energies),
            "free": dict(self.free),
            "stacked": self.stacked,
            "files": dict(files or {}),
        }
        if whole:
            values["before"] = dict(self.before)
        return {**values, "checksum": digest_of_json(values)}

    @classmethod
    def from_dict(cls, values: Any, source: str) -> AdapterState:
        """Build from :meth:`to_dict`, without trust; ``source`` is where errors say that the values come from.

        Raises:
            ValueError: The values are damaged, or of a newer format than this version knows.
        """
        if not isinstance(values, dict):
            raise _damaged(source, f"a {type(values).__name__}")
        number = values.get("format", 1)
        if isinstance(number, int) and number > _FORMAT:
            raise ValueError(
                f"{source} has format {number}, of lora_null {values.get('version')}; lora_null {__version__} knows "
                f"{_FORMAT} and would misread it. Install a newer lora_null."
            )
        wrong = [f"{key}={values[key]!r}" for key in _KINDS if key in values and not fits(values[key], _KINDS[key])]
        if wrong or "config" not in values or number < 1:
            raise _damaged(source, ", ".join(wrong) or f"format={number}, entries {sorted(values)}")
        try:
            config = LoraNullConfig.from_dict(values["config"])
            energies = {key: float(energy) for key, energy in values.get("energies", {}).items()}
            free = {key: int(k) for key, k in values.get("free", {}).items()}
        except (TypeError, ValueError, OverflowError) as error:
            raise _damaged(source, error) from None
        found = values.get("checksum")
        if (number > 1 or found) and found != digest_of_json({k: v for k, v in values.items() if k != "checksum"}):
            raise _damaged(source, "its checksum is another one")
        version = values.get("version", "of unknown version")
        before = {str(name): str(key) for name, key in values.get("before", {}).items()}
        stacked = values.get("stacked", False)
        return cls(config, values.get("base_fingerprint"), energies, stacked, version, free, before)

    def write(self, folder: Path, *, sealed: bool = False) -> None:
        """Write ``lora_null.json`` into an adapter folder; ``sealed``: with checksums of the files that lie there."""
        files = {name: digest(folder / name) for name, digest in _DIGESTS.items()} if sealed else {}
        write_json(folder / OWN_CONFIG, self.to_dict(files))


def read_state(folder: Path) -> AdapterState | None:
    """Read ``lora_null.json``; ``None`` for an adapter of another program, where it is missing or empty.

    Raises:
        ValueError: The file is damaged, or of a newer format than this version knows.
    """
    path = folder / OWN_CONFIG
    values = read_json(path) if os.path.lexists(path) else {}
    return AdapterState.from_dict(values, str(path)) if values else None


def require_sealed(folder: Path) -> None:
    """Refuse a folder of ours whose weights or configuration are others than ``lora_null.json`` was written with."""
    path = folder / OWN_CONFIG
    values = read_json(path) if path.exists() else {}
    for name, digest in values.get("files", {}).items():
        if name not in _DIGESTS or _DIGESTS[name](folder / name) != digest:
            raise ValueError(
                f"{folder / name} is damaged, or was changed after {path} was written: the checksum is another one. "
                f"Save or download the adapter again; if another program has changed it on purpose, delete {path} to "
                "have the adapter read as one of that program."
            )


def _digest_of_weights(path: Path) -> str:
    with opened(path, "the adapter's weights"):
        return digest_of_file(path)


def _digest_of_config(path: Path) -> str:
    return digest_of_json({key: value for key, value in read_json(path).items() if key not in _FREE})


_DIGESTS: dict[str, Callable[[Path], str]] = {WEIGHTS: _digest_of_weights, PEFT_CONFIG: _digest_of_config}


def get_state(model: nn.Module) -> AdapterState | None:
    """Return what :func:`initialize` or ``load_adapter`` left on the model."""
    return getattr(model, STATE, None)


def set_state(model: nn.Module, state: AdapterState | None) -> None:
    """Keep ``state`` on the model, or remove what is kept.

    A Hugging Face model carries it in its configuration as well, so that a trainer's checkpoint says what its
    adapters are.
    """
    config: Any = getattr(model, "config", None)
    if state is not None:
        setattr(model, STATE, state)
        if hasattr(config, "save_pretrained"):
            setattr(config, CONFIG_KEY, state.to_dict(whole=True))
        return
    for holder, name in ((model, STATE), (config, CONFIG_KEY)):
        if hasattr(holder, name):
            delattr(holder, name)


def fits(value: Any, kind: Any) -> bool:
    """Tell whether a value that was read is of a type; True and False are no numbers."""
    return type(value) in (get_args(kind) or (kind,))


def _damaged(source: str, problem: object) -> ValueError:
    return ValueError(
        f"{source} is damaged ({problem}). Save the adapter again, or delete this to have the adapter read as one of "
        "another program."
    )

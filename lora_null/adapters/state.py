"""What an adapter remembers about how it began, on the model and in ``lora_null.json``."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from ..config import LoraNullConfig
from ..models.wrappers import STATE
from ..system.files import read_json, write_json
from ..system.version import __version__

OWN_CONFIG = "lora_null.json"
# Under this name a model's own configuration, and so config.json in a trainer's checkpoint, says the same.
CONFIG_KEY = "lora_null"
# Where a layer of PEFT keeps (A0, B0) of a shifted base, by adapter name.
INITIAL = "_lora_null_initial"
_FORMAT = 1
_KINDS: dict[str, Any] = {
    "format": int,
    "version": str,
    "config": dict,
    "base_fingerprint": str | None,
    "energies": dict,
    "stacked": bool,
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
    """

    config: LoraNullConfig
    base_fingerprint: str | None = None
    energies: dict[str, float] = field(default_factory=dict)
    stacked: bool = False
    version: str = __version__

    def to_dict(self) -> dict[str, Any]:
        """Return the contents of ``lora_null.json``."""
        return {
            "format": _FORMAT,
            "version": self.version,
            "config": self.config.to_dict(),
            "base_fingerprint": self.base_fingerprint,
            "energies": dict(self.energies),
            "stacked": self.stacked,
        }

    @classmethod
    def from_dict(cls, values: Any, source: str) -> AdapterState:
        """Build from :meth:`to_dict`, without trust; ``source`` is where errors say that the values come from.

        Raises:
            ValueError: The values are damaged, or of a newer format than this version knows.
        """
        if not isinstance(values, dict):
            raise _damaged(source, f"a {type(values).__name__}")
        number = values.get("format", _FORMAT)
        if isinstance(number, int) and number > _FORMAT:
            raise ValueError(
                f"{source} has format {number}, of lora_null {values.get('version')}; lora_null {__version__} knows "
                f"{_FORMAT} and would misread it. Install a newer lora_null."
            )
        wrong = [f"{key}={values[key]!r}" for key in _KINDS if key in values and not _fits(values[key], _KINDS[key])]
        if wrong or "config" not in values or number < 1:
            raise _damaged(source, ", ".join(wrong) or f"format={number}, entries {sorted(values)}")
        try:
            config = LoraNullConfig.from_dict(values["config"])
            energies = {key: float(energy) for key, energy in values.get("energies", {}).items()}
        except (TypeError, ValueError) as error:
            raise _damaged(source, error) from None
        version = values.get("version", "of unknown version")
        return cls(config, values.get("base_fingerprint"), energies, values.get("stacked", False), version)

    def write(self, folder: Path) -> None:
        """Write ``lora_null.json`` into an adapter folder."""
        write_json(folder / OWN_CONFIG, self.to_dict())


def read_state(folder: Path) -> AdapterState | None:
    """Read ``lora_null.json``; ``None`` for an adapter of another program, where it is missing or empty.

    Raises:
        ValueError: The file is damaged, or of a newer format than this version knows.
    """
    path = folder / OWN_CONFIG
    values = read_json(path) if path.exists() else {}
    return AdapterState.from_dict(values, str(path)) if values else None


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
            setattr(config, CONFIG_KEY, state.to_dict())
        return
    for holder, name in ((model, STATE), (config, CONFIG_KEY)):
        if hasattr(holder, name):
            delattr(holder, name)


def _fits(value: Any, kind: Any) -> bool:
    return isinstance(value, kind) and (kind is bool or not isinstance(value, bool))


def _damaged(source: str, problem: object) -> ValueError:
    return ValueError(
        f"{source} is damaged ({problem}). Save the adapter again, or delete this to have the adapter read as one of "
        "another program."
    )

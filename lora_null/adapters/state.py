"""What an adapter remembers about how it began: the configuration, the base and the covariances."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import nn

from .._version import __version__
from ..config import LoraNullConfig

_STATE = "lora_null_state"


@dataclass
class AdapterState:
    """What a patched model remembers of its initialisation; kept as ``model.lora_null_state``.

    Attributes:
        config: The configuration that the adapters were made with.
        base_fingerprint: Identifies the pre-trained weights; ``None`` for a quantised base.
        energies: Per sharing group, ``tr(U^T C U) / tr(C)``: the share of the activations' energy that the
            adapters can see.
    """

    config: LoraNullConfig
    base_fingerprint: str | None = None
    energies: dict[str, float] = field(default_factory=dict)

    def to_dict(self, *, stacked: bool = False) -> dict[str, Any]:
        """Return the contents of ``lora_null.json``; ``stacked`` says that the adapter beside it has the 2r form."""
        return {
            "format": 1,
            "version": __version__,
            "config": self.config.to_dict(),
            "base_fingerprint": self.base_fingerprint,
            "energies": dict(self.energies),
            "stacked": stacked,
        }


def get_state(model: nn.Module) -> AdapterState | None:
    """Return what :func:`initialize` or ``load_adapter`` left on the model."""
    return getattr(model, _STATE, None)


def set_state(model: nn.Module, state: AdapterState | None) -> None:
    """Keep ``state`` on the model, or remove what is kept.

    A Hugging Face model carries it in its configuration as well, so that a trainer's checkpoint says what its
    adapters are.
    """
    config: Any = getattr(model, "config", None)
    if state is not None:
        setattr(model, _STATE, state)
        if hasattr(config, "save_pretrained"):
            config.lora_null = state.to_dict()
        return
    if hasattr(model, _STATE):
        delattr(model, _STATE)
    if hasattr(config, "lora_null"):
        del config.lora_null

"""``lora_A`` of PEFT's layers where it learns within its free directions."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..adapters.basis import BasisFactor, FreeDirections
from ..models.wrappers import plain_name
from .layers import lora_modules


class BasisLinear(BasisFactor, nn.Linear):  # type: ignore[override]
    """A linear layer without bias whose ``weight`` is made of coefficients, for PEFT a ``lora_A`` like any other.

    On disk it is ``lora_A.weight`` as well: its coefficients go into no adapter's file.
    """

    def __init__(self, start: Tensor, directions: FreeDirections):
        """Begin at ``start (r, d)``; errors as in :class:`BasisFactor`."""
        super().__init__(start, directions)
        self.out_features, self.in_features = start.shape
        self.register_parameter("bias", None)


def drop_coefficients(state_dict: dict[str, Any], adapter_name: str) -> None:
    """Take out of a model's state dict what PEFT may not write: ``weight``, which they make, is written instead.

    Coefficients of free directions are meant, and what a factor is made of that torch parametrises.
    """
    ending = f".lora_A.{adapter_name}.coefficients"
    inside = tuple(f".{part}.{adapter_name}.parametrizations." for part in ("lora_A", "lora_B"))
    for key in [key for key in state_dict if key.endswith(ending) or any(name in key for name in inside)]:
        del state_dict[key]


def learns_within(model: nn.Module, adapter_name: str | None = None) -> bool:
    """Tell whether some adapter of the model, or the one of that name, learns within free directions."""
    modules = model.named_modules()
    found = (name for name, module in modules if isinstance(module, BasisLinear))
    return any(adapter_name is None or plain_name(name).endswith(f".lora_A.{adapter_name}") for name in found)


def learn_alike(model: nn.Module, adapter_name: str, other: str) -> None:
    """Let ``lora_A`` of a new adapter be made of coefficients where that of the other is, and begin as it is."""
    for _, layer in lora_modules(model):
        known = layer.lora_A[other] if other in layer.lora_A and adapter_name in layer.lora_A else None
        if isinstance(known, BasisLinear) and not isinstance(layer.lora_A[adapter_name], BasisLinear):
            trained = layer.lora_A[adapter_name].weight.requires_grad
            layer.lora_A[adapter_name] = BasisLinear(known.weight.detach(), known.directions).requires_grad_(trained)

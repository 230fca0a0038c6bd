"""Linear layers that may carry an adapter, and what is said where they may not."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .layout import shape_of
from .quantised import is_dense
from .weights import gathered

# What the parameters are called of which weight_norm, spectral_norm and pruning make a weight.
_MADE = {"weight_orig", "weight_g", "weight_v"}
_FLOATING = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
DIVERGED = "The training run diverged; lower the learning rate and start again from an earlier checkpoint."


@dataclass(frozen=True)
class Target:
    """A linear layer of a model, and the questions that decide whether an adapter may be put on it.

    Attributes:
        name: Of the layer in the model.
        linear: The layer, with weight ``W (m, d)``.
        tied: Whether another module of the model holds the same weight.
    """

    name: str
    linear: nn.Linear
    tied: bool = False

    @property
    def d(self) -> int:
        """Number of inputs."""
        return shape_of(self.linear)[1]

    @property
    def m(self) -> int:
        """Number of outputs."""
        return shape_of(self.linear)[0]

    @property
    def _weight(self) -> Tensor | None:
        """The weight, where the layer keeps it under this name."""
        return getattr(self.linear, "weight", None)

    @property
    def is_flattened(self) -> bool:
        """Whether FSDP1 or ZeRO-3 has left this process a flat part of the weight."""
        weight = self._weight
        return weight is not None and weight.is_floating_point() and weight.ndim == 1

    def require_whole(self, wish: str) -> None:
        """Refuse a weight of which this process holds a part, where ``wish`` makes parameters out of plain tensors."""
        is_dtensor = hasattr(self._weight, "full_tensor")
        if is_dtensor or self.is_flattened:
            kind = "a DTensor" if is_dtensor else "flattened (FSDP1, ZeRO-3)"
            raise ValueError(
                f"{wish} needs whole weights, but that of {self.name} is {kind}: the model is sharded already. "
                "Parameters added now would be neither sharded nor synchronised, and the processes would drift apart. "
                "Attach the adapters first, and shard afterwards (fully_shard, FSDP, parallelize_module, "
                "deepspeed.initialize)."
            )

    def require_plain(self, wish: str) -> None:
        """Refuse a weight that is made anew from others at every call, so that a change of it is lost."""
        made = "weight" in getattr(self.linear, "parametrizations", ())
        if made or not _MADE.isdisjoint(self.linear._parameters):
            raise ValueError(
                f"{wish} needs weights that are parameters, but that of {self.name} is computed from others at every "
                "call (weight_norm, spectral_norm, another parametrization, or a pruning mask). Make it a parameter "
                "first: torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm "
                "or prune.remove."
            )

    def require_writable(self, wish: str) -> None:
        """Refuse a weight that cannot take an update in place, which is what ``wish`` needs."""
        self.require_plain(wish)
        linear, weight = self.linear, self._weight
        if self.tied:
            problem = "shares its weight with another module (tied, or in one memory), which would change along with it"
        elif self.is_flattened:
            problem = "is flattened by FSDP1 or ZeRO-3, so that this process holds a part of it"
        elif weight is None or not is_dense(linear):
            kind = type(linear).__name__ + ("" if weight is None else f", {type(weight).__name__}, {weight.dtype}")
            problem = f"is quantised ({kind}) without zero points that an update could be put into"
        elif any(size > 1 and stride == 0 for size, stride in zip(weight.shape, weight.stride(), strict=True)):
            problem = "holds some values once for several places (an expanded tensor)"
        elif getattr(getattr(linear, "_hf_hook", None), "offload", False):
            problem = "is offloaded, so that accelerate would load the old weight again at the next forward"
        else:
            return
        raise ValueError(
            f"{wish} changes base weights, but {self.name} {problem}. Load the model in floating point, without "
            "offload and with weights of its own for this layer, or keep the base untouched: freeze_a=True while "
            "training, and the saved adapter afterwards."
        )

    def require_rank(self, r: int, group_pooling: int | str | None = None) -> None:
        """Refuse more directions than the layer has inputs; with fewer outputs than directions, some stay unused.

        Pooled inputs are ``d / L``, and ``L`` must divide ``d``.
        """
        L = int(group_pooling or 1)
        if self.d % L:
            raise ValueError(
                f"group_pooling={L} does not divide d={self.d}, the number of inputs of {self.name}. Choose the group "
                "size of the quantised base, which divides it, or leave the layer out through target_modules."
            )
        if r > self.d // L:
            pooled = f" in groups of {L}, {self.d // L}" if L > 1 else ""
            raise ValueError(
                f"r={r} is larger than d={self.d}{pooled}, the number of inputs of {self.name}. Choose r <= "
                f"{self.d // L}, or leave the layer out through target_modules."
            )

    def require_width(self, size: int) -> None:
        """Refuse a covariance of ``size`` features for a layer that reads another number."""
        if size != self.d:
            raise ValueError(
                f"The covariance of {self.name} has {size} features, but the layer reads {self.d}. The covariances "
                "were collected on another model; run lora_null.calibrate on this one."
            )


def require_floating(dtype: Any, what: str) -> None:
    """Refuse a dtype in which factors would lose what they are; ``what`` is the argument's name."""
    if dtype not in _FLOATING:
        raise ValueError(
            f"{what} is {dtype!r}; expected one of {', '.join(map(str, _FLOATING))}. Integers, 8-bit floats and "
            "complex numbers do not hold an adapter's factors."
        )


def require_finite(what: str, lora_A: Tensor, lora_B: Tensor, advice: str) -> None:
    """Refuse factors that hold NaN or Inf; ``what`` names them, ``advice`` says what was not done and what to do."""
    if not all(bool(torch.isfinite(gathered(factor)).all()) for factor in (lora_A, lora_B)):
        raise ValueError(f"{what} holds NaN or Inf{advice}")

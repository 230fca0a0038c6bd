"""Adapters on experts that are fused into one parameter, in the form of PEFT's ``target_parameters``.

``lora_A (E r, d)`` holds the ``A (r, d)`` of one expert after another; of ``lora_B (m, r E)`` the columns ``e``,
``E + e``, ``2 E + e``, ... are the ``B (m, r)`` of the expert ``e``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.basis import FreeDirections
from ..adapters.start import Start
from ..config import LoraNullConfig
from ..covariances.covariances import Covariances
from ..models.refusals import Target, require_finite
from ..system.log import warn_once
from .basis import BasisLinear
from .layers import expert_layers, freeze


class ExpertDirections:
    """The free directions of each expert, for the rows ``(E r, d)`` of a ``lora_A``.

    Coefficients have the shape of the factor: what they make is their part in the free directions of each expert.

    Attributes:
        parts: One for each expert; several may be one object.
        k: How many directions are free, at least.
    """

    complementary, group_pooling = True, None

    def __init__(self, parts: Sequence[FreeDirections]):
        self.parts, self.k = tuple(parts), min(part.k for part in parts)

    @property
    def width(self) -> int:
        """Number of inputs of A."""
        return self.parts[0].width

    @property
    def held(self) -> Tensor:
        """What is held of the first expert's."""
        return self.parts[0].held

    def coordinates(self, A: Tensor) -> Tensor:
        """Return the parts of the rows of ``A (E r, d)`` in the free directions of their experts."""
        rows = A.chunk(len(self.parts))
        return torch.cat([part.expand(part.coordinates(own)) for part, own in zip(self.parts, rows, strict=True)])

    # A projection, which is its own adjoint.
    expand = coordinates


def names_of(layers: Mapping[str, Any]) -> dict[str, str]:
    """Return the names of the experts' matrices, as calibration calls them, to that of their parameter."""
    return {f"{name}.{expert}": name for name, layer in layers.items() for expert in range(layer.num_experts)}


def calibrated(peft_model: nn.Module, adapter_name: str, covariances: Covariances) -> dict[str, Any]:
    """Return the adapters of experts whose inputs were calibrated; a warning names the others."""
    layers = expert_layers(peft_model, adapter_name)
    known = {name: layer for name, layer in layers.items() if f"{name}.0" in covariances}
    left = [name for name in layers if name not in known]
    if left:
        message = (
            f"The covariances hold nothing of {len(left)} parameters that target_parameters selects, for instance "
            f"{left[0]}: their adapters stay as PEFT starts them, in all directions. For a start in the null space "
            "calibrate with LoraNullConfig(target_parameters=...) too, on the model without adapters."
        )
        warn_once(message, message)
    return known


def check(layers: Mapping[str, Any], linears: Mapping[str, Target], adapter_name: str, config: LoraNullConfig) -> None:
    """Refuse what an adapter of experts cannot be, before anything changes."""
    if layers and (config.train == "ab" or config.group_pooling is not None):
        wish = "train='ab'" if config.train == "ab" else f"group_pooling={config.group_pooling!r}"
        raise ValueError(
            f"{wish} is not supported on experts fused into one parameter ({next(iter(layers))}); expected "
            "train='b_in_basis' or 'b'. Leave target_parameters out of the LoraConfig, or choose such a mode."
        )
    for name, layer in layers.items():
        target = linears.get(f"{name}.0")
        rows, r = len(layer.lora_A[adapter_name].weight), layer.r[adapter_name]
        if target is None or rows != r * layer.num_experts:
            found = f"{rows} rows for r={r}" if target else "of a kind that is not known"
            raise ValueError(
                f"The adapter {adapter_name!r} of {name} is {found}; expected r rows for each of {layer.num_experts} "
                "experts, which are kept as gate_up_proj (or up_proj) and down_proj. Leave it out of target_parameters."
            )
        target.require_whole("initialize_lora_null_weights")


def take_start(name: str, layer: Any, start: Start, adapter_name: str) -> Tensor:
    """Take the ``A0`` of all experts of a parameter out of the start, as the layer holds them."""
    own = layer.lora_A[adapter_name].weight
    factors = [start.factors.pop(f"{name}.{expert}")[0] for expert in range(layer.num_experts)]
    A = torch.cat([factor.to(own.device, own.dtype) for factor in factors])
    advice = f" in {A.dtype}, so nothing was changed. Keep the adapters in fp32 (autocast_adapter_dtype=True)."
    require_finite(f"The start of {name}", A, A, advice)
    return A


def directions_of_experts(
    name: str, layer: Any, directions: Mapping[str, FreeDirections]
) -> FreeDirections | ExpertDirections | None:
    """Return the free directions of a parameter's experts, which may be those of all of them."""
    parts = [directions[key] for key in names_of({name: layer}) if key in directions]
    if not parts:
        return None
    return parts[0] if len(set(map(id, parts))) == 1 else ExpertDirections(parts)


@torch.no_grad()
def put(layer: Any, A: Tensor, adapter_name: str, directions: FreeDirections | ExpertDirections | None) -> None:
    """Let the adapter start at A, frozen or learning within directions, and at a B of zero."""
    if directions is not None:
        layer.lora_A[adapter_name] = BasisLinear(A, directions)  # type: ignore[arg-type]
    else:
        if isinstance(layer.lora_A[adapter_name], BasisLinear):
            layer.lora_A[adapter_name] = nn.Linear(A.shape[1], len(A), bias=False, device=A.device, dtype=A.dtype)
        layer.lora_A[adapter_name].weight.copy_(A)
        freeze(layer, adapter_name)
    layer.lora_B[adapter_name].weight.zero_()

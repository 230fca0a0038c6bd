"""Layers that cannot carry an adapter, and what is said about them."""

from __future__ import annotations

from collections.abc import Mapping, Set

import torch
from torch import Tensor, nn

from .quantised import is_dense
from .weights import gathered

DIVERGED = "The training run diverged; lower the learning rate and start again from an earlier checkpoint."


def refuse_sharded(linears: Mapping[str, nn.Linear], wish: str) -> None:
    """Refuse layers of which this process holds a part only, where ``wish`` makes parameters out of plain tensors."""
    for name, linear in linears.items():
        weight = linear.weight
        if hasattr(weight, "full_tensor") or (weight.is_floating_point() and weight.ndim == 1):
            kind = "a DTensor" if hasattr(weight, "full_tensor") else "flattened (FSDP1, ZeRO-3)"
            raise ValueError(
                f"{wish} needs whole weights, but that of {name} is {kind}: the model is sharded already. Parameters "
                "added now would be neither sharded nor synchronised, and the processes would drift apart. Attach the "
                "adapters first, and shard afterwards (fully_shard, FSDP, parallelize_module, deepspeed.initialize)."
            )


def require_writable(name: str, linear: nn.Linear, wish: str, shared: Set[int] = frozenset()) -> None:
    """Refuse a layer whose weight cannot take an update in place, which is what ``wish`` needs.

    ``shared`` are the :func:`shared_weights` of its model.
    """
    weight = linear.weight
    if id(weight) in shared:
        problem = "shares its weight with another module (tied weights), which would change along with it"
    elif weight.is_floating_point() and weight.ndim == 1:
        problem = "is flattened by FSDP1 or ZeRO-3, so that this process holds a part of it"
    elif not is_dense(linear):
        kind = f"{type(linear).__name__}, {type(weight).__name__}, {weight.dtype}"
        problem = f"is quantised ({kind}), so that an update cannot be represented"
    elif getattr(getattr(linear, "_hf_hook", None), "offload", False):
        problem = "is offloaded, so that accelerate would load the old weight again at the next forward"
    else:
        return
    raise ValueError(
        f"{wish} changes base weights, but {name} {problem}. Load the model in floating point, without offload and "
        "with weights of its own for this layer, or keep the base untouched: freeze_a=True while training, and the "
        "saved adapter afterwards."
    )


def require_finite(what: str, lora_A: Tensor, lora_B: Tensor, advice: str) -> None:
    """Refuse factors that hold NaN or Inf; ``what`` names them, ``advice`` says what was not done and what to do."""
    if not all(bool(torch.isfinite(gathered(factor)).all()) for factor in (lora_A, lora_B)):
        raise ValueError(f"{what} holds NaN or Inf{advice}")


def check_rank(name: str, linear: nn.Linear, r: int) -> None:
    """Refuse more directions than the layer has inputs; with fewer outputs than directions, some stay unused."""
    if r > linear.in_features:
        raise ValueError(
            f"r={r} is larger than d={linear.in_features}, the number of inputs of {name}. Choose "
            f"r <= {linear.in_features}, or leave the layer out through target_modules."
        )


def check_width(name: str, linear: nn.Linear, size: int) -> None:
    """Refuse a covariance of ``size`` features for a layer that reads another number."""
    if size != linear.in_features:
        raise ValueError(
            f"The covariance of {name} has {size} features, but the layer reads {linear.in_features}. The covariances "
            "were collected on another model; run lora_null.calibrate on this one."
        )

"""Access to weights wherever they are: on a device, offloaded, sharded or quantised."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from .layout import matrix_of
from .quantised import dequantised, is_dense


def gathered(tensor: Any) -> Tensor:
    """Return the whole of a ``DTensor`` or of a parameter that ZeRO-3 has divided; any other tensor as it is.

    All processes that hold a part must call this.
    """
    if _divided_by_zero3(tensor):
        import deepspeed  # type: ignore[import-not-found]

        with deepspeed.zero.GatheredParameters([tensor]):
            return tensor.detach().clone()
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def _divided_by_zero3(tensor: Any) -> bool:
    """Tell whether DeepSpeed holds the values elsewhere; not so inside the user's own ``GatheredParameters``."""
    return getattr(getattr(tensor, "ds_status", None), "name", None) == "NOT_AVAILABLE"


def is_distributed(model: nn.Module) -> bool:
    """Tell whether processes must act together: parameters are ``DTensor``, or ZeRO-3 has divided the adapters."""
    return any(
        hasattr(parameter, "full_tensor") or ("lora_" in name and _divided_by_zero3(parameter))
        for name, parameter in model.named_parameters()
    )


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """Bring offloaded parameters of ``module`` to its execution device for the length of the block.

    Of an expert, those of the module that holds it.
    """
    from accelerate.utils import align_module_device

    with align_module_device(getattr(module, "owner", module)):
        yield


def dense_weight(linear: nn.Linear) -> Tensor:
    """Return the weight ``(m, d)`` as a floating-point tensor: dequantised, gathered; call inside ``materialized``."""
    return gathered(matrix_of(linear)).detach() if is_dense(linear) else dequantised(linear)


def home_of(linear: nn.Linear) -> torch.device:
    """Return the device on which ``linear`` computes: that of its weight, or where accelerate brings it."""
    with materialized(linear):
        # HQQ's layers have no weight of that name.
        held = linear.weight if hasattr(linear, "weight") else next(linear.parameters())
        device = held.device
    return torch.device("cpu") if device.type == "meta" else device

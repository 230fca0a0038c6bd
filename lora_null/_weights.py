"""Access to weights wherever they are: on a device, offloaded, sharded or quantised."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager

import torch
from torch import Tensor, nn

# Elements of each weight that enter the fingerprint: enough to tell two models apart, and 120 layers of a
# 135M model take 10 ms.
_SAMPLES = 64


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """Bring offloaded parameters of ``module`` to its execution device for the length of the block."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def dense_weight(linear: nn.Linear) -> Tensor:
    """Return the weight ``(m, d)`` as a floating-point tensor: dequantised, gathered; call inside ``materialized``."""
    weight = linear.weight
    if hasattr(weight, "full_tensor"):
        return weight.full_tensor().detach()
    if weight.is_floating_point() and weight.shape == (linear.out_features, linear.in_features):
        return weight.detach()
    from peft.utils.integrations import dequantize_module_weight

    return dequantize_module_weight(linear).detach()


def shared_weights(model: nn.Module) -> set[int]:
    """Return the ids of parameters that more than one module of ``model`` holds, such as tied embeddings."""
    holders = Counter(id(p) for module in model.modules() for p in module._parameters.values() if p is not None)
    return {key for key, count in holders.items() if count > 1}


def require_writable(name: str, linear: nn.Linear, wish: str, shared: Set[int] = frozenset()) -> None:
    """Refuse a layer whose weight cannot take an update in place, which is what ``wish`` needs.

    ``shared`` are the :func:`shared_weights` of its model.
    """
    weight = linear.weight
    if id(weight) in shared:
        problem = "shares its weight with another module (tied weights), which would change along with it"
    elif not weight.is_floating_point() or weight.shape != (linear.out_features, linear.in_features):
        problem = f"is quantised ({type(linear).__name__}, {weight.dtype}), so that an update cannot be represented"
    elif getattr(getattr(linear, "_hf_hook", None), "offload", False):
        problem = "is offloaded, so that accelerate would load the old weight again at the next forward"
    else:
        return
    raise ValueError(
        f"{wish} changes base weights, but {name} {problem}. Load the model in floating point, without offload and "
        "with weights of its own for this layer, or keep the base untouched: freeze_a=True while training, and the "
        "saved adapter afterwards."
    )


def fingerprint(linears: Mapping[str, nn.Linear]) -> str | None:
    """Hash names, shapes and a sample of the values of pre-trained weights, whatever dtype they were loaded in.

    The values are rounded to bf16, so that a bf16 checkpoint loaded in fp32 is the same model. Quantised
    weights have no values to compare: ``None``.
    """
    digest = hashlib.sha256()
    for name, linear in linears.items():
        with materialized(linear):
            weight = linear.weight
            if not weight.is_floating_point() or weight.shape != (linear.out_features, linear.in_features):
                return None
            flat = dense_weight(linear).flatten()
            step = max(1, flat.numel() // _SAMPLES)
            sample = flat[::step][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(f"{name}:{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()

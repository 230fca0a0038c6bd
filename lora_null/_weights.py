"""Access to weights wherever they are: on a device, offloaded, sharded or quantised."""

from __future__ import annotations

import hashlib
import sys
from collections import Counter
from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ._quantised import dequantised, is_dense

# Elements of each weight that enter the fingerprint: enough to tell two models apart, and 120 layers of a
# 135M model take 10 ms.
_SAMPLES = 64


# Modules that FSDP1, torch.compile and activation checkpointing put into a model, and its names with them.
_WRAPPERS = {"_fsdp_wrapped_module", "_orig_mod", "_checkpoint_wrapped_module"}


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


def unwrapped(model: Any) -> Any:
    """Return the adapted model inside DDP, FSDP1, torch.compile, a DeepSpeed engine or a module of a user's own.

    Weights that FSDP2 has left gathered are put back.
    After a forward without a backward, the outermost part of an FSDP2 model holds copies of its weights; a change
    of them would be lost.
    """
    # Half a second to import, and nothing to look for where nobody has.
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")
    kinds = (nn.DataParallel, nn.parallel.DistributedDataParallel, *([fsdp.FullyShardedDataParallel] if fsdp else []))
    while isinstance(model, kinds) or "_orig_mod" in model._modules:
        model = model.module if isinstance(model, kinds) else model._orig_mod
    for module in model.modules() if fsdp else ():
        if isinstance(module, fsdp.FSDPModule):
            module.reshard()
    # Names of modules go into adapters, so that a wrapper must not add to them.
    holders = [module for module in model.modules() if "lora_null_state" in module.__dict__]
    return holders[0] if len(holders) == 1 else model


def uncompiled(model: Any) -> Any:
    """Return the model inside torch.compile, whose modules have the names that covariances and adapters know."""
    while "_orig_mod" in model._modules:
        model = model._orig_mod
    return model


def plain_name(name: str) -> str:
    """Return the name that a module has in the model before it was wrapped."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def is_distributed(model: nn.Module) -> bool:
    """Tell whether processes must act together: parameters are ``DTensor``, or ZeRO-3 has divided the adapters."""
    return any(
        hasattr(parameter, "full_tensor") or ("lora_" in name and _divided_by_zero3(parameter))
        for name, parameter in model.named_parameters()
    )


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


@contextmanager
def materialized(module: nn.Module) -> Iterator[None]:
    """Bring offloaded parameters of ``module`` to its execution device for the length of the block."""
    from accelerate.utils import align_module_device

    with align_module_device(module):
        yield


def dense_weight(linear: nn.Linear) -> Tensor:
    """Return the weight ``(m, d)`` as a floating-point tensor: dequantised, gathered; call inside ``materialized``."""
    return gathered(linear.weight).detach() if is_dense(linear) else dequantised(linear)


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


def home_of(linear: nn.Linear) -> torch.device:
    """Return the device on which ``linear`` computes: that of its weight, or where accelerate brings it."""
    with materialized(linear):
        device = linear.weight.device
    return torch.device("cpu") if device.type == "meta" else device


def fingerprint(linears: Mapping[str, nn.Linear]) -> str | None:
    """Hash names, shapes and a sample of the values of pre-trained weights, whatever dtype they were loaded in.

    The values are rounded to bf16, so that a bf16 checkpoint loaded in fp32 is the same model. Quantised
    weights have no values to compare: ``None``.
    """
    digest = hashlib.sha256()
    for name, linear in linears.items():
        with materialized(linear):
            weight = linear.weight
            if not is_dense(linear):
                return None
            flat = dense_weight(linear).flatten()
            step = max(1, flat.numel() // _SAMPLES)
            sample = flat[::step][:_SAMPLES].to("cpu", torch.bfloat16)
        digest.update(f"{name}:{tuple(weight.shape)}".encode())
        digest.update(sample.view(torch.int16).numpy().tobytes())
    return digest.hexdigest()

"""An adapter on a shifted base, written for the untouched one, and taken back."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..adapters.delta import pad, stack, unstack
from ..adapters.layer import SAVED_SCALING
from ..adapters.state import INITIAL
from ..models.wrappers import plain_name
from ..system.tensors import PLAIN_TENSORS
from .layers import holds_linear, lora_modules, parameter_of

# How far A0 and B0 of a checkpoint may be from the layer's own, relative to their norms; more where they were rounded.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 3e-2


def is_shifted(model: nn.Module) -> bool:
    """Tell whether the base of some layer is shifted by ``- s B0 A0``."""
    return any(getattr(module, INITIAL, None) for module in model.modules())


def initial_of(layer: Any) -> tuple[Tensor, Tensor, float] | None:
    """Return ``A0 (r, d)``, ``B0 (m, r)`` and ``s`` by which the base is shifted, whichever adapter did it."""
    return next(iter(getattr(layer, INITIAL, {}).values()), None)


def is_stacked(layer: Any, adapter_name: str, lora_A: Tensor) -> bool:
    """Tell whether :func:`change_of` gives the form that training goes on from: rank and ``s`` are the start's."""
    initial = initial_of(layer)
    return initial is not None and lora_A.shape == initial[0].shape and float(layer.scaling[adapter_name]) == initial[2]


def require_reached(name: str, layer: Any, adapter_name: str) -> None:
    """Refuse a layer with a shifted base where the adapter is missing to hold the difference, or others are active too.

    Each of several would take the shift away from the untouched base once more.
    """
    if initial_of(layer) is None:
        return
    if not holds_linear(layer, adapter_name):
        raise ValueError(
            f"The base weight of {name} was shifted by another adapter (freeze_a=False), and {adapter_name!r} has no "
            "adapter there that could undo it on the untouched base. Train it on a freshly loaded model."
        )
    active = [other for other in layer.active_adapters if other in layer.lora_A]
    if adapter_name in active and len(active) > 1:
        raise ValueError(
            f"{name} has a shifted base (train='ab') and several active adapters, {active}. Each is written for the "
            "untouched base alone, so that they would not add up there; expected one active. Choose one with "
            "set_adapter, or make one of them with add_weighted_adapter."
        )


def change_of(layer: Any, adapter_name: str, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the change of the untouched weight by one adapter of a layer as fp32 ``A' (k, d)`` and ``B' (m, k)``."""
    initial, scaling = initial_of(layer), float(layer.scaling[adapter_name])
    if initial is None:
        return stack(lora_A, lora_B, scaling, None)
    if is_stacked(layer, adapter_name, lora_A):
        return stack(lora_A, lora_B, scaling, initial[:2])
    # Another adapter than the one that shifted the base: the two have nothing to cancel.
    own, start = stack(lora_A, lora_B, scaling, None), stack(*initial, None)
    return torch.cat([own[0], start[0].to(own[0].device)]), torch.cat([own[1], -start[1].to(own[1].device)], dim=1)


def for_untouched_base(model: nn.Module, adapter_name: str, state_dict: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Replace an adapter's entries in ``state_dict`` by their change of the untouched base.

    Args:
        model: Holds the adapter.
        adapter_name: Its name.
        state_dict: Of ``model``, changed in place; entries that another process holds may be missing.

    Returns:
        The settings of a ``LoraConfig`` under which PEFT reads the entries, and whether all have the rank-``2 r`` form.

    Raises:
        ValueError: The base of a layer is shifted that the adapter does not reach, or where it is not the only one.
    """
    changes: dict[str, tuple[Any, tuple[Tensor, Tensor]]] = {}
    settings: dict[str, Any] = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    stacked = True
    for name, layer in lora_modules(model):
        require_reached(name, layer, adapter_name)
        if holds_linear(layer, adapter_name):
            lora_A, lora_B = (state_dict.get(f"{name}.{part}.{adapter_name}.weight") for part in ("lora_A", "lora_B"))
            if lora_A is not None and lora_B is not None:
                changes[name] = layer, change_of(layer, adapter_name, lora_A, lora_B)
                stacked = stacked and is_stacked(layer, adapter_name, lora_A)
            continue
        if adapter_name in layer.r:
            rank, scaling = pattern_of(name, layer, adapter_name)
            settings["rank_pattern"] |= rank
            settings["alpha_pattern"] |= scaling
    r = max((len(lora_A) for _, (lora_A, _) in changes.values()), default=1)
    for name, (layer, change) in changes.items():
        keys = [f"{name}.{part}.{adapter_name}.weight" for part in ("lora_A", "lora_B")]
        for key, factor in zip(keys, pad(*change, r), strict=True):
            state_dict[key] = factor.to(state_dict[key].dtype).contiguous()
        bias = f"{name}.lora_B.{adapter_name}.bias"
        if bias in state_dict:
            state_dict[bias] = float(layer.scaling[adapter_name]) * state_dict[bias]
    return {**settings, "r": r, "lora_alpha": r}, stacked


def pattern_of(name: str, layer: Any, adapter_name: str) -> tuple[dict[str, int], dict[str, float]]:
    """Return ``rank_pattern`` and ``alpha_pattern`` by which PEFT gives a layer the rank and scaling that it has."""
    plain = plain_name(name).removeprefix("base_model.model.")
    of = parameter_of(plain, layer) if isinstance(layer, ParamWrapper) else plain.replace(".base_layer", "")
    key, r = "^" + re.escape(of), layer.r[adapter_name]
    return {key: r}, {key: float(layer.scaling[adapter_name]) * r}


@torch.no_grad()
def take_apart(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any, *_: Any) -> None:
    """Give factors that are loaded the form that the layer holds; a hook for ``register_load_state_dict_pre_hook``.

    On a shifted base they come from :func:`for_untouched_base`. Everywhere, rows of zeros that made ranks uniform go,
    and ``lora_B`` is brought to the layer's scaling where :func:`note_scaling` has left that of its run.

    Raises:
        ValueError: They were made for the untouched base, or for another shifted one.
    """
    initial = initial_of(layer)
    for name in layer.lora_A:
        key_A, key_B, bias = (f"{prefix}{part}.{name}.{kind}" for part, kind in _ENTRIES)
        if key_A not in state_dict or key_B not in state_dict:
            continue
        factor = local_metadata.get(SAVED_SCALING, {}).get(name, layer.scaling[name]) / layer.scaling[name]
        for key in (key_B, bias) if factor != 1 else ():
            if key in state_dict:
                state_dict[key] = factor * state_dict[key]
        lora_A, lora_B = state_dict[key_A], state_dict[key_B]
        r, rows = len(layer.lora_A[name].weight), len(lora_A)
        # A whole model's state dict has the base too, shifted as it is.
        base = state_dict.get(f"{prefix}base_layer.weight")
        if initial is not None and base is not None:
            _require_same_shift(f"{prefix}{name}", layer, base, initial)
        elif initial is not None and rows != len(initial[0]):
            lora_A, lora_B = _unshifted(f"{prefix}{name}", lora_A, lora_B, initial)
            scaling = float(layer.scaling[name])
            state_dict[key_A], state_dict[key_B] = pad(lora_A, lora_B * (initial[2] / scaling), r)
            if bias in state_dict:
                state_dict[bias] = state_dict[bias] / scaling
        elif rows > r and not bool(lora_A[r:].any()) and not bool(lora_B[:, r:].any()):
            state_dict[key_A], state_dict[key_B] = lora_A[:r], lora_B[:, :r]


def note_scaling(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Leave in a state dict the scaling that its factors belong to; a hook for ``register_state_dict_post_hook``.

    It is kept where torch keeps versions: no file of safetensors has it, what ``torch.save`` writes does.
    """
    local_metadata[SAVED_SCALING] = {name: float(scaling) for name, scaling in layer.scaling.items()}


_ENTRIES = (("lora_A", "weight"), ("lora_B", "weight"), ("lora_B", "bias"))


def _unshifted(
    name: str, stacked_A: Tensor, stacked_B: Tensor, initial: tuple[Tensor, Tensor, float]
) -> tuple[Tensor, Tensor]:
    initial_A, initial_B = (factor.to(stacked_A.device, torch.float32) for factor in initial[:2])
    tolerance = _TOLERANCE if stacked_A.dtype.itemsize >= 4 else _TOLERANCE_HALF
    r = len(initial_A)
    lora_A, change_B, *found = unstack(stacked_A.float(), stacked_B.float(), initial[2], r)
    for got, own in zip(found, (initial_A, initial_B), strict=True):
        if got.shape != own.shape or (got - own).norm() > tolerance * own.norm():
            raise _other_start(name)
    # The layer's own B0, which its base was shifted by: that of the file may be rounded.
    return lora_A, change_B + initial_B


def _require_same_shift(name: str, layer: Any, base: Tensor, initial: tuple[Tensor, Tensor, float]) -> None:
    own = layer.get_base_layer().weight
    if type(base) not in PLAIN_TENSORS or type(own) not in PLAIN_TENSORS or base.shape != own.shape:
        return
    lora_A, lora_B = (factor.to(own.device, torch.float32) for factor in initial[:2])
    # || s B0 A0 ||, without the product
    shift = abs(initial[2]) * ((lora_A @ lora_A.T) * (lora_B.T @ lora_B)).sum().clamp_min(0).sqrt()
    off = (base.to(own.device).float() - own.float()).norm()
    if off > (_TOLERANCE if base.dtype.itemsize >= 4 else _TOLERANCE_HALF) * shift:
        raise _other_start(name)


def _other_start(name: str) -> ValueError:
    return ValueError(
        f"The checkpoint's adapter {name} started from other factors than this model's, so that it belongs to another "
        "shifted base. To resume, initialise with the covariances and the LoraConfig of that run (Covariances.save "
        "keeps them); to go on from the checkpoint alone, use "
        "lora_null.load_adapter(base_model, checkpoint, is_trainable=True)."
    )

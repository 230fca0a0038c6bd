"""An adapter on a shifted base, written for the untouched one, and taken back."""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import set_base_model_state_dict, set_peft_model_state_dict
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn

from ..adapters.delta import pad, stack, unstack
from ..adapters.layer import SAVED_SCALING
from ..models.wrappers import plain_name
from ..system.tensors import PLAIN_TENSORS
from .layers import holds_linear, lora_modules, parameter_of
from .shifted import Initial, called_by, initial_of, moved, shift_of

# How far A0 and B0 of a checkpoint may be from the layer's own, relative to their norms; more where they were rounded.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 3e-2


def is_stacked(layer: Any, adapter_name: str, lora_A: Tensor) -> bool:
    """Tell whether :func:`change_of` gives the form that training goes on from: the rank is the start's."""
    initial = initial_of(layer, adapter_name)
    return initial is not None and lora_A.shape == initial[0].shape


def change_of(layer: Any, adapter_name: str, lora_A: Tensor, lora_B: Tensor) -> tuple[Tensor, Tensor]:
    """Return the change of the untouched weight by one adapter of a layer as fp32 ``A' (k, d)`` and ``B' (m, k)``."""
    initial, scaling = initial_of(layer, adapter_name), float(layer.scaling[adapter_name])
    if initial is None:
        return stack(lora_A, lora_B, scaling, None)
    if is_stacked(layer, adapter_name, lora_A):
        return stack(lora_A, lora_B, scaling, initial[:2])
    # Its rank was padded since.
    own, start = stack(lora_A, lora_B, scaling, None), stack(*initial[:2], scaling, None)
    return torch.cat([own[0], start[0].to(own[0].device)]), torch.cat([own[1], -start[1].to(own[1].device)], dim=1)


def for_untouched_base(model: nn.Module, adapter_name: str, state_dict: dict[str, Any]) -> tuple[dict[str, Any], bool]:
    """Replace an adapter's entries in ``state_dict`` by their change of the untouched base.

    Args:
        model: Holds the adapter.
        adapter_name: Its name.
        state_dict: Of ``model``, changed in place; entries that another process holds may be missing.

    Returns:
        The settings of a ``LoraConfig`` under which PEFT reads the entries, and whether all have the rank-``2 r`` form.
    """
    changes: dict[str, tuple[Any, tuple[Tensor, Tensor]]] = {}
    settings: dict[str, Any] = {"use_rslora": False, "rank_pattern": {}, "alpha_pattern": {}}
    stacked = True
    for name, layer in lora_modules(model):
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

    Those that count on a shift come from :func:`for_untouched_base`. Everywhere, rows of zeros that made ranks uniform
    go, and ``lora_B`` is brought to the layer's scaling where :func:`note_scaling` has left that of its run. A base
    from PEFT's ``set_base_model_state_dict`` is shifted like the one it replaces.

    Raises:
        ValueError: They were made for the untouched base, or for another shifted one.
    """
    require_own_shift(layer, state_dict, prefix)
    base = f"{prefix}base_layer.weight"
    if shift_of(layer) is not None and base in state_dict and called_by(set_base_model_state_dict) is not None:
        state_dict[base] = moved(layer, state_dict[base], -1)
    for name in layer.lora_A:
        key_A, key_B, bias = (f"{prefix}{part}.{name}.{kind}" for part, kind in _ENTRIES)
        if key_A not in state_dict or key_B not in state_dict:
            continue
        scaling = _scaling_of(layer, name)
        factor = local_metadata.get(SAVED_SCALING, {}).get(name, scaling) / scaling
        for key in (key_B, bias) if factor != 1 else ():
            if key in state_dict:
                state_dict[key] = factor * state_dict[key]
        lora_A, lora_B = state_dict[key_A], state_dict[key_B]
        r, rows = len(layer.lora_A[name].weight), len(lora_A)
        if (initial := _apart(layer, name, state_dict, prefix)) is not None:
            lora_A, lora_B = _unshifted(f"{prefix}{name}", lora_A, lora_B, initial)
            state_dict[key_A], state_dict[key_B] = pad(lora_A, lora_B, r)
            if bias in state_dict:
                state_dict[bias] = state_dict[bias] / float(layer.scaling[name])
        elif rows > r and not bool(lora_A[r:].any()) and not bool(lora_B[:, r:].any()):
            state_dict[key_A], state_dict[key_B] = lora_A[:r], lora_B[:, :r]


@torch.no_grad()
def require_own_shift(layer: Any, state_dict: dict[str, Any], prefix: str) -> None:
    """Refuse, before anything is loaded, what :func:`take_apart` would."""
    initial, base = shift_of(layer), state_dict.get(f"{prefix}base_layer.weight")
    if initial is None:
        return
    if base is not None and called_by(set_base_model_state_dict) is None:
        _require_same_shift(prefix.removesuffix("."), layer, base, initial)
    for name in layer.lora_A:
        if (own := _apart(layer, name, state_dict, prefix)) is not None:
            lora_A, lora_B = (state_dict[f"{prefix}{part}.{name}.weight"] for part in ("lora_A", "lora_B"))
            _unshifted(f"{prefix}{name}", lora_A, lora_B, own)


def require_own_shifts(model: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Do :func:`require_own_shift` for all layers of a model; a hook as :func:`take_apart` is."""
    for name, layer in model.named_modules():
        if shift_of(layer) is not None:
            require_own_shift(layer, state_dict, f"{prefix}{name}.")


def _apart(layer: Any, adapter_name: str, state_dict: dict[str, Any], prefix: str) -> Initial | None:
    """Return the start of an adapter whose factors in ``state_dict`` have the form for the untouched base."""
    initial, lora_A = initial_of(layer, adapter_name), state_dict.get(f"{prefix}lora_A.{adapter_name}.weight")
    # A whole model's state dict has the base too, shifted as it is.
    whole = f"{prefix}base_layer.weight" in state_dict
    if initial is None or lora_A is None or whole or f"{prefix}lora_B.{adapter_name}.weight" not in state_dict:
        return None
    if len(lora_A) != len(initial[0]):
        return initial
    # A state dict of the model itself has factors as they are, and so has what PEFT's functions take out of a wrapped
    # one and put into it again. All else that they are given is for the untouched base.
    if plain_name(prefix) == prefix and called_by(set_peft_model_state_dict) is not None:
        raise other_start(f"{prefix}{adapter_name}")
    return None


def note_scaling(layer: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Leave in a state dict the scaling that its factors belong to; a hook for ``register_state_dict_post_hook``.

    It is kept where torch keeps versions: no file of safetensors has it, what ``torch.save`` writes does.
    """
    local_metadata[SAVED_SCALING] = {name: _scaling_of(layer, name) for name in layer.scaling}


def _scaling_of(layer: Any, adapter_name: str) -> float:
    """Return the scaling that factors belong to: on a shifted base, where it cannot go into ``lora_B``, the start's."""
    initial = initial_of(layer, adapter_name)
    return float(layer.scaling[adapter_name]) if initial is None else initial[2]


_ENTRIES = (("lora_A", "weight"), ("lora_B", "weight"), ("lora_B", "bias"))


def _unshifted(name: str, stacked_A: Tensor, stacked_B: Tensor, initial: Initial) -> tuple[Tensor, Tensor]:
    initial_A, initial_B = (factor.to(stacked_A.device, torch.float32) for factor in initial[:2])
    tolerance = _TOLERANCE if stacked_A.dtype.itemsize >= 4 else _TOLERANCE_HALF
    r = len(initial_A)
    lora_A, change_B, *found = unstack(stacked_A.float(), stacked_B.float(), initial[2], r)
    for got, own in zip(found, (initial_A, initial_B), strict=True):
        if got.shape != own.shape or (got - own).norm() > tolerance * own.norm():
            raise other_start(name)
    # The layer's own B0, which its base was shifted by: that of the file may be rounded.
    return lora_A, change_B + initial_B


def _require_same_shift(name: str, layer: Any, base: Tensor, initial: Initial) -> None:
    own = layer.get_base_layer().weight
    if type(base) not in PLAIN_TENSORS or type(own) not in PLAIN_TENSORS or base.shape != own.shape:
        return
    lora_A, lora_B = (factor.to(own.device, torch.float32) for factor in initial[:2])
    # || s B0 A0 ||, without the product
    shift = abs(initial[2]) * ((lora_A @ lora_A.T) * (lora_B.T @ lora_B)).sum().clamp_min(0).sqrt()
    off = (base.to(own.device).float() - own.float()).norm()
    if off > (_TOLERANCE if base.dtype.itemsize >= 4 else _TOLERANCE_HALF) * shift:
        raise ValueError(
            f"The base weight of {name} is to be replaced by another than the shifted one (train='ab') that its "
            "adapter counts on: the untouched one, or that of a run that started from other factors. Expected the "
            "state dict of this run. For a base alone use PEFT's set_base_model_state_dict, which is known here; to go "
            "on from another run, save its adapter with save_pretrained and use "
            "lora_null.load_adapter(base_model, checkpoint, is_trainable=True)."
        )


def other_start(name: str) -> ValueError:
    """Return the error for factors of a file that did not start where the base was shifted."""
    return ValueError(
        f"The checkpoint's adapter {name} started from other factors than this model's, so that it belongs to another "
        "shifted base. To resume, initialise with the covariances and the LoraConfig of that run (Covariances.save "
        "keeps them); to go on from the checkpoint alone, use "
        "lora_null.load_adapter(base_model, checkpoint, is_trainable=True)."
    )

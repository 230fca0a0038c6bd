"""A base weight shifted by ``- s B0 A0`` for the adapters that start there; all else sees the untouched one."""

from __future__ import annotations

import sys
from functools import partial
from typing import Any

import torch
from peft import LoraModel, PeftModel, get_base_model_state_dict
from torch import Tensor, nn

from ..adapters.delta import shift_base, shifted
from ..adapters.plain import shifting_start
from ..models.layout import is_transposed
from .layers import holds_linear, lora_modules

# On a layer: (A0, B0, s) of its shift, and the names of the adapters that count on it, as keys.
_SHIFT, _STARTED = "_lora_null_shift", "_lora_null_started"

Initial = tuple[Tensor, Tensor, float]


def shift(layer: Any, adapter_name: str, lora_A: Tensor, lora_B: Tensor) -> None:
    """Shift the base weight of a layer by what an adapter adds now, and let nothing else see it.

    With no adapter at work, or with others, the layer adds ``s B0 A0`` back, and so do ``unload`` and
    ``merge_and_unload``: exact up to the rounding of the shift.
    """
    scaling = float(layer.scaling[adapter_name])
    shift_base(layer.get_base_layer(), lora_A, lora_B, -scaling)
    setattr(layer, _SHIFT, (lora_A, lora_B, scaling))
    setattr(layer, _STARTED, {adapter_name: True})
    # PEFT's delete_adapter takes the name out of whatever is listed here.
    layer.other_param_names = (*layer.other_param_names, _STARTED)
    layer.register_forward_hook(_add_back, with_kwargs=True)
    layer.unload_and_optionally_merge_module = partial(_unload, layer)
    layer.update_layer = partial(_update_layer, layer)


def shift_of(layer: Any) -> Initial | None:
    """Return ``A0 (r, d)``, ``B0 (m, r)`` and ``s`` by which the base of a layer is shifted."""
    return getattr(layer, _SHIFT, None)


def initial_of(layer: Any, adapter_name: str) -> Initial | None:
    """Return the same if the adapter is one that counts on the shift."""
    return shift_of(layer) if adapter_name in getattr(layer, _STARTED, {}) else None


def is_shifted(model: nn.Module) -> bool:
    """Tell whether the base of some layer is shifted."""
    return any(shift_of(module) is not None for module in model.modules())


def counts_on_shift(model: nn.Module, adapter_name: str) -> bool:
    """Tell whether the adapter counts on the shift of some layer."""
    return any(initial_of(module, adapter_name) is not None for module in model.modules())


def start_beside(model: nn.Module, adapter_name: str) -> None:
    """Let a new adapter that agrees with the first in all its layers begin as that did, at ``A0`` and ``B0``.

    It changes nothing then, and the factors of the first may be copied into it, as TRL does to have a reference.
    """
    layers = [layer for _, layer in lora_modules(model) if holds_linear(layer, adapter_name)]
    if not all(_agrees(layer, adapter_name) for layer in layers):
        return
    for layer in layers:
        getattr(layer, _STARTED)[adapter_name] = True
        with torch.no_grad():
            for part, start in zip((layer.lora_A, layer.lora_B), getattr(layer, _SHIFT)[:2], strict=True):
                if not part[adapter_name].weight.is_meta:
                    part[adapter_name].weight.copy_(start)


def _agrees(layer: Any, adapter_name: str) -> bool:
    initial = shift_of(layer)
    if initial is None or adapter_name in layer.lora_variant:
        return False
    same = layer.lora_A[adapter_name].weight.shape == initial[0].shape
    return same and float(layer.scaling[adapter_name]) == initial[2]


def require_unreading(adapter_name: str, peft_config: Any) -> None:
    """Refuse a new adapter on a shifted base whose layers would take it for the one that they belong to."""
    start = shifting_start(getattr(peft_config, "init_lora_weights", None))
    dora, kasa = getattr(peft_config, "use_dora", False), getattr(peft_config, "kasa_config", None)
    if start or dora or kasa:
        what = f"init_lora_weights={start!r}" if start else "use_dora" if dora else "kasa_config"
        raise ValueError(
            f"The adapter {adapter_name!r} has {what}, by which PEFT computes with the base weights or moves them, but "
            "those in memory are shifted for another adapter (train='ab'). Expected plain LoRA beside it; use a "
            "freshly loaded model for this one."
        )


def keep_configurations(model: Any) -> None:
    """Let a model of transformers, whose tuner is made anew for each adapter, refuse one before a layer changes."""
    if not isinstance(model.peft_config, _Configurations):
        model.peft_config = _Configurations(model.peft_config)


class _Configurations(dict):
    """``peft_config`` of a model on a shifted base: PEFT puts a new one in before it touches the layers."""

    def __setitem__(self, adapter_name: str, peft_config: Any) -> None:
        if adapter_name not in self:
            require_unreading(adapter_name, peft_config)
        super().__setitem__(adapter_name, peft_config)

    def __reduce__(self) -> tuple:
        """Copies and pickles take what is in it unasked."""
        return type(self), (dict(self),)


def _update_layer(layer: Any, adapter_name: str, *args: Any, config: Any, **kwargs: Any) -> None:
    """Let PEFT make a further adapter of the layer, also where the model's configurations went with its last one."""
    require_unreading(adapter_name, config)
    type(layer).update_layer(layer, adapter_name, *args, config=config, **kwargs)


def keep_apart(peft_model: PeftModel) -> None:
    """Refuse to combine, by ``add_weighted_adapter``, factors that count on the shift."""
    tuner: Any = peft_model.base_model
    if isinstance(tuner, LoraModel) and not isinstance(tuner.__dict__.get("add_weighted_adapter"), _AddWeighted):
        tuner.add_weighted_adapter = _AddWeighted(tuner)


class _AddWeighted:
    """``add_weighted_adapter`` of one model of PEFT's, which adds up factors as they are."""

    def __init__(self, tuner: Any) -> None:
        self.tuner = tuner

    def __call__(self, adapters: list[str], *args: Any, **kwargs: Any) -> Any:
        if started := [name for name in adapters if counts_on_shift(self.tuner, name)]:
            raise ValueError(
                f"add_weighted_adapter adds up factors, but those of {started} count on a base that is shifted "
                "(train='ab'), and would be off on the untouched one. Save them with save_pretrained, and combine them "
                "on a freshly loaded model, or under new names with load_adapter on this one."
            )
        return type(self.tuner).add_weighted_adapter(self.tuner, adapters, *args, **kwargs)


def base_handed_out(base: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Let PEFT's ``get_base_model_state_dict`` return the untouched base; a hook of the base's state dict."""
    if prefix or called_by(get_base_model_state_dict) is None:
        return
    for name, layer in lora_modules(base):
        key = f"{name}.base_layer.weight"
        if shift_of(layer) is not None and key in state_dict:
            state_dict[key] = moved(layer, state_dict[key], _missing(layer, layer.merged_adapters))


@torch.no_grad()
def moved(layer: Any, weight: Tensor, times: float) -> Tensor:
    """Return a weight as the base layer holds it, plus ``times s B0 A0``."""
    lora_A, lora_B, scaling = _shift_on(layer, weight.device)
    turned = is_transposed(layer.get_base_layer())
    new = shifted(weight.t() if turned else weight, lora_A, lora_B, times * scaling).to(weight.dtype)
    return new.t() if turned else new


def called_by(function: Any) -> Any:
    """Return the frame in which ``function`` has led here, or ``None``."""
    frame: Any = sys._getframe(1)
    while frame is not None and frame.f_code is not function.__code__:
        frame = frame.f_back
    return frame


def _missing(layer: Any, at_work: list[str]) -> float:
    """Return how often ``s B0 A0`` lacks for a sum of changes of the untouched weight; -1 if two count on it.

    An adapter whose scaling was changed is taken by as much of its change, ``s' (B A - B0 A0)``.
    """
    started = [name for name in at_work if name in getattr(layer, _STARTED) and name in layer.lora_A]
    return 1 - sum(float(layer.scaling[name]) / getattr(layer, _SHIFT)[2] for name in started)


def _add_back(layer: Any, args: tuple, kwargs: dict[str, Any], output: Tensor) -> Tensor | None:
    x = args[0] if args else kwargs["x"]
    names = kwargs.get("adapter_names")
    times: Any
    if layer.disable_adapters:
        times = 1
    elif names is None:
        times = _missing(layer, layer.merged_adapters if layer.merged else layer.active_adapters)
    else:
        rows = [_missing(layer, [name]) for name in names]
        times = torch.tensor(rows, device=x.device).view(-1, *[1] * (x.dim() - 1)) if any(rows) else 0
    if not isinstance(times, Tensor) and times == 0:
        return None
    lora_A, lora_B, scaling = _shift_on(layer, x.device)
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        back = nn.functional.linear(nn.functional.linear(x.to(dtype), lora_A.to(dtype)), lora_B.to(dtype))
        return (output.to(dtype) + times * scaling * back).to(output.dtype)


def _unload(layer: Any, merge: bool, safe_merge: bool = False, adapter_names: list[str] | None = None) -> nn.Module:
    """Return the base layer to PEFT, which takes the layer out of the model."""
    if merge:
        layer.merge(safe_merge=safe_merge, adapter_names=adapter_names)
    base = layer.get_base_layer()
    if times := _missing(layer, layer.merged_adapters):
        lora_A, lora_B, scaling = getattr(layer, _SHIFT)
        shift_base(base, lora_A, lora_B, times * scaling)
    return base


def _shift_on(layer: Any, device: torch.device) -> Initial:
    lora_A, lora_B, scaling = getattr(layer, _SHIFT)
    if lora_A.device != device:
        # Once, and not at every forward.
        lora_A, lora_B = lora_A.to(device), lora_B.to(device)
        setattr(layer, _SHIFT, (lora_A, lora_B, scaling))
    return lora_A, lora_B, scaling

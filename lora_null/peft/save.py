"""Save and resume an adapter that lives in PEFT's layers."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from peft import PeftModel
from torch import nn

from ..adapters.delta import stack_delta
from ..adapters.files import OWN_CONFIG, published_name, short_names, write_adapter
from ..adapters.state import AdapterState, get_state
from ..config import LoraNullConfig
from ..models.weights import is_distributed
from ..models.wrappers import plain_name, unwrapped
from ..system.distributed import in_first_process
from ..system.files import read_json
from .layers import _base_names, _lora_config, _remember, freeze_lora_A, lora_layers
from .record import INITIAL


def load_trainable(base_model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> PeftModel:
    """``PeftModel.from_pretrained(..., is_trainable=True)`` that keeps A frozen where it was trained frozen."""
    peft_model = PeftModel.from_pretrained(base_model, str(path), adapter_name=adapter_name, is_trainable=True)
    if (Path(path) / OWN_CONFIG).exists():
        own = read_json(Path(path) / OWN_CONFIG)
        config = LoraNullConfig.from_dict(own["config"])
        if config.freeze_a:
            freeze_lora_A(peft_model, adapter_name)
        # On disk the adapter is relative to the untouched base, whatever it was trained on.
        config = replace(config, r=_lora_config(peft_model, adapter_name).r)
        state = AdapterState(config, own.get("base_fingerprint"), own.get("energies", {}))
        _remember(peft_model, adapter_name, state)
    return peft_model


def save_adapter(
    peft_model: PeftModel,
    path: str | os.PathLike,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write the adapter as plain LoRA on the untouched base; see :func:`lora_null.save_adapter`.

    With a frozen A this is what ``save_pretrained`` writes, with uniform rank and the scaling folded in. With a
    trained A it is the rank-``2 r`` form, which does not cancel in low precision as PEFT's conversion does.
    """
    peft_model = unwrapped(peft_model)
    layers = lora_layers(peft_model, adapter_name)
    factors = {
        plain_name(name): stack_delta(
            layer.lora_A[adapter_name].weight,
            layer.lora_B[adapter_name].weight,
            layer.scaling[adapter_name],
            getattr(layer, INITIAL, {}).get(adapter_name),
        )
        for name, layer in layers.items()
    }
    peft_config = _lora_config(peft_model, adapter_name)
    if peft_config.modules_to_save or peft_config.bias != "none":
        raise ValueError(
            f"The adapter also trained modules_to_save={peft_config.modules_to_save!r}, bias={peft_config.bias!r}, "
            "which a plain LoRA adapter cannot hold. With A frozen, use the model's own save_pretrained; otherwise "
            "train without them."
        )
    state = get_state(peft_model) or AdapterState(
        LoraNullConfig(r=peft_config.r, lora_alpha=peft_config.lora_alpha, freeze_a=False)
    )
    base = peft_config.base_model_name_or_path
    write = partial(
        write_adapter,
        Path(path),
        factors,
        target_modules=short_names(_base_names(peft_model), factors),
        base_model_name_or_path=published_name(base),
        task_type=peft_config.task_type,
        own=state.to_dict(stacked=any(INITIAL in layer.__dict__ for layer in layers.values())),
        dtype=dtype,
        overwrite=overwrite,
    )
    in_first_process(write) if is_distributed(peft_model) else write()

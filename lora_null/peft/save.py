"""Save an adapter that lives in PEFT's layers."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any

import torch
from peft import PeftModel

from ..adapters.delta import stack
from ..adapters.files import Adapter
from ..adapters.names import published_name, short_names
from ..adapters.save import save_from
from ..adapters.state import INITIAL, AdapterState, get_state
from ..config import LoraNullConfig
from ..models.wrappers import plain_name, unwrapped
from .layers import base_names, lora_layers


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
    save_from(peft_model, of_peft(peft_model, adapter_name), path, dtype=dtype, overwrite=overwrite)


def of_peft(peft_model: PeftModel, adapter_name: str = "default") -> Adapter:
    """Return an adapter of ``peft_model``, unwrapped, for the untouched base; sharded factors are gathered.

    Raises:
        ValueError: The adapter also trained what plain LoRA cannot hold.
    """
    layers = lora_layers(peft_model, adapter_name)
    factors = {
        plain_name(name): stack(
            layer.lora_A[adapter_name].weight,
            layer.lora_B[adapter_name].weight,
            layer.scaling[adapter_name],
            getattr(layer, INITIAL, {}).get(adapter_name),
        )
        for name, layer in layers.items()
    }
    peft_config: Any = peft_model.peft_config[adapter_name]
    if peft_config.modules_to_save or peft_config.bias != "none":
        raise ValueError(
            f"The adapter also trained modules_to_save={peft_config.modules_to_save!r}, bias={peft_config.bias!r}, "
            "which a plain LoRA adapter cannot hold. With A frozen, use the model's own save_pretrained; otherwise "
            "train without them."
        )
    state = get_state(peft_model) or AdapterState(
        LoraNullConfig(r=peft_config.r, lora_alpha=peft_config.lora_alpha, freeze_a=False)
    )
    return Adapter(
        factors,
        short_names(base_names(peft_model), factors),
        published_name(peft_config.base_model_name_or_path),
        peft_config.task_type,
        replace(state, stacked=any(INITIAL in layer.__dict__ for layer in layers.values())),
    )

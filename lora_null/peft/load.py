"""Resume an adapter that lives in PEFT's layers."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from ..adapters.state import AdapterState, read_state, require_sealed
from .layers import freeze_lora_A, remember


def load_trainable(base_model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> PeftModel:
    """``PeftModel.from_pretrained(..., is_trainable=True)`` that keeps A frozen where it was trained frozen.

    Raises:
        ValueError: ``lora_null.json`` is damaged, or of a newer format than this version knows.
    """
    state = read_state(Path(path))
    require_sealed(Path(path))
    peft_model = PeftModel.from_pretrained(base_model, str(path), adapter_name=adapter_name, is_trainable=True)
    if state is not None:
        if state.config.freeze_a:
            freeze_lora_A(peft_model, adapter_name)
        # On disk the adapter is relative to the untouched base, whatever it was trained on.
        peft_config: Any = peft_model.peft_config[adapter_name]
        config = replace(state.config, r=peft_config.r)
        remember(peft_model, adapter_name, AdapterState(config, state.base_fingerprint, state.energies))
    return peft_model

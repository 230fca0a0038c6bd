"""PEFT's own ``save_pretrained`` and ``load_adapter`` on an initialised model, as trainers call them."""

from __future__ import annotations

from copy import copy
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor

from ..adapters.delta import pad, stack, unstack
from ..adapters.files import WEIGHTS
from ..adapters.names import tensor_names
from ..adapters.state import INITIAL, AdapterState
from ..system.files import replacing

_RECORD = "_lora_null_record"
# How far A0 and B0 of a checkpoint may be from the layer's own, relative to their norms; more where they were rounded.
_TOLERANCE, _TOLERANCE_HALF = 1e-3, 3e-2


@dataclass(frozen=True)
class Record:
    """What PEFT does not know of an adapter.

    Attributes:
        state: For ``lora_null.json``.
        initial: Module name to ``A0 (r, d)``, ``B0 (m, r)`` and the scaling, where the base is shifted.
    """

    state: AdapterState
    initial: dict[str, tuple[Tensor, Tensor, float]]

    def __deepcopy__(self, memo: dict) -> Record:
        """Share: nothing of it ever changes, and the factors are as large as the adapter."""
        return self


class RecordedLoraConfig(LoraConfig):
    """A ``LoraConfig`` whose folder, as ``PeftModel.save_pretrained`` writes it, fits the untouched base model.

    PEFT writes ``A`` and ``B`` first and lets the configuration write itself beside them. Where the base is shifted,
    both are replaced there by the rank-``2 r`` form ``[A ; A - A0]``, ``s [B - B0 | B0]``, as in
    :func:`lora_null.peft.save_adapter`; on the way back, layers take it apart.
    """

    def save_pretrained(self, save_directory: str, **kwargs: Any) -> None:
        """Write ``adapter_config.json`` and ``lora_null.json``; ValueError for weights that PEFT has converted."""
        record: Record | None = getattr(self, _RECORD, None)
        folder = Path(save_directory)
        config = self
        if record is not None and record.initial:
            if (folder / "adapter_model.bin").exists() and not (folder / WEIGHTS).exists():
                raise ValueError("safe_serialization=False is not supported on a shifted base; leave it out.")
            if (folder / WEIGHTS).exists():
                config = copy(self)
                config.r = config.lora_alpha = _stack(folder / WEIGHTS, record)
                config.rank_pattern, config.alpha_pattern, config.use_rslora = {}, {}, False
        super(RecordedLoraConfig, config).save_pretrained(save_directory, **kwargs)
        if record is not None:
            replace(record.state, stacked=bool(record.initial)).write(folder)


def record_adapter(peft_model: Any, adapter_name: str, state: AdapterState, layers: dict[str, Any]) -> None:
    """Let PEFT's ``save_pretrained`` write ``state``, and adapters for the untouched base where it is shifted.

    Args:
        peft_model: Holds the adapter.
        adapter_name: Its name.
        state: Of the adapter.
        layers: Its LoRA layers, by name in the base model.
    """
    initial = {}
    for name, layer in layers.items():
        if adapter_name in getattr(layer, INITIAL, {}):
            initial[name] = (*getattr(layer, INITIAL)[adapter_name], layer.scaling[adapter_name])
            layer.register_load_state_dict_pre_hook(_take_apart)
    config = peft_model.peft_config[adapter_name]
    if type(config) is LoraConfig:
        config.__class__ = RecordedLoraConfig
    setattr(config, _RECORD, Record(state, initial))


def _stack(path: Path, record: Record) -> int:
    """Replace the factors in an adapter's file by their change of the untouched base; return the rank."""
    tensors = load_file(str(path))
    r = 2 * max(len(initial_A) for initial_A, _, _ in record.initial.values())
    for name, (initial_A, initial_B, scaling) in record.initial.items():
        key_A, key_B = tensor_names(name)
        lora_A, lora_B = tensors[key_A], tensors[key_B]
        if lora_A.shape != initial_A.shape:
            raise ValueError(
                f"{path} holds factors of rank {len(lora_A)} for {name}; expected rank {len(initial_A)}, as trained. "
                "PEFT's conversion (path_initial_model_for_weight_conversion) is not needed here: save_pretrained "
                "writes an adapter for the untouched base by itself."
            )
        stacked_A, stacked_B = pad(*stack(lora_A, lora_B, scaling, (initial_A, initial_B)), r)
        tensors[key_A], tensors[key_B] = stacked_A.to(lora_A.dtype), stacked_B.to(lora_B.dtype)
    # load_file may have mapped the old file, which therefore must stay until its name is taken over.
    with replacing(path) as new:
        save_file(tensors, str(new), metadata={"format": "pt"})
    return r


@torch.no_grad()
def _take_apart(layer: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Take the rank-``2 r`` form apart again when a checkpoint is loaded into the layer that it came from."""
    initial_A, initial_B = next(iter(getattr(layer, INITIAL).values()))
    for name in layer.lora_A:
        key_A, key_B = (f"{prefix}{part}.{name}.weight" for part in ("lora_A", "lora_B"))
        r, scaling = layer.r[name], layer.scaling[name]
        if key_A not in state_dict or key_B not in state_dict or len(state_dict[key_A]) < 2 * r:
            continue  # a plain state dict of the model
        tolerance = _TOLERANCE if state_dict[key_A].dtype.itemsize >= 4 else _TOLERANCE_HALF
        lora_A, change_B, *found = unstack(state_dict[key_A].float(), state_dict[key_B].float(), scaling, r)
        initial_A, initial_B = (factor.to(lora_A.device, torch.float32) for factor in (initial_A, initial_B))
        for got, own in zip(found, (initial_A, initial_B), strict=True):
            if got.shape != own.shape or (got - own).norm() > tolerance * own.norm():
                raise ValueError(
                    f"The checkpoint's adapter {prefix}{name} started from other factors than this model's, so that it "
                    "belongs to another shifted base. To resume, initialise with the covariances and the LoraConfig of "
                    "that run (Covariances.save keeps them); to go on from the checkpoint alone, use "
                    "lora_null.load_adapter(base_model, checkpoint, is_trainable=True)."
                )
        # The layer's own B0, which its base was shifted by: that of the file may be rounded.
        state_dict[key_A], state_dict[key_B] = lora_A, change_B + initial_B

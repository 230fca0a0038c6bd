"""A PEFT adapter folder: written whole or not at all, read without trust."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..models.refusals import require_finite
from ..system.files import read_json, replaced_folder, write_json
from .delta import padded

WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
OWN_CONFIG = "lora_null.json"
# Written by PEFT beside an adapter, and by people: kept when the adapter is replaced.
README = "README.md"
# What an adapter folder may hold and be replaced; anything else in it is the user's.
_KNOWN = {WEIGHTS, PEFT_CONFIG, OWN_CONFIG, README}
# Settings of PEFT under which an adapter is more than B A on some linear layers.
_SPECIAL = (
    "use_dora",
    "lora_bias",
    "rank_pattern",
    "alpha_pattern",
    "modules_to_save",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "kasa_config",
)
# Ways to start in which PEFT itself changes the base weights.
_SHIFTING = ("pissa", "olora", "corda", "loftq", "lora_ga")
_PREFIX = "base_model.model."
_SUFFIX = {"A": ".lora_A.weight", "B": ".lora_B.weight"}


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a path that must not be replaced; a missing or empty folder is free."""
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(
            f"{path} exists already. Choose another folder, or pass overwrite=True (--overwrite) to replace it."
        )
    foreign = [entry.name for entry in path.iterdir() if entry.name not in _KNOWN] if path.is_dir() else [path.name]
    if foreign:
        raise FileExistsError(
            f"{path} is not an adapter folder: it holds {sorted(foreign)[:3]}, which overwriting would delete. Choose "
            "another folder."
        )


def tensor_names(module_name: str) -> tuple[str, str]:
    """Return PEFT's names on disk of ``lora_A`` and ``lora_B``."""
    return _PREFIX + module_name + _SUFFIX["A"], _PREFIX + module_name + _SUFFIX["B"]


def read_factors(path: Path) -> dict[str, tuple[Tensor, Tensor]]:
    """Read ``{module name: (lora_A, lora_B)}`` from an adapter's safetensors file; nothing is ever unpickled."""
    try:
        with safe_open(str(path), framework="pt") as file:
            tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path} does not exist; expected the adapter's weights beside its config.") from None
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}). It is damaged, or of another kind; pickled "
            "checkpoints (.bin, .pt) are never loaded. Save or download the adapter again."
        ) from None
    names = [key[len(_PREFIX) : -len(_SUFFIX["A"])] for key in tensors if key.endswith(_SUFFIX["A"])]
    expected = {name: tensor_names(name) for name in names}
    known = {key for pair in expected.values() for key in pair}
    strange = sorted(set(tensors) ^ known)
    if strange or not names:
        raise ValueError(
            f"{path} holds {len(tensors)} tensors, among them or missing {strange[:3]}; expected pairs named "
            f"{_PREFIX}<module>{_SUFFIX['A']} and {_SUFFIX['B']}. It is not a plain LoRA adapter."
        )
    factors = {name: (tensors[key_A], tensors[key_B]) for name, (key_A, key_B) in expected.items()}
    for name, (lora_A, lora_B) in factors.items():
        if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
            raise ValueError(
                f"{path}: the factors of {name} are {tuple(lora_A.shape)} and {tuple(lora_B.shape)}; expected (r, d) "
                "and (m, r) of one rank r."
            )
        require_finite(f"{path}: the adapter of {name}", lora_A, lora_B, ". The training run that wrote it diverged.")
    return factors


def plain_scaling(folder: Path, config: Mapping) -> float:
    """Return the factor of ``B A`` that an adapter's configuration states; ValueError for anything but plain LoRA."""
    r, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        raise ValueError(
            f"{folder / PEFT_CONFIG} describes a {config.get('peft_type')!r} adapter with r={r!r}, "
            f"lora_alpha={alpha!r}; expected a LoRA adapter. Load it with PEFT."
        )
    special = [key for key in _SPECIAL if config.get(key)]
    if special or config.get("bias", "none") != "none" or config.get("fan_in_fan_out"):
        raise ValueError(
            f"{folder / PEFT_CONFIG} sets {special or ['bias or fan_in_fan_out']}; expected plain LoRA with one "
            "rank and without biases. Load it with PEFT."
        )
    start = str(config.get("init_lora_weights")).lower()
    if start.startswith(_SHIFTING):
        raise ValueError(
            f"{folder / PEFT_CONFIG} has init_lora_weights={start!r}: the adapter belongs to a base that PEFT shifted "
            "when training began; expected one for the pre-trained base. Convert it with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )
    return alpha / r**0.5 if config.get("use_rslora") else alpha / r


@dataclass(frozen=True)
class AdapterFiles:
    """What an adapter folder holds.

    Attributes:
        config: PEFT's configuration.
        own: The contents of ``lora_null.json``; empty for an adapter of others.
        scaling: The factor of ``B A``.
        factors: Module name to ``lora_A (r, d)`` and ``lora_B (m, r)``.
    """

    config: dict[str, Any]
    own: dict[str, Any]
    scaling: float
    factors: dict[str, tuple[Tensor, Tensor]]


def read_adapter(folder: Path) -> AdapterFiles:
    """Read a plain LoRA adapter, ours or another's.

    Raises:
        FileNotFoundError: ``folder`` is not an adapter folder.
        ValueError: A file is damaged or foreign, the adapter is not plain LoRA, or the files contradict each other.
    """
    if not (folder / PEFT_CONFIG).exists():
        raise FileNotFoundError(
            f"{folder / PEFT_CONFIG} does not exist: {folder} is not an adapter folder. Expected {PEFT_CONFIG} and "
            f"{WEIGHTS}, as lora_null.save_adapter and PEFT's save_pretrained write them."
        )
    config = read_json(folder / PEFT_CONFIG)
    own = read_json(folder / OWN_CONFIG) if (folder / OWN_CONFIG).exists() else {}
    scaling = plain_scaling(folder, config)
    factors = read_factors(folder / WEIGHTS)
    for name, (lora_A, _) in factors.items():
        if len(lora_A) != config["r"]:
            raise ValueError(
                f"{folder / PEFT_CONFIG} says r={config['r']}, but the factors of {name} have rank {len(lora_A)}. The "
                "files do not belong together; save or download the adapter again."
            )
    return AdapterFiles(config, own, scaling, factors)


_DIVERGED = "The training run diverged; lower the learning rate and start again from an earlier checkpoint."


def write_adapter(
    path: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],  # A (r, d), B (m, r), scaling folded in
    *,
    target_modules: Iterable[str],
    base_model_name_or_path: str | None,
    task_type: str | None,
    own: dict,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write factors and both configurations to the folder ``path``, atomically."""
    from peft import LoraConfig

    ranks = {lora_A.shape[0] for lora_A, _ in factors.values()}
    r = max(ranks)
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        require_finite(f"The adapter of {name}", lora_A, lora_B, f", so it was not saved. {_DIVERGED}")
        for key, tensor in zip(tensor_names(name), padded(lora_A, lora_B, r), strict=True):
            tensors[key] = tensor.to("cpu", dtype or torch.float32).contiguous()
        stored_A, stored_B = (tensors[key] for key in tensor_names(name))
        advice = f" in {dtype}, so it was not saved. Its values are too large for that type; save in another."
        require_finite(f"The adapter of {name}", stored_A, stored_B, advice)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(target_modules),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=True,
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        inference_mode=True,
    ).to_dict()
    # PEFT keeps target_modules as a set.
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    with replaced_folder(path, partial(check_target, path, overwrite)) as work:
        if (path / README).exists():
            shutil.copy2(path / README, work / README)
        save_file(tensors, str(work / WEIGHTS), metadata={"format": "pt"})
        write_json(work / OWN_CONFIG, own)
        write_json(work / PEFT_CONFIG, config)


def short_names(names: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """Return last name components where they select exactly ``chosen`` among ``names``, else whole names."""
    chosen = set(chosen)
    endings = {name.rsplit(".", 1)[-1] for name in chosen}
    selected = {name for name in names if name.rsplit(".", 1)[-1] in endings}
    return sorted(endings if selected == chosen else chosen)


def published_name(name: str | None) -> str | None:
    """Return a model's name without the leading folders of an absolute path, which tell others about this machine."""
    return Path(name).name if name and os.path.isabs(name) else name

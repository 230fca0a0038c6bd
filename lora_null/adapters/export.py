"""From a training checkpoint to what others read: a plain LoRA adapter, or a merged model. No SVD is taken."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..config import LoraNullConfig
from ..system.files import read_json
from ..system.log import logger
from .delta import stack_delta
from .files import PEFT_CONFIG, published_name, read_adapter, short_names, write_adapter

_INDEX = "model.safetensors.index.json"
_WHOLE = "model.safetensors"
_PARTS = ("lora_A", "lora_B", "initial_A", "initial_B")
# Where initialize() and load_adapter() leave the contents of lora_null.json in a model's own configuration.
_CONFIG_KEY = "lora_null"


def export_adapter(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    lora_alpha: float | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a checkpoint's adapter as plain LoRA on the untouched base, with ``lora_alpha == r`` and one rank.

    Args:
        checkpoint: An adapter folder in PEFT's format, or the folder that a trainer saved of a model patched by
            :func:`lora_null.initialize` (``model.safetensors``, in one file or in shards).
        output: The adapter folder to write; it appears whole or not at all.
        dtype: Of the tensors on disk; the default is fp32. Where A was trained, the factors are stacked so that
            rounding them costs no more than their own precision.
        lora_alpha: Of the run, for a trainer's checkpoint; the default is what its ``config.json`` states under
            ``lora_null``, and ``r`` with a warning where it states nothing.
        base_model_name_or_path: Written for the reader's information; the default is what the checkpoint says,
            without the leading folders of an absolute path.
        overwrite: Replace an existing adapter folder.

    Returns:
        The rank on disk.

    Raises:
        FileNotFoundError: ``checkpoint`` is neither kind of folder.
        ValueError: A file is damaged or holds no adapter.
        FileExistsError: ``output`` exists and must not be replaced.
    """
    folder = Path(checkpoint)
    if (folder / PEFT_CONFIG).exists():
        source = _from_adapter(folder, lora_alpha)
    elif (folder / _WHOLE).exists() or (folder / _INDEX).exists():
        source = _from_checkpoint(folder, lora_alpha)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither {PEFT_CONFIG} nor {_WHOLE}; expected an adapter folder, or the folder that a "
            "trainer saved of a model patched by lora_null.initialize."
        )
    write_adapter(
        Path(output),
        source.factors,
        target_modules=source.target_modules,
        base_model_name_or_path=base_model_name_or_path or published_name(source.base_model),
        task_type=source.task_type,
        own=source.own,
        dtype=dtype,
        overwrite=overwrite,
    )
    return max(lora_A.shape[0] for lora_A, _ in source.factors.values())


@dataclass(frozen=True)
class _Source:
    factors: dict[str, tuple[Tensor, Tensor]]  # A (r, d), B (m, r), scaling folded in
    target_modules: Sequence[str]
    base_model: str | None
    task_type: str | None
    own: dict


def _from_adapter(folder: Path, lora_alpha: float | None) -> _Source:
    files = read_adapter(folder)
    if lora_alpha is not None:
        raise ValueError(
            f"{folder} states lora_alpha={files.config.get('lora_alpha')} itself; leave lora_alpha out, it is only for "
            "a trainer's checkpoint of a patched model."
        )
    factors = {
        name: stack_delta(lora_A, lora_B, files.scaling, None) for name, (lora_A, lora_B) in files.factors.items()
    }
    # A regular expression is kept out: not every reader knows that PEFT allows one.
    targets = files.config.get("target_modules")
    targets = targets if isinstance(targets, list) else sorted(factors)
    base, task_type = (files.config.get(key) for key in ("base_model_name_or_path", "task_type"))
    return _Source(factors, targets, base, task_type, files.own)


def _from_checkpoint(folder: Path, lora_alpha: float | None) -> _Source:
    weights: set[str] = set()
    tensors: dict[str, dict[str, Tensor]] = {}
    for file in _shards(folder):
        try:
            with safe_open(str(file), framework="pt") as content:
                for key in content.keys():
                    module, _, part = key.removesuffix(".weight").rpartition(".")
                    if not key.endswith(".weight"):
                        continue
                    weights.add(key.removesuffix(".weight"))
                    if part in _PARTS:
                        tensors.setdefault(module, {})[part] = content.get_tensor(key)
        except (SafetensorError, OSError) as error:
            raise ValueError(
                f"{file} is not a readable safetensors file ({error}); save the checkpoint again."
            ) from None
    if not tensors:
        raise ValueError(
            f"{folder} holds no lora_A and lora_B: it is a plain or merged model. Expected a checkpoint of a model "
            "patched by lora_null.initialize, saved before lora_null.merge."
        )
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    stated = _stated_config(folder, config)
    if stated is None and lora_alpha is None:
        logger.warning(
            f"{folder / 'config.json'} does not state the scaling of the run (no {_CONFIG_KEY!r}); lora_alpha = r is "
            "assumed. If the run had another lora_alpha, the exported adapter is wrong: pass it (--lora-alpha)."
        )
    if stated is not None and lora_alpha is not None:
        stated = replace(stated, lora_alpha=lora_alpha)
    factors = {}
    for module, parts in tensors.items():
        if not {"lora_A", "lora_B"} <= set(parts) or ("initial_A" in parts) != ("initial_B" in parts):
            raise ValueError(f"{folder}: the adapter of {module} is incomplete, it has only {sorted(parts)}.")
        lora_A, lora_B = parts["lora_A"], parts["lora_B"]
        if stated is not None and lora_alpha is None:
            scaling = stated.scaling
        else:
            scaling = 1.0 if lora_alpha is None else lora_alpha / lora_A.shape[0]
        initial = (parts["initial_A"], parts["initial_B"]) if "initial_A" in parts else None
        factors[module] = stack_delta(lora_A, lora_B, scaling, initial)
    own = {}
    if stated is not None:
        stacked = any("initial_A" in parts for parts in tensors.values())
        own = {**config[_CONFIG_KEY], "config": stated.to_dict(), "stacked": stacked}
    classes = config.get("architectures") or [""]
    task_type = "CAUSAL_LM" if classes[0].endswith(("ForCausalLM", "LMHeadModel")) else None
    return _Source(factors, short_names(weights, factors), config.get("_name_or_path"), task_type, own)


def _stated_config(folder: Path, config: dict) -> LoraNullConfig | None:
    if config.get(_CONFIG_KEY) is None:
        return None
    try:
        return LoraNullConfig.from_dict(config[_CONFIG_KEY]["config"])
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise ValueError(
            f"{folder / 'config.json'}: the entry {_CONFIG_KEY!r} is damaged ({error}); save the checkpoint again."
        ) from None


def _shards(folder: Path) -> list[Path]:
    if not (folder / _INDEX).exists():
        return [folder / _WHOLE]
    try:
        names = set(json.loads((folder / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / _INDEX} is damaged ({error}); save the checkpoint again.") from None
    return [folder / name for name in sorted(names)]

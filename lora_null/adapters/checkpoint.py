"""The adapter in a folder that a trainer saved of a patched model."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..system.files import read_json
from ..system.log import logger
from .delta import stack
from .files import Adapter
from .names import short_names
from .state import CONFIG_KEY, AdapterState

# The weights of a model as transformers saves them: in one file, or in shards with an index.
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PARTS = ("lora_A", "lora_B", "initial_A", "initial_B")


def is_checkpoint(folder: Path) -> bool:
    """Tell whether the folder holds a model's weights."""
    return (folder / WHOLE).exists() or (folder / INDEX).exists()


def of_checkpoint(folder: Path, lora_alpha: float | None = None) -> Adapter:
    """Read the adapter from a checkpoint of a model that :func:`lora_null.initialize` has patched.

    Args:
        folder: Holds ``model.safetensors``, in one file or in shards.
        lora_alpha: Of the run; the default is what ``config.json`` states under ``lora_null``, and ``r`` with a
            warning where it states nothing.

    Raises:
        ValueError: A file is damaged, of a newer format, or holds no adapter.
    """
    weights, tensors = _read_parts(folder)
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    state = _stated(folder, config, lora_alpha)
    factors = {}
    for module, parts in tensors.items():
        if not {"lora_A", "lora_B"} <= set(parts) or ("initial_A" in parts) != ("initial_B" in parts):
            raise ValueError(f"{folder}: the adapter of {module} is incomplete, it has only {sorted(parts)}.")
        lora_A, lora_B = parts["lora_A"], parts["lora_B"]
        if lora_alpha is not None:
            scaling = lora_alpha / lora_A.shape[0]
        else:
            scaling = 1.0 if state is None else state.config.scaling_of(module)
        initial = (parts["initial_A"], parts["initial_B"]) if "initial_A" in parts else None
        factors[module] = stack(lora_A, lora_B, scaling, initial)
    if state is not None:
        state = replace(state, stacked=state.stacked or any("initial_A" in parts for parts in tensors.values()))
    classes = config.get("architectures") or [""]
    task_type = "CAUSAL_LM" if classes[0].endswith(("ForCausalLM", "LMHeadModel")) else None
    return Adapter(factors, short_names(weights, factors), config.get("_name_or_path"), task_type, state)


def _read_parts(folder: Path) -> tuple[set[str], dict[str, dict[str, Tensor]]]:
    """Return the names of all modules with a weight, and by adapted module the tensors of its adapter."""
    weights: set[str] = set()
    tensors: dict[str, dict[str, Tensor]] = {}
    for file in _shards(folder):
        try:
            with safe_open(str(file), framework="pt") as content:
                for key in content.keys():
                    if not key.endswith(".weight"):
                        continue
                    weights.add(key.removesuffix(".weight"))
                    module, _, part = key.removesuffix(".weight").rpartition(".")
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
    return weights, tensors


def _stated(folder: Path, config: dict, lora_alpha: float | None) -> AdapterState | None:
    """Return what the model's own configuration says of the run, with ``lora_alpha`` where it is given."""
    if config.get(CONFIG_KEY) is not None:
        state = AdapterState.from_dict(config[CONFIG_KEY], f"{folder / 'config.json'}: the entry {CONFIG_KEY!r}")
        return state if lora_alpha is None else replace(state, config=replace(state.config, lora_alpha=lora_alpha))
    if lora_alpha is None:
        logger.warning(
            f"{folder / 'config.json'} does not state the scaling of the run (no {CONFIG_KEY!r}); lora_alpha = r is "
            "assumed. If the run had another lora_alpha, the exported adapter is wrong: pass it (--lora-alpha)."
        )
    return None


def _shards(folder: Path) -> list[Path]:
    if not (folder / INDEX).exists():
        return [folder / WHOLE]
    try:
        names = set(json.loads((folder / INDEX).read_text(encoding="utf-8"))["weight_map"].values())
    except (KeyError, ValueError, AttributeError) as error:
        raise ValueError(f"{folder / INDEX} is damaged ({error}); save the checkpoint again.") from None
    return [folder / name for name in sorted(names)]

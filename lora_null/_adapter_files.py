"""A PEFT adapter folder: written whole or not at all, read without trust."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

WEIGHTS = "adapter_model.safetensors"
PEFT_CONFIG = "adapter_config.json"
OWN_CONFIG = "lora_null.json"
# What an adapter folder may hold and be replaced; anything else in it is the user's.
_KNOWN = {WEIGHTS, PEFT_CONFIG, OWN_CONFIG, "README.md"}
_PREFIX = "base_model.model."
_SUFFIX = {"A": ".lora_A.weight", "B": ".lora_B.weight"}


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a path that must not be replaced."""
    if not path.exists():
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


@contextmanager
def replaced_folder(path: Path, overwrite: bool) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its place when the block succeeds.

    A block that fails leaves ``path`` as it was.
    """
    check_target(path, overwrite)
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    try:
        yield work
        # mkdtemp makes the folder private; an adapter is as readable as any other output.
        umask = os.umask(0)
        os.umask(umask)
        work.chmod(0o777 & ~umask)
        old = None
        if path.exists():
            old = Path(tempfile.mkdtemp(prefix=f".{path.name}.old.", dir=path.parent)) / path.name
            os.rename(path, old)
        try:
            os.rename(work, path)
        except BaseException:
            if old is not None:
                os.rename(old, path)
            raise
        finally:
            if old is not None:
                shutil.rmtree(old.parent, ignore_errors=True)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def tensor_names(module_name: str) -> tuple[str, str]:
    """Return PEFT's names on disk of ``lora_A`` and ``lora_B``."""
    return _PREFIX + module_name + _SUFFIX["A"], _PREFIX + module_name + _SUFFIX["B"]


def write_json(path: Path, values: dict) -> None:
    """Write ``values`` with sorted keys, so that equal adapters are equal files."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say which file is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FileNotFoundError(
            f"{path} does not exist: {path.parent} is not an adapter folder. Expected {PEFT_CONFIG} and {WEIGHTS}, as "
            "lora_null.save_adapter and PEFT's save_pretrained write them."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); expected a JSON object. Save the adapter again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a JSON object.")
    return values


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
        if not (torch.isfinite(lora_A).all() and torch.isfinite(lora_B).all()):
            raise ValueError(f"{path}: the factors of {name} hold NaN or Inf. The training run that wrote it diverged.")
    return factors

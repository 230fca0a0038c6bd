"""A PEFT adapter folder: written whole or not at all, read without trust."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

from ._logging import logger
from ._weights import require_finite

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


@contextmanager
def replaced_folder(path: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its place when the block succeeds.

    A block that fails leaves ``path`` as it was. A link is followed: what it points to is replaced.

    Args:
        path: The folder to make or to replace.
        check: Called before and after the block; raises if ``path`` must not be replaced.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    work = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
    new, old = work / "new", work / "old"
    replaced = False
    try:
        # mkdtemp makes its folder private; the result is as readable as any other output.
        new.mkdir()
        check()
        yield new
        # Again: the block may have taken minutes.
        check()
        try:
            if path.exists():
                os.rename(path, old)
            os.rename(new, path)
            replaced = True
        except BaseException:
            if old.exists() and not path.exists():
                os.rename(old, path)
            raise
    finally:
        if replaced or not old.exists():
            shutil.rmtree(work, ignore_errors=True)
        else:
            # It could not be put back, and is all that there is of the user's files.
            logger.error("%s could not be replaced; what it held before lies in %s.", path, old)


def padded(lora_A: Tensor, lora_B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the factors ``(r, d)`` and ``(m, r)`` with rows and columns of zeros, which change nothing.

    Readers such as vLLM know one rank for the whole adapter.
    """
    padding = r - lora_A.shape[0]
    return nn.functional.pad(lora_A, (0, 0, 0, padding)), nn.functional.pad(lora_B, (0, padding))


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
    except (FileNotFoundError, NotADirectoryError):
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

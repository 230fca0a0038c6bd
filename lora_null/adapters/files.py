"""A plain LoRA adapter as a value, and its folder in PEFT's format: written whole or not at all, read without trust."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from ..config import LoraNullConfig
from ..models.refusals import DIVERGED, require_finite, require_floating
from ..solver.pooling import ordinary
from ..system.files import read_json, replaced_folder, write_json
from ..system.tensors import opened, read_floating
from .delta import pad
from .extras import Extras, key_of, name_of
from .names import PEFT_CONFIG, PREFIX, SUFFIX_A, WEIGHTS, tensor_names
from .plain import require_plain
from .state import OWN_CONFIG, AdapterState, fits, read_state, require_sealed

# Written by PEFT beside an adapter, and by people: kept when the adapter is replaced.
README = "README.md"
# What an adapter folder may hold and be replaced; anything else in it is the user's.
_KNOWN = {WEIGHTS, PEFT_CONFIG, OWN_CONFIG, README}
# Entries of PEFT's configuration that this package reads, and their types; LoraNullConfig knows those of the numbers.
_KINDS: dict[str, Any] = {
    "use_rslora": bool | None,
    "bias": str | None,
    "target_modules": str | list | None,
    "base_model_name_or_path": str | None,
    "task_type": str | None,
}
# PEFT's name for the number of inputs that an adapter of QA-LoRA pools.
_GROUP = "qalora_group_size"
_NARROWING = ("exclude_modules", "layers_to_transform")


@dataclass(frozen=True)
class Adapter:
    """A plain LoRA adapter for an untouched base: what every way to save makes, and what a folder holds.

    Attributes:
        factors: Module name to ``lora_A (r, d)`` and ``lora_B (m, r)``.
        target_modules: Module names or their endings; PEFT also knows regular expressions.
        base_model: Name of the model, for the reader's information.
        task_type: PEFT's name for the kind of model.
        state: How the adapter began; ``None`` if another program made it.
        recipe: Ranks, scaling and dropout as PEFT knows them; ``None`` where the scaling is part of ``lora_B``.
        extras: What was trained besides the factors.
    """

    factors: Mapping[str, tuple[Tensor, Tensor]]
    target_modules: Sequence[str] | str | None
    base_model: str | None
    task_type: str | None
    state: AdapterState | None
    recipe: LoraNullConfig | None = None
    extras: Extras = field(default_factory=Extras)

    @property
    def r(self) -> int:
        """The largest rank, which is that of all linear layers in a folder that we write."""
        ranks = [len(lora_A) for lora_A, _ in self.factors.values()]
        # Without any, experts alone have adapters.
        return max(ranks) if ranks or self.state is None else self.state.config.r

    def scaling_of(self, name: str) -> float:
        """Return the factor of ``B A`` of a module."""
        return 1.0 if self.recipe is None else self.recipe.scaling_of(name)

    @classmethod
    def read(cls, folder: Path) -> Adapter:
        """Read a plain LoRA adapter, ours or another's; PEFT's QA-LoRA as the plain one that it is.

        Raises:
            FileNotFoundError: ``folder`` is not an adapter folder.
            ValueError: A file is damaged, foreign or of a newer format, the adapter is not plain LoRA, or the files
                contradict each other.
        """
        if not (folder / PEFT_CONFIG).exists():
            raise FileNotFoundError(
                f"{folder / PEFT_CONFIG} does not exist: {folder} is not an adapter folder. Expected {PEFT_CONFIG} and "
                f"{WEIGHTS}, as lora_null.save_adapter and PEFT's save_pretrained write them."
            )
        config = read_json(folder / PEFT_CONFIG)
        state = read_state(folder)
        _require_types(folder / PEFT_CONFIG, config)
        require_plain(folder / PEFT_CONFIG, config)
        recipe = _recipe(folder / PEFT_CONFIG, config)
        factors, others = _read_tensors(folder / WEIGHTS)
        if config.get("use_qalora"):
            factors = {name: (ordinary(A.float(), config[_GROUP], "peft"), B) for name, (A, B) in factors.items()}
        for name, (lora_A, _) in factors.items():
            if len(lora_A) != recipe.rank_of(name):
                raise ValueError(
                    f"{folder / PEFT_CONFIG} says r={recipe.rank_of(name)}, but the factors of {name} have rank "
                    f"{len(lora_A)}. The files do not belong together; save or download the adapter again."
                )
        adapter = cls(
            factors,
            # Names that other settings narrow down are written out: those settings are not kept.
            None if any(config.get(key) for key in _NARROWING) else config.get("target_modules"),
            config.get("base_model_name_or_path"),
            config.get("task_type"),
            state,
            recipe,
            Extras(others, recipe.modules_to_save or (), config.get("bias", "none")),
        )
        for name, (lora_A, lora_B) in factors.items():
            scaling = adapter.scaling_of(name)
            advice = f", scaled by {scaling:g}, in fp32; expected finite numbers. {DIVERGED}"
            scaled_B = scaling * lora_B.float()
            require_finite(f"{folder / WEIGHTS}: the adapter of {name}", lora_A.float(), scaled_B, advice)
        require_sealed(folder)
        return adapter

    def write(self, folder: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> int:
        """Write the folder whole or not at all, with one rank and ``lora_alpha == r``; return the rank.

        Args:
            folder: The adapter folder to make or to replace.
            dtype: Of the tensors on disk; the default is fp32.
            overwrite: Replace an existing adapter folder; its ``README.md`` is kept.

        Raises:
            ValueError: A factor holds NaN or Inf, in memory or in ``dtype``.
            FileExistsError: ``folder`` exists and must not be replaced.
        """
        from peft import LoraConfig

        asked, dtype = dtype, dtype or torch.float32
        require_floating(dtype, "dtype")
        tensors: dict[str, Tensor] = {}
        for name, (lora_A, lora_B) in self.factors.items():
            require_finite(f"The adapter of {name}", lora_A, lora_B, f", so it was not saved. {DIVERGED}")
            scaling = self.scaling_of(name)
            scaled_B = lora_B if scaling == 1 else scaling * lora_B.to(torch.promote_types(lora_B.dtype, torch.float32))
            stored_A, stored_B = (factor.to("cpu", dtype).contiguous() for factor in pad(lora_A, scaled_B, self.r))
            advice = f" in {dtype}, so it was not saved. Its values are too large for that type; save in another."
            require_finite(f"The adapter of {name}", stored_A, stored_B, advice)
            tensors.update(zip(tensor_names(name), (stored_A, stored_B), strict=True))
        named = {key_of(name, self.factors): values for name, values in self.extras.tensors.items()}
        for name, values in {**named, **self.extras.others}.items():
            stored = values.to("cpu", dtype if asked and values.is_floating_point() else values.dtype).contiguous()
            advice = f" in {stored.dtype}, so it was not saved. {DIVERGED}"
            require_finite(name, stored, stored, advice)
            # Tied weights share their memory, which a file cannot.
            tensors[name] = stored.clone()
        # A regular expression is kept out: not every reader knows that PEFT allows one.
        targets = self.factors if isinstance(self.target_modules, str | None) else self.target_modules
        config = LoraConfig(
            r=self.r,
            lora_alpha=self.r,
            target_modules=sorted(targets),
            lora_dropout=0.0,
            init_lora_weights=True,
            task_type=self.task_type,
            base_model_name_or_path=self.base_model,
            inference_mode=True,
            **{
                "bias": self.extras.bias,
                "modules_to_save": list(self.extras.modules_to_save) or None,
                **self.extras.settings,
            },
        ).to_dict()
        # PEFT keeps target_modules as a set.
        config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
        with replaced_folder(folder, partial(check_target, folder, overwrite)) as work:
            if (folder / README).exists():
                shutil.copy2(folder / README, work / README)
            save_file(tensors, str(work / WEIGHTS), metadata={"format": "pt"})
            write_json(work / PEFT_CONFIG, config)
            if self.state is not None:
                self.state.write(work, sealed=True)
        return self.r


def _recipe(path: Path, config: Mapping[str, Any]) -> LoraNullConfig:
    """Return ranks, scaling and dropout of PEFT's configuration; the mode is that of another program: both train."""
    names = ("r", "lora_alpha", "rank_pattern", "alpha_pattern", "modules_to_save")
    values: dict[str, Any] = {name: config.get(name) for name in names}
    try:
        return LoraNullConfig(
            **values,
            use_rslora=bool(config.get("use_rslora")),
            lora_dropout=config.get("lora_dropout", 0.0),
            freeze_a=False,
        )
    except ValueError as error:
        raise ValueError(f"{path}: {error} The file is damaged; save or download the adapter again.") from None


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


def _read_tensors(path: Path) -> tuple[dict[str, tuple[Tensor, Tensor]], dict[str, Tensor]]:
    """Read ``{module name: (lora_A, lora_B)}`` and what else was trained, by name in the model."""
    with opened(path, "the adapter's weights beside its config") as file:
        keys = {key for key in file.keys() if key.startswith(PREFIX)}
        strange = set(file.keys()) - keys
        # A module that was saved whole may have counters, too.
        tensors = {key: read_floating(file, path, key) if "lora_" in key else file.get_tensor(key) for key in keys}
    names = sorted(key[len(PREFIX) : -len(SUFFIX_A)] for key in keys if key.endswith(SUFFIX_A))
    expected = {name: tensor_names(name) for name in names}
    others = {key for key in keys if "lora_" not in key}
    strange |= (keys - others) ^ {key for pair in expected.values() for key in pair}
    if strange or not names:
        raise ValueError(
            f"{path} holds {len(keys)} tensors, among them or missing {sorted(strange)[:3]}; expected pairs named "
            f"{' and '.join(tensor_names('<module>'))}. It is not a plain LoRA adapter."
        )
    factors = {name: (tensors[key_A], tensors[key_B]) for name, (key_A, key_B) in expected.items()}
    for name, (lora_A, lora_B) in factors.items():
        if lora_A.ndim != 2 or lora_B.ndim != 2 or lora_A.shape[0] != lora_B.shape[1]:
            raise ValueError(
                f"{path}: the factors of {name} are {tuple(lora_A.shape)} and {tuple(lora_B.shape)}; expected (r, d) "
                "and (m, r) of one rank r."
            )
    return factors, {name_of(key): tensors[key] for key in sorted(others)}


def _require_types(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration, read from ``path``, whose entries have other types than PEFT writes."""
    wrong = [key for key, kind in _KINDS.items() if key in config and not fits(config[key], kind)]
    if config.get("use_qalora") and not (fits(config.get(_GROUP), int) and config[_GROUP] > 0):
        wrong.append(_GROUP)
    targets = config.get("target_modules")
    if isinstance(targets, list) and not all(isinstance(name, str) for name in targets):
        wrong.append("target_modules")
    if wrong:
        raise ValueError(
            f"{path} has {', '.join(f'{key}={config.get(key)!r:.60}' for key in wrong)}; expected what PEFT writes "
            "there. It is damaged; save or download the adapter again."
        )

"""A model's weights where they lie on disk, read one tensor at a time."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..system.files import read_json
from ..system.tensors import FLOATING, opened, read_floating
from .identity import digest_of, fingerprint_of, sample_of
from .settings import Loading

# The weights of a model as transformers saves them: in one file, or in shards with an index.
WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_EXPECTED = "weights of the model"


def is_checkpoint(folder: Path) -> bool:
    """Tell whether the folder holds a model's weights."""
    return (folder / WHOLE).exists() or (folder / INDEX).exists()


def shards_of(folder: Path) -> list[Path]:
    """Return the files of weights in a folder; ValueError if its index is damaged."""
    if not (folder / INDEX).exists():
        return [folder / WHOLE]
    shards = read_json(folder / INDEX).get("weight_map")
    names: list[Any] = list(shards.values()) if isinstance(shards, dict) else [None]
    # a name with a folder in it could lead out of this one
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name or name in ("", "..")]
    if strange:
        raise ValueError(
            f"{folder / INDEX} names {strange[0]!r:.80} as a file of weights; expected names of files beside it. It is "
            "damaged; save the checkpoint again."
        )
    return [folder / name for name in sorted(set(names))]


def weight_files(model: str, loading: Loading) -> list[Path]:
    """Return the files of weights of a model folder or a Hugging Face model id, downloaded if need be.

    Raises:
        ValueError: There are none as safetensors.
    """
    folder = Path(model).expanduser()
    if not folder.is_dir():
        from transformers.utils import cached_file

        options: dict[str, Any] = {"revision": loading.revision, "_raise_exceptions_for_missing_entries": False}
        found = cached_file(model, INDEX, **options) or cached_file(model, WHOLE, **options)
        folder = Path(found).parent if found else folder
        for file in shards_of(folder) if found else ():
            cached_file(model, file.name, revision=loading.revision)
    if not is_checkpoint(folder):
        raise ValueError(
            f"{model} holds neither {WHOLE} nor {INDEX}; expected weights as safetensors, which can be read one layer "
            "at a time. Load the model and save it with save_pretrained, which writes them so."
        )
    return shards_of(folder)


class Shards:
    """The tensors in some safetensors files, by name.

    Args:
        files: The files.

    Attributes:
        dtype: Of the first that is in floating point.

    Raises:
        FileNotFoundError: One is missing.
        ValueError: One is damaged.
    """

    def __init__(self, files: Sequence[Path]):
        self.files = list(files)
        self._file_of: dict[str, Path] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        codes: list[str] = []
        for path in self.files:
            with opened(path, _EXPECTED) as file:
                for name in file.keys():
                    self._file_of[name], self._shapes[name] = path, tuple(file.get_slice(name).get_shape())
                    codes.append(file.get_slice(name).get_dtype())
        # of the first, as transformers takes it where the configuration names none
        self.dtype = next((FLOATING[code] for code in codes if code in FLOATING), torch.float32)

    def shape(self, name: str) -> tuple[int, ...] | None:
        """Return the shape of a tensor; ``None`` where there is none of that name."""
        return self._shapes.get(name)

    def read(self, name: str) -> Tensor:
        """Return a tensor in memory of its own, as it is stored."""
        # The file is opened anew for every tensor: what was read of a mapped file stays resident while it is open.
        with opened(self._file_of[name], _EXPECTED) as file:
            return read_floating(file, self._file_of[name], name).clone()

    def read_ahead(self, names: Iterable[str]) -> None:
        """Ask the system to read these tensors into its cache meanwhile, where it can be asked."""
        if not hasattr(os, "posix_fadvise"):
            return
        by_file: dict[Path, list[str]] = {}
        for name in names:
            by_file.setdefault(self._file_of[name], []).append(name)
        for path, wanted in by_file.items():
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                header = json.loads(file.read(length))
                for name in wanted:
                    first, end = header[name]["data_offsets"]
                    os.posix_fadvise(file.fileno(), 8 + length + first, end - first, os.POSIX_FADV_WILLNEED)

    def key(self) -> str:
        """Identify the files by names, sizes and times of the last change; nothing is read."""
        facts = [(path.name, path.stat()) for path in self.files]
        return digest_of(f"{name}:{fact.st_size}:{fact.st_mtime_ns}" for name, fact in facts)


class DiskWeights:
    """The weights of a model whose parameters lie on the device meta, put in place for a while and dropped again.

    Args:
        model: The model.
        shards: Its weights.
        device: Where they are put.
    """

    def __init__(self, model: nn.Module, shards: Shards, device: torch.device):
        self.model, self.shards, self.device = model, shards, device
        self._prefix = f"{getattr(model, 'base_model_prefix', '')}."

    def require(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """Refuse modules, given with their names, of which a tensor is missing or has another shape."""
        for prefix, module in modules:
            for _, owner_name, kind, key, tensor in _tensors(prefix, module):
                name = f"{owner_name}.{key}"
                stored = self._stored(name)
                shape = self.shards.shape(stored) if stored else None
                if shape != tuple(tensor.shape):
                    found = "no such tensor" if shape is None else f"it as {shape}"
                    raise ValueError(
                        f"The files of {type(self.model).__name__} hold {found}: {name} {tuple(tensor.shape)}, a "
                        f"{kind} of the model; expected it under this name, to be read without the rest. Where "
                        "transformers converts a checkpoint as it loads it, load it, save it with save_pretrained, or "
                        "use lora_null.calibrate and lora_null.initialize on the model in memory."
                    )

    @contextmanager
    def placed(self, prefix: str, module: nn.Module, *, whole: bool = True) -> Iterator[None]:
        """Hold the weights of a module of that name for the length of the block; ``whole``: of those inside, too."""
        homes: list[tuple[dict, str, Tensor]] = []
        try:
            for owner, owner_name, _, key, tensor in _tensors(prefix, module, whole=whole):
                stored = self._stored(f"{owner_name}.{key}")
                assert stored is not None
                values = self.shards.read(stored).to(self.device, tensor.dtype)
                homes.append((owner, key, tensor))
                is_parameter = isinstance(tensor, nn.Parameter)
                owner[key] = nn.Parameter(values, requires_grad=False) if is_parameter else values
            yield
        finally:
            for owner, key, tensor in homes:
                owner[key] = tensor

    def read_ahead(self, prefix: str, module: nn.Module) -> None:
        """Let the system read the weights of a module of that name, and those inside, while something else computes."""
        stored = [self._stored(f"{name}.{key}") for _, name, _, key, _ in _tensors(prefix, module)]
        self.shards.read_ahead(name for name in stored if name is not None)

    def fingerprint(self, linears: Mapping[str, nn.Linear]) -> str | None:
        """Return the fingerprint of linear layers of the model, of which one is in memory at a time."""
        samples = []
        for name, linear in linears.items():
            with self.placed(name, linear, whole=False):
                samples.append(sample_of(name, linear))
        return fingerprint_of(samples)

    def _stored(self, name: str) -> str | None:
        # a base model's checkpoint lacks the prefix that the model with a head has, and the other way round
        for candidate in (name, name.removeprefix(self._prefix), self._prefix + name):
            if self.shards.shape(candidate) is not None:
                return candidate
        return None


def _tensors(
    prefix: str, module: nn.Module, *, whole: bool = True
) -> Iterator[tuple[dict[str, Any], str, str, str, Tensor]]:
    """Yield ``(dictionary that holds it, name of the owner, kind, key, tensor)`` of a module's parameters and buffers.

    Buffers that no checkpoint holds are left out: they have their values from the start.
    """
    for name, owner in module.named_modules(prefix=prefix) if whole else [(prefix, module)]:
        for key, parameter in list(owner._parameters.items()):
            if parameter is not None:
                yield owner._parameters, name, "parameter", key, parameter
        for key, buffer in list(owner._buffers.items()):
            if buffer is not None and key not in owner._non_persistent_buffers_set:
                yield owner._buffers, name, "buffer", key, buffer


def size_of(module: nn.Module, *, whole: bool = True) -> int:
    """Return the bytes of the weights of a module; ``whole``: with those inside."""
    return sum(tensor.numel() * tensor.element_size() for *_, tensor in _tensors("", module, whole=whole))

"""What is finished of an interrupted run: one file per layer, written atomically, checked when it is read."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from ..system.files import parse_json, replacing
from ..system.tensors import bytes_of, opened

_EXPECTED = "a finished layer of an interrupted run"


@dataclass
class LayerFacts:
    """What is known of a finished layer besides its factors.

    Attributes:
        groups: Members by group key.
        tokens: Tokens by group key.
        sizes: Number of features by group key.
        energies: As in the adapter's state.
        free: As in the adapter's state.
        samples: What of each linear layer that was called enters a fingerprint, in hexadecimal digits.
        left_out: Target layers that compute something else than ``x W^T``, and what.
    """

    groups: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)
    sizes: dict[str, int] = field(default_factory=dict)
    energies: dict[str, float] = field(default_factory=dict)
    free: dict[str, int] = field(default_factory=dict)
    samples: dict[str, str] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, other: LayerFacts) -> None:
        """Take over those of another layer."""
        for name, values in asdict(other).items():
            getattr(self, name).update(values)


class LayerFiles:
    """The finished layers in a folder.

    Args:
        folder: For the files.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def count(self) -> int:
        """Return how many layers are finished, from the first on."""
        number = 0
        while self._file(number).exists():
            number += 1
        return number

    def write(self, number: int, deltas: Mapping[str, tuple[Tensor, Tensor]], facts: LayerFacts) -> None:
        """Write a finished layer."""
        tensors = {f"{name}.{part}": pair[i].cpu() for name, pair in deltas.items() for i, part in enumerate("AB")}
        checksums = {name: zlib.crc32(bytes_of(tensor)) for name, tensor in tensors.items()}
        metadata = {"facts": json.dumps(asdict(facts)), "crc32": json.dumps(checksums)}
        with replacing(self._file(number)) as temporary:
            save_file(tensors, str(temporary), metadata=metadata)

    def read(self, number: int) -> tuple[dict[str, tuple[Tensor, Tensor]], LayerFacts]:
        """Return factors, mapped from the file, and facts of a finished layer; ValueError if it is damaged."""
        path = self._file(number)
        with opened(path, _EXPECTED) as file:
            try:
                metadata: Any = file.metadata() or {}
                checksums = parse_json(metadata["crc32"])
                facts = LayerFacts(**parse_json(metadata["facts"]))
                tensors = {name: file.get_tensor(name) for name in checksums}
                names = dict.fromkeys(name[:-2] for name in checksums)
                deltas = {name: (tensors[f"{name}.A"], tensors[f"{name}.B"]) for name in names}
                whole = all(zlib.crc32(bytes_of(tensor)) == checksums[name] for name, tensor in tensors.items())
            except (KeyError, TypeError, ValueError) as error:
                raise ValueError(f"{path} is damaged ({error}). Delete {self.folder} to start anew.") from None
        if not whole:
            raise ValueError(f"{path} is damaged: a checksum is another one. Delete {self.folder} to start anew.")
        return deltas, facts

    def _file(self, number: int) -> Path:
        return self.folder / f"layer.{number:04d}.safetensors"

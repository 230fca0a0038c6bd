"""Interrupted calibrations: saved atomically, keyed by content, continued to the same bits."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from glob import escape
from pathlib import Path

import torch
from torch import Tensor, nn

from ._storage import PackedFile, PackedMatrices, bytes_of, write_packed
from ._weights import gathered, materialized

_KIND = "lora_null.calibration"
FORMAT_VERSION = 1
# Width of the table over which the bits of a weight are summed, in 8-byte words.
_COLUMNS = 4096


def weights_key(model: nn.Module) -> str:
    """Hash every parameter and persistent buffer of ``model``: names, shapes, dtypes and all bits.

    The bits enter as row and column sums of wrapping 64-bit integers, formed where the tensor lies: exact, in
    any order, so that one changed bit changes the key and a swap of values does too. On a CPU this is 8 times faster
    than a cryptographic hash of all bytes (0.09 s against 0.7 s for 0.5 GB), and a GPU's weights stay there.
    It protects against mistakes, not against an adversary.
    """
    digest = hashlib.blake2b(digest_size=16)
    for prefix, module in model.named_modules():
        own = [*module._parameters.items(), *module._buffers.items()]
        if not any(tensor is not None for _, tensor in own):
            continue
        # accelerate takes a second to import, and is needed only where it has put its hooks
        with materialized(module) if hasattr(module, "_hf_hook") else nullcontext():
            for name, tensor in [*module._parameters.items(), *module._buffers.items()]:
                if tensor is None or name in module._non_persistent_buffers_set:
                    continue
                digest.update(f"{prefix}.{name}:{tensor.dtype}:{tuple(tensor.shape)};".encode())
                _add_bits(digest, tensor)
    return digest.hexdigest()


def digest_of(values: Iterable[str]) -> str:
    """Hash strings in order."""
    return hashlib.blake2b("\n".join(values).encode(), digest_size=16).hexdigest()


def _add_bits(digest, tensor: Tensor) -> None:
    tensor = gathered(tensor.detach())
    if tensor.is_meta:
        return
    # clone: a view of 8-byte words needs an aligned start
    flat = tensor.contiguous().view(-1)
    flat = flat.clone() if flat.storage_offset() else flat
    bits = flat.view(torch.uint8)
    words = bits[: bits.numel() // 8 * 8].view(torch.int64)
    table = words[: words.numel() // _COLUMNS * _COLUMNS].view(-1, _COLUMNS)
    for part in (table.sum(0), table.sum(1), words[table.numel() :], bits[words.numel() * 8 :]):
        digest.update(bytes_of(part.cpu()))


@dataclass
class Progress:
    """What a checkpoint holds besides the sums.

    Attributes:
        groups: Key to members.
        tokens: Key to rows summed.
        calls: Key to the number of calls of its layers.
        batches: How many batches have been read.
        data: Fingerprint of these batches.
        finished: The data ended after these batches.
    """

    groups: dict[str, list[str]]
    tokens: dict[str, int]
    calls: dict[str, int]
    batches: int = 0
    data: str = ""
    finished: bool = False


def check_checkpoint(path: Path) -> None:
    """Refuse a path that cannot be a checkpoint, before any work is done.

    Raises:
        IsADirectoryError: It is a folder.
        ValueError: It is a file of another kind, or damaged.
    """
    if path.is_dir():
        raise IsADirectoryError(
            f"checkpoint is {path}, which is a folder; expected the name of a file for the sums in progress. Name one "
            f"in it, for instance {path / 'calibration.safetensors'}."
        )
    if path.exists():
        PackedFile(path, _KIND)


class Checkpoint:
    """One file of sums in progress.

    Args:
        path: The file.
        key: What must be equal for the sums to be continued, as readable strings.
    """

    def __init__(self, path: Path, key: Mapping[str, str]):
        self.path = path
        self.key = {"format": str(FORMAT_VERSION), **key}

    def load(self) -> tuple[Progress, PackedFile] | None:
        """Return what was saved, or ``None`` if there is no file.

        Raises:
            ValueError: The file is damaged, or belongs to another calibration; both keys are named.
        """
        if not self.path.exists():
            return None
        file = PackedFile(self.path, _KIND)
        try:
            saved = json.loads(file.metadata["key"])
            progress = Progress(**json.loads(file.metadata["progress"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{self.path} is damaged: its header is incomplete ({error}).") from error
        self.refuse_other(saved, self.key)
        return progress, file

    def refuse_other(self, saved: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        """Raise ValueError unless the two keys are equal."""
        names = [name for name in {**wanted, **saved} if saved.get(name) != wanted.get(name)]
        if names:
            lines = [f"  {name}: checkpoint {saved.get(name)}, this run {wanted.get(name)}" for name in names]
            raise ValueError(
                f"The checkpoint {self.path} belongs to another calibration:\n" + "\n".join(lines) + "\n"
                "Expected the same model, data and options as those it was written with; a shuffled DataLoader needs "
                "a generator with a fixed seed. Restore them, or choose another path, or delete the file to start anew."
            )

    def save(self, progress: Progress, matrices: PackedMatrices) -> None:
        """Replace the file, atomically."""
        metadata = {"kind": _KIND, "key": json.dumps(self.key), "progress": json.dumps(progress.__dict__)}
        write_packed(self.path, matrices, metadata)

    def part(self, number: int) -> Checkpoint:
        """Return the checkpoint of one finished layer."""
        return Checkpoint(self.path.with_name(f"{self.path.name}.{number:04d}"), self.key)

    @contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the checkpoint for this process; ValueError if another one does."""
        from filelock import FileLock, Timeout

        self.path.parent.mkdir(parents=True, exist_ok=True)
        lock = FileLock(self.path.with_name(f".{self.path.name}.lock"))
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise ValueError(
                f"The checkpoint {self.path} is in use by another process; give each calibration a path of its own."
            ) from error
        try:
            # What a killed process left of an unfinished write.
            for leftover in self.path.parent.glob(f".{escape(self.path.name)}*.tmp"):
                leftover.unlink(missing_ok=True)
            yield
        finally:
            lock.release()

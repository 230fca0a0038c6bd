"""Interrupted calibrations: saved atomically, keyed by content, continued to the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from glob import escape
from pathlib import Path

from ..covariances.packed import PackedFile, PackedMatrices, write_packed

_KIND = "lora_null.calibration"
FORMAT_VERSION = 1


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

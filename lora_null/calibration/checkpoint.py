"""Interrupted calibrations: saved atomically, keyed by content, continued to the same bits."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..covariances.header import counts_by_key, is_count, names_by_key, strings_by_key
from ..covariances.packed import PackedFile, PackedMatrices, write_packed
from ..system.files import beside, held, parse_json, require_writable

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
        OSError: Nothing can be written there.
        ValueError: It is a file of another kind, or damaged.
    """
    if path.is_dir():
        raise IsADirectoryError(
            f"checkpoint is {path}, which is a folder; expected the name of a file for the sums in progress. Name one "
            f"in it, for instance {path / 'calibration.safetensors'}."
        )
    require_writable(path)
    if path.exists():
        PackedFile(path, _KIND)


def _progress(values: Any) -> Progress:
    """Check what a file says of its progress."""
    progress = Progress(**values)
    groups = names_by_key(progress.groups)
    if not set(counts_by_key(progress.tokens)) <= set(groups):
        raise ValueError("tokens of layers that are in no group")
    counts_by_key(progress.calls)
    if not all(key in names for key, names in groups.items()):
        raise ValueError("a group lacks the layer that it is named after")
    if not is_count(progress.batches) or type(progress.finished) is not bool or type(progress.data) is not str:
        raise ValueError(f"batches {progress.batches!r}, data {progress.data!r}, finished {progress.finished!r}")
    return progress


class Checkpoint:
    """One file of sums in progress.

    Args:
        path: The file.
        key: What must be equal for the sums to be continued, as readable strings.
    """

    def __init__(self, path: Path, key: Mapping[str, str]):
        self.path = path
        self.key = {"format": str(FORMAT_VERSION), **key}

    def load(self, widths: Mapping[str, int]) -> tuple[Progress, PackedFile] | None:
        """Return what was saved, or ``None`` if there is no file.

        Args:
            widths: The number of input features of each target layer.

        Raises:
            ValueError: The file is damaged, or belongs to another calibration; both keys are named.
        """
        if not self.path.exists():
            return None
        file = PackedFile(self.path, _KIND)
        try:
            saved = strings_by_key(parse_json(file.metadata["key"]))
            progress = _progress(parse_json(file.metadata["progress"]))
            if set(file) != set(progress.tokens):
                raise ValueError("it counts the tokens of other sums than there are")
        except (KeyError, TypeError, ValueError) as error:
            raise self.damaged(f"its header is incomplete ({error})") from error
        self.refuse_other(saved, self.key)
        members = [(name, key) for key, names in progress.groups.items() for name in names]
        if not all(name in widths and widths[name] == file.sides.get(key, widths[name]) for name, key in members):
            raise self.damaged("its sums do not fit the layers of the model")
        return progress, file

    def damaged(self, reason: str) -> ValueError:
        """Return the error for a file whose contents cannot be."""
        return ValueError(f"{self.path} is damaged: {reason}. Delete it to start anew.")

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
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with held(beside(self.path, "lock")) as mine:
            if not mine:
                raise ValueError(
                    f"The checkpoint {self.path} is in use by another process; give each calibration a path of its own."
                )
            yield

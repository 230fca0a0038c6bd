"""The hidden states between two layers, in files: one is read while the next is written."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

import torch
from torch import Tensor

from ..system.files import read_json, replacing
from ..system.tensors import bytes_of


class HiddenFiles:
    """Hidden states by number of the batch, as :class:`~lora_null.calibration.walk.LayerWalk` keeps them.

    A file ``hidden.<layer>`` holds what enters a layer, as raw numbers one batch after another, and ``.json`` beside it
    where each batch lies. That is written last, so that a killed run finds whole files only; it goes on with them.

    Args:
        folder: For the files.
        latest: Hidden states of later layers than this one are of no use.

    Attributes:
        start: The layer whose hidden states are there; 0, which needs none, where there are none.
        rest: What else the tuples of the layers before it hold, see ``LayerWalk``.
    """

    def __init__(self, folder: Path, latest: int):
        self.folder, self.start = folder, 0
        self.rest: list[tuple | None] = []
        self._places: dict[int, tuple[int, list[int]]] = {}
        self._dtype = torch.float32
        self._reading: BinaryIO | None = None
        self._written: dict[int, tuple[int, list[int]]] = {}
        self._writing: BinaryIO | None = None
        for index in sorted(folder.glob("hidden.*.json")):
            number = int(index.name.split(".")[1])
            if number <= latest:
                self._adopt(number, read_json(index))

    def __getitem__(self, batch: int) -> Tensor:
        """Read what enters the layer at work."""
        assert self._reading is not None
        start, shape = self._places[batch]
        values = torch.empty(math.prod(shape) * self._dtype.itemsize, dtype=torch.uint8)
        self._reading.seek(start)
        read = self._reading.readinto(values.numpy().data) if values.numel() else 0  # type: ignore[attr-defined]
        if read != values.numel():
            raise ValueError(f"{self._file(self.start)} is cut short. Delete {self.folder} to start anew.")
        return values.view(self._dtype).view(shape)

    def __setitem__(self, batch: int, hidden: Tensor) -> None:
        """Write what leaves the layer at work."""
        if self._writing is None:
            return
        self._written[batch] = self._writing.tell(), list(hidden.shape)
        self._dtype_written = hidden.dtype
        self._writing.write(bytes_of(hidden.cpu()))

    @contextmanager
    def around(self, number: int, rest: Sequence[tuple | None], *, last: bool) -> Iterator[None]:
        """Serve the passes of layer ``number``; when the block succeeds, what it wrote takes the place of what it read.

        Args:
            number: The layer.
            rest: What else the tuples of all layers hold, known when the block ends.
            last: No layer follows, so that nothing is written.
        """
        self._written = {}
        try:
            if number:
                self._reading = open(self._file(number), "rb")
            if last:
                yield
                return
            with replacing(self._file(number + 1)) as temporary:
                self._writing = open(temporary, "wb")
                yield
                self._writing.close()
            index = {
                "dtype": str(self._dtype_written).removeprefix("torch.") if self._written else "float32",
                "places": {str(batch): place for batch, place in self._written.items()},
                # of tuples that hold more than None there is no record, and a killed run starts from the first layer
                "rest": [None if part is None else len(part) for part in rest[: number + 1]],
                "whole": all(part is None or set(part) == {None} for part in rest[: number + 1]),
            }
            with replacing(self._index(number + 1)) as temporary:
                temporary.write_text(json.dumps(index), encoding="utf-8")
            self._adopt(number + 1, index)
            for path in (self._index(number), self._file(number)):
                path.unlink(missing_ok=True)
        finally:
            for file in (self._reading, self._writing):
                if file is not None:
                    with suppress(OSError):
                        file.close()
            self._reading = self._writing = None

    def _adopt(self, number: int, index: dict[str, Any]) -> None:
        self._places = {int(batch): (start, shape) for batch, (start, shape) in index["places"].items()}
        self._dtype = getattr(torch, index["dtype"])
        self.start = number if index["whole"] else 0
        self.rest = [None if count is None else (None,) * count for count in index["rest"]]

    def _file(self, number: int) -> Path:
        return self.folder / f"hidden.{number:04d}"

    def _index(self, number: int) -> Path:
        return self.folder / f"hidden.{number:04d}.json"

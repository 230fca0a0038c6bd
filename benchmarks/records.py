"""Results as data: one JSON line per measurement, appended so that nothing recorded earlier can be lost."""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"
DEFAULT_FILE = RESULTS / "measurements.jsonl"


class ResultsError(OSError):
    """A record could not be written; the file holds exactly the records that it held before."""


def append(path: str | os.PathLike, record: dict) -> None:
    """Append one record as a line and force it to the disk.

    A line that an earlier, killed process left unfinished is closed first, so that it spoils no other. When
    the line cannot be written whole, for instance because no space is left, the file is cut back to its
    former length.

    Raises:
        ResultsError: The record was not written.
    """
    line = json.dumps(record, separators=(",", ":"), allow_nan=False).encode() + b"\n"
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
    except OSError as error:
        raise ResultsError(f"The results file {path} cannot be opened: {error}.") from error
    try:
        # Two runs may share a file; the length must not change between reading and cutting back.
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        length = os.fstat(descriptor).st_size
        if length and os.pread(descriptor, 1, length - 1) != b"\n":
            line = b"\n" + line
        try:
            _write_all(descriptor, line)
            os.fsync(descriptor)
        except OSError as error:
            os.ftruncate(descriptor, length)
            raise ResultsError(
                f"A record of {len(line)} bytes could not be written to {path}: {error}. The earlier records are "
                "untouched. Free some space, or name another file with --output."
            ) from error
    finally:
        os.close(descriptor)


def _write_all(descriptor: int, data: bytes) -> None:
    while data:
        data = data[os.write(descriptor, data) :]


def read(path: str | os.PathLike) -> tuple[list[dict], list[int]]:
    """Return the records of a file and the numbers (from 1) of lines that are damaged.

    Damaged lines stay in the file: they are evidence, and cutting them out would rewrite what is sound.
    """
    records, damaged = [], []
    for number, record in _lines(Path(path)):
        if isinstance(record, dict) and "question" in record and "provider" in record:
            records.append(record)
        else:
            damaged.append(number)
    return records, damaged


def read_runs(path: Path) -> list[dict]:
    """Return the runs of a study's file; a line that a killed process left unfinished is no run."""
    return [record for _, record in _lines(path) if record is not None]


def _lines(path: Path) -> Iterator[tuple[int, Any]]:
    """Yield the number and the value of each line that is not blank; ``None`` where it is damaged."""
    for number, line in enumerate(path.read_bytes().split(b"\n") if path.exists() else [], start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except ValueError:
                yield number, None


def key(record: dict) -> tuple:
    """What a measurement is of: two records of one key are repetitions."""
    case = json.dumps(record.get("case", {}), sort_keys=True)
    return (
        record["question"],
        case,
        record.get("mode"),
        record.get("execution"),
        record["provider"],
        record.get("environment", {}).get("device"),
    )


def latest(records: Iterable[dict]) -> list[dict]:
    """Keep the newest record of every key, in the order of first appearance."""
    newest: dict[tuple, dict] = {}
    for record in records:
        newest[key(record)] = record
    return list(newest.values())

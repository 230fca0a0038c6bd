"""Files that appear whole or not at all."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .log import logger

# A JSON file beyond this is no configuration: the index of the largest sharded checkpoints has some 20 MB.
_LARGEST_JSON = 256 * 2**20
# In bytes; of the 255 that file systems allow, the rest is for what is added to a name.
_LONGEST_NAME = 200


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, an empty file, and rename it onto ``path`` when the block succeeds.

    Whatever interrupts the block, a power failure too, ``path`` is either the whole old file or the whole new one.
    Threads and processes that write one path have a temporary each, and the last to finish wins. What killed
    processes have left of theirs is removed. A link is followed.
    """
    path = Path(os.path.realpath(path))
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = beside(path, "").name
    for leftover in path.parent.iterdir():
        if re.fullmatch(re.escape(prefix) + r"[0-9a-f]{16}\.tmp", leftover.name):
            _remove_unclaimed(leftover)
    temporary, claim = _claimed(path, prefix)
    try:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        # some file systems cannot sync a folder, and Windows cannot open one; the file is in place either way
        with suppress(OSError):
            _sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)
        os.close(claim)


def beside(path: Path, ending: str) -> Path:
    """Return ``.<name>.<ending>`` in the folder of ``path``, with a hash for part of a name that is too long."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME // 5] + hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    return path.with_name(f".{name}.{ending}")


def _claimed(path: Path, prefix: str) -> tuple[Path, int]:
    """Make a temporary file, locked for as long as the returned descriptor is open: its writer is alive."""
    while True:
        temporary = path.with_name(f"{prefix}{secrets.token_hex(8)}.tmp")
        claim = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        _lock(claim, wait=True)
        if os.fstat(claim).st_nlink:
            return temporary, claim
        # another writer took it for a leftover before it was locked
        os.close(claim)


def _remove_unclaimed(leftover: Path) -> None:
    try:
        descriptor = os.open(leftover, os.O_WRONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return
    try:
        if _lock(descriptor, wait=False):
            leftover.unlink(missing_ok=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, wait: bool) -> bool:
    """Lock an open file, where the system can; tells whether it did."""
    try:
        import fcntl
    except ImportError:  # Windows, where leftovers stay
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


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


def write_json(path: Path, values: dict) -> None:
    """Write ``values`` with sorted keys, so that equal adapters are equal files."""
    path.write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def require_regular(path: Path, expected: str, limit: int | None = None) -> None:
    """Refuse to read what is no regular file, such as a pipe or a device, which may never end, or is too large.

    Args:
        path: The file; a link is followed.
        expected: What it should be, for the message.
        limit: The most bytes that it may have; ``None``: any number.

    Raises:
        FileNotFoundError: There is nothing at ``path``.
        IsADirectoryError: It is a folder.
        ValueError: It is no regular file, or larger than ``limit``.
    """
    try:
        status = path.stat()
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path}: no such file; expected {expected}.") from None
    if stat.S_ISDIR(status.st_mode):
        raise IsADirectoryError(f"{path} is a folder; expected {expected}.")
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{path} is a pipe, a device or a socket; expected {expected}, as a regular file.")
    if limit is not None and status.st_size > limit:
        raise ValueError(
            f"{path} has {status.st_size:,} bytes; expected {expected} of at most {limit:,} bytes. Was the path of "
            "another file given?"
        )


def parse_json(text: str) -> Any:
    """Parse JSON; ValueError for anything else, such as NaN, infinite numbers, or nesting too deep for Python."""
    try:
        return json.loads(text, parse_constant=_finite, parse_float=_finite)
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _finite(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"{text} is no finite number")
    return value


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say which file is damaged.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no regular file, far too large, or no JSON object.
    """
    require_regular(path, "a JSON file", _LARGEST_JSON)
    try:
        values = parse_json(path.read_text(encoding="utf-8"))
    except ValueError as error:  # also of the decoder of UTF-8
        raise ValueError(f"{path} is damaged ({error}); expected a JSON object. Save it again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a JSON object.")
    return values

"""Files that appear whole or not at all."""

from __future__ import annotations

import ctypes
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .log import logger

# A JSON file beyond this is no configuration: the index of the largest sharded checkpoints has some 20 MB.
_LARGEST_JSON = 256 * 2**20
# In bytes; of the 255 that file systems allow, the rest is for what is added to a name.
_LONGEST_NAME = 200
_DISK = {errno.ENOSPC, errno.EFBIG, errno.EROFS, errno.EIO, getattr(errno, "EDQUOT", errno.ENOSPC)}


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``, an empty file, and rename it onto ``path`` when the block succeeds.

    Whatever interrupts the block, a power failure too, ``path`` is either the whole old file or the whole new one.
    Threads and processes that write one path have a temporary each, and the last to finish wins. What killed
    processes have left of theirs is removed. A link is followed.

    Raises:
        OSError: The disk is full, or the like; what it says and that the old file is whole.
    """
    path = Path(os.path.realpath(path))
    with _temporary(path, _new_file) as temporary:
        yield temporary
        _sync(temporary)
        os.replace(temporary, path)
        _sync_names(path.parent)


@contextmanager
def replaced_folder(path: Path, check: Callable[[], None]) -> Iterator[Path]:
    """Yield an empty folder beside ``path`` that takes its place when the block succeeds.

    As :func:`replacing` for a folder: the old one and the new one change places in one step, so that there is no moment
    without one, where the system can exchange names (Linux); elsewhere the old one is moved away first, and put back by
    the next call where a process is killed in between.

    Args:
        path: The folder to make or to replace.
        check: Called before and after the block; raises if ``path`` must not be replaced.
    """
    path = Path(os.path.realpath(path))
    with _temporary(path, _new_folder) as temporary:
        check()
        yield temporary
        for folder, _, names in os.walk(temporary):
            for name in names:
                _sync(Path(folder, name))
            _sync_names(Path(folder))
        # Again: the block may have taken minutes.
        check()
        _take_place(temporary, path, check)
        _sync_names(path.parent)


def require_writable(path: Path) -> None:
    """Refuse, before hours of work, an output that could not be written after them; nothing is left behind.

    Raises:
        OSError: A file lies where a folder is needed, a name is too long, or nothing can be written there.
    """
    nearest = next(parent for parent in Path(os.path.abspath(path)).parents if os.path.lexists(parent))
    if not nearest.is_dir():
        raise NotADirectoryError(f"{path} cannot be written: {nearest} is a file. Choose another path.")
    longest = os.pathconf(nearest, "PC_NAME_MAX") if hasattr(os, "pathconf") else 255
    for part in path.parts:
        if len(os.fsencode(part)) > longest:
            raise OSError(
                f"{path} cannot be written: {part[:20]}... has {len(os.fsencode(part))} bytes; expected names of at "
                f"most {longest}. Choose another path."
            )
    try:
        tempfile.TemporaryFile(dir=nearest).close()
    except OSError as error:
        raise type(error)(
            f"{path} cannot be written: this user may not write to {nearest}, or its disk is full "
            f"({error.strerror}). Choose another path."
        ) from None


def beside(path: Path, ending: str) -> Path:
    """Return ``.<name>.<ending>`` in the folder of ``path``, with a hash for part of a name that is too long."""
    name = path.name
    if len(os.fsencode(name)) > _LONGEST_NAME:
        name = name[: _LONGEST_NAME // 5] + hashlib.blake2b(os.fsencode(name), digest_size=8).hexdigest()
    return path.with_name(f".{name}.{ending}")


@contextmanager
def held(path: Path) -> Iterator[bool]:
    """Yield whether this process holds ``path``, a file that says so to others and is gone afterwards.

    A killed process leaves the file, which the next one takes over.
    """
    if os.name != "posix":
        from filelock import FileLock, Timeout  # which removes its file there

        try:
            with FileLock(path, timeout=0):
                yield True
        except Timeout:
            yield False
        return
    while True:
        descriptor = os.open(path, os.O_CREAT | os.O_RDWR, 0o666)
        try:
            if not _lock(descriptor, wait=False):
                yield False
                return
            try:
                if not os.path.samestat(os.fstat(descriptor), os.stat(path)):
                    continue
            except FileNotFoundError:
                continue  # its holder removed it between our opening and our locking
            try:
                yield True
            finally:
                path.unlink(missing_ok=True)
            return
        finally:
            os.close(descriptor)


@contextmanager
def _temporary(path: Path, make: Callable[[Path], int | None]) -> Iterator[Path]:
    """Yield what ``make`` makes beside ``path``, under a name of its own, and remove what is left of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    prefix = beside(path, "").name
    for leftover in path.parent.iterdir():
        if kind := re.fullmatch(re.escape(prefix) + r"[0-9a-f]{16}\.(tmp|old)", leftover.name):
            _tidy(leftover, path if kind[1] == "old" else None)
    temporary, claim = _claimed(path, prefix, make)
    try:
        yield temporary
    except Exception as error:
        if reason := _disk_says(error):
            raise OSError(
                f"{path} was not written ({reason}); what was there before is as it was. Free some space, or choose "
                "another path."
            ) from error
        raise
    finally:
        _remove(temporary)
        if claim is not None:
            os.close(claim)


def _new_file(path: Path) -> int:
    return os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)


def _new_folder(path: Path) -> int | None:
    path.mkdir()
    # Windows opens no folders; nor does it lock
    return os.open(path, os.O_RDONLY) if os.name == "posix" else None


def _claimed(path: Path, prefix: str, make: Callable[[Path], int | None]) -> tuple[Path, int | None]:
    """Make a temporary, locked for as long as the returned descriptor is open: its writer is alive."""
    while True:
        temporary = path.with_name(f"{prefix}{secrets.token_hex(8)}.tmp")
        try:
            claim = make(temporary)
        except FileNotFoundError:
            if not path.parent.exists():
                raise
            continue  # a folder that another writer took for a leftover before it was opened
        if claim is None:
            return temporary, None
        _lock(claim, wait=True)
        if os.path.lexists(temporary):
            return temporary, claim
        # taken for a leftover before it was locked
        os.close(claim)


def _tidy(leftover: Path, path: Path | None) -> None:
    """Remove what a killed process has left; or put it back to ``path``, if that is where it was and nothing is."""
    try:
        descriptor = os.open(leftover, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError:
        return
    try:
        if not _lock(descriptor, wait=False):
            return
        if path is None or path.exists():
            _remove(leftover)
        else:
            os.rename(leftover, path)
    finally:
        os.close(descriptor)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def _lock(descriptor: int, wait: bool) -> bool:
    """Lock an open file or folder, where the system can; tells whether it did."""
    try:
        import fcntl
    except ImportError:  # Windows, where leftovers stay
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False
    return True


def _take_place(new: Path, path: Path, check: Callable[[], None]) -> None:
    """Put the folder ``new`` at ``path``; what was there is under the name ``new`` then, or gone."""
    try:
        os.rename(new, path)  # nothing there, or on POSIX an empty folder
        return
    except OSError:
        if not path.is_dir():
            raise
    check()
    if _exchanged(new, path):
        return
    old = new.with_suffix(".old")
    claim = os.open(path, os.O_RDONLY) if os.name == "posix" else None
    try:
        if claim is not None:
            _lock(claim, wait=False)
        os.rename(path, old)
        try:
            os.rename(new, path)
        except BaseException:
            try:
                if not path.exists():
                    os.rename(old, path)
            except OSError:
                # It is all that there is of the user's files.
                logger.error("%s could not be replaced; what it held before lies in %s.", path, old)
            raise
        finally:
            if path.exists():  # the new one, or that of another writer who came in between
                _remove(old)
    finally:
        if claim is not None:
            os.close(claim)


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange two names in one step; False where the system or its file system cannot."""
    try:
        # Linux 3.15, glibc 2.28: AT_FDCWD is -100, RENAME_EXCHANGE 2 (man 2 rename)
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):
        return False
    return rename(-100, os.fsencode(one), -100, os.fsencode(other), 2) == 0


def _sync(path: Path) -> None:
    """Have the system write a file, or the names in a folder, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sync_names(folder: Path) -> None:
    # some file systems cannot sync a folder, and Windows cannot open one; the names are in place either way
    with suppress(OSError):
        _sync(folder)


def _disk_says(error: Exception) -> str | None:
    """Return what a disk that takes no more says, in Python's words or in those of safetensors; else None."""
    if isinstance(error, OSError) and error.errno in _DISK:
        return error.strerror
    if type(error).__name__ == "SafetensorError" and "os error" in str(error):
        return str(error)
    return None


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


def digest_of_json(values: Mapping[str, Any]) -> str:
    """Hash what a JSON object says, whatever its order and spacing."""
    return hashlib.blake2b(json.dumps(values, sort_keys=True).encode(), digest_size=16).hexdigest()


def digest_of_file(path: Path) -> str:
    """Hash the bytes of a file."""
    digest = hashlib.blake2b(digest_size=16)
    with open(path, "rb") as file:
        while part := file.read(2**20):
            digest.update(part)
    return digest.hexdigest()


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

"""Files that appear whole or not at all."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .log import logger


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path`` and rename it onto ``path`` at the end of a successful block.

    Whatever interrupts the block, ``path`` is either the whole old file or the whole new one.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


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


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object, or say which file is damaged."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise FileNotFoundError(f"{path} does not exist; expected a JSON file.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is damaged ({error}); expected a JSON object. Save it again.") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path} holds a {type(values).__name__}; expected a JSON object.")
    return values

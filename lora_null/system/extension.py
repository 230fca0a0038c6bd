"""Find or build the compiled part: ahead of time as ``lora_null._C``, else on first use, else not at all."""

from __future__ import annotations

import hashlib
import importlib
import os
import shutil
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import filelock
import torch

from .build_flags import compile_flags, digest
from .environment import cache_folder, switched_on
from .log import logger, warn_once

_NAME = "lora_null_extension"
_loaded: dict[str, ModuleType | None] = {}


def source_folder() -> Path | None:
    """Return the folder of the C++ sources, in an installed package or in a checkout."""
    package = Path(__file__).resolve().parent.parent
    for folder in (package / "csrc", package.parent / "csrc"):
        if (folder / "bindings.cpp").is_file():
            return folder
    return None


def _fingerprint(folder: Path) -> str:
    """Hash everything that the binary depends on, so that no build is ever reused for something else."""
    parts = (sys.version, torch.__version__, torch.version.cuda, torch.version.git_version, digest(folder))
    return hashlib.sha256("\0".join(map(str, parts)).encode()).hexdigest()[:16]


def build(folder: Path | None = None) -> ModuleType:
    """Compile the sources in ``folder`` with ninja, or reuse the cached build of the same sources.

    Raises:
        FileNotFoundError: the sources are in neither of the places of :func:`source_folder`, or there is no compiler.
        RuntimeError, OSError: what the compiler, ninja or the loader said.
    """
    from torch.utils import cpp_extension

    folder = folder or source_folder()
    if folder is None:
        raise FileNotFoundError("the C++ sources of lora_null are not installed")
    compiler = cpp_extension.get_cxx_compiler()
    if shutil.which(compiler.split()[0]) is None:
        raise FileNotFoundError(f"there is no compiler {compiler}")
    build_folder = cache_folder() / "extension" / _fingerprint(folder)
    build_folder.mkdir(parents=True, exist_ok=True)
    with filelock.FileLock(str(build_folder) + ".lock"), _ninja_on_path():
        # torch marks a running build with a file named "lock" and waits for it for ever. We hold a lock that
        # the system releases when its owner dies, so a mark found here was left by a killed build.
        (build_folder / "lock").unlink(missing_ok=True)
        if not (build_folder / f"{_NAME}.so").exists():
            logger.warning("lora_null: the C++ extension is compiled for this torch, once; that takes a minute or two.")
        return cpp_extension.load(
            name=_NAME,
            sources=[str(path) for path in sorted(folder.glob("*.cpp"))],
            extra_cflags=compile_flags(folder),
            build_directory=str(build_folder),
        )


def _cause(error: Exception) -> str:
    """Return the one line that says most: the first that the compiler calls an error."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return next((line for line in lines if "error:" in line), lines[0] if lines else repr(error))


@contextmanager
def _ninja_on_path() -> Iterator[None]:
    """Let torch find the ``ninja`` of the Python package, whose scripts folder need not be on PATH."""
    path = os.environ.get("PATH", "")
    if shutil.which("ninja") is None:
        scripts = (Path(sys.executable).parent, Path(sysconfig.get_path("scripts")))
        found = next((folder for folder in scripts if (folder / "ninja").exists()), None)
        if found is not None:
            os.environ["PATH"] = f"{found}{os.pathsep}{path}"
    try:
        yield
    finally:
        os.environ["PATH"] = path


def _built_ahead() -> ModuleType | None:
    if switched_on("LORA_NULL_NO_EXTENSION"):
        return None
    try:
        module = importlib.import_module("lora_null._C")
        folder = source_folder()
        if folder is None or getattr(module, "sources", None) == digest(folder):
            return module
        warn_once(
            "outdated extension",
            f"lora_null._C was built from other sources than those in {folder}, and is not used: linears are called "
            "from Python, and what needs C++ is compiled on first use. Build it again with `python setup.py build_ext "
            "--inplace`, or install the package again.",
        )
    except ImportError as error:
        # Missing is the ordinary case of an isolated install; a binary of another torch fails with undefined
        # symbols. Both end in a build for this torch where something asks for one.
        logger.debug("lora_null._C cannot be imported (%s)", error)
    return None


def _load() -> ModuleType | None:
    module = ready()
    if module is not None or switched_on("LORA_NULL_NO_EXTENSION"):
        return module
    try:
        return build()
    except Exception as error:  # any failure of a compiler must leave a working package
        warn_once(
            "extension",
            f"lora_null: the C++ extension could not be built ({_cause(error)}). Null spaces come from the direct "
            "eigensolver instead, and linears from plain torch calls. A C++ compiler, ninja and the Python headers are "
            "needed; LORA_NULL_NO_EXTENSION=1 skips the attempt.",
        )
        return None


def load() -> ModuleType | None:
    """Return the compiled module, or ``None`` where there is none; asked once per process.

    Set ``LORA_NULL_NO_EXTENSION=1`` before the first solve to do without it.
    """
    if "module" not in _loaded:
        _loaded["module"] = _load()
    return _loaded["module"]


def ready() -> ModuleType | None:
    """Return the compiled module if that takes no compiler: built ahead of time, or loaded already.

    For code that works without it and shall not wait a minute for it.
    """
    if "module" in _loaded:
        return _loaded["module"]
    if "ahead" not in _loaded:
        _loaded["ahead"] = _built_ahead()
    return _loaded["ahead"]

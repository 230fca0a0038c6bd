"""How the compiled part is built, for ``setup.py``, which runs this file, and for a build on first use.

Imports nothing of this package, whose own dependencies need not be there while it is built.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path

_FLAGS = ["-O3", "-std=c++20", "-fvisibility=hidden"]
if sys.platform.startswith("linux"):
    # at::parallel_for is a header with a pragma: without OpenMP it runs on one thread. No library is linked for it,
    # so that torch's own OpenMP runtime, whose threads torch.set_num_threads counts, answers.
    _FLAGS.append("-fopenmp")


def digest(folder: Path) -> str:
    """Return what tells the C++ sources in ``folder``, and the flags, from others: 16 hexadecimal digits."""
    contents = hashlib.sha256(" ".join(_FLAGS).encode())
    for path in sorted(folder.iterdir()):
        if path.suffix in (".cpp", ".h"):
            contents.update(path.name.encode() + b"\0" + path.read_bytes())
    return contents.hexdigest()[:16]


def compile_flags(folder: Path) -> list[str]:
    """Return the compiler's flags for ``folder``; the binary keeps its digest as the attribute ``sources``."""
    return [*_FLAGS, f"-DLORA_NULL_SOURCES={digest(folder)}"]

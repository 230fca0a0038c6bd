"""Memory that is free again."""

from __future__ import annotations

import ctypes


def give_back() -> None:
    """Return freed memory to the system, where the C library can do so (glibc).

    It keeps what lies between blocks in use: 60 MiB after a pass over a layer whose activations had 39 MiB.
    """
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # another C library, or Windows
        return

"""Environment variables: each is read here and nowhere else, at every use, and empty means unset."""

from __future__ import annotations

import os
from pathlib import Path

from .log import warn_once

LINEAR_BACKENDS = ("auto", "triton", "cublas", "torch")


def cache_folder() -> Path:
    """Return the folder for compiled code, tuned data and the quickstart's model.

    ``LORA_NULL_CACHE`` with ``~`` expanded, else ``lora_null`` in the user's cache folder.
    """
    if chosen := os.environ.get("LORA_NULL_CACHE"):
        return Path(chosen).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "lora_null"


def switched_on(name: str) -> bool:
    """Tell whether the variable ``name`` is ``1``."""
    return os.environ.get(name) == "1"


def settings() -> dict[str, str]:
    """Return the variables of this package that are set, and the one of Triton that changes what it does."""
    return {
        name: value
        for name, value in sorted(os.environ.items())
        if value and (name.startswith("LORA_NULL_") or name == "TRITON_INTERPRET")
    }


def interprets_triton() -> bool:
    """Tell whether Triton interprets kernels on the CPU (``TRITON_INTERPRET=1``)."""
    return os.environ.get("TRITON_INTERPRET") == "1"


def launched() -> tuple[int, int]:
    """Return what ``torchrun`` says: the rank on this machine, and the number of processes; ``(0, 1)`` without it."""
    return int(os.environ.get("LOCAL_RANK") or 0), int(os.environ.get("WORLD_SIZE") or 1)


def requested_backend() -> str:
    """Return the value of ``LORA_NULL_LINEAR_BACKEND``: ``auto``, ``triton``, ``cublas`` or ``torch``."""
    return _one_of("LORA_NULL_LINEAR_BACKEND", LINEAR_BACKENDS)


def requested_covariance_backend(backends: tuple[str, ...]) -> str:
    """Return the value of ``LORA_NULL_COVARIANCE_BACKEND``, ``auto`` or one of ``backends``."""
    return _one_of("LORA_NULL_COVARIANCE_BACKEND", ("auto", *backends))


def _one_of(name: str, values: tuple[str, ...]) -> str:
    value = os.environ.get(name) or "auto"
    if value not in values:
        raise ValueError(f"{name} is {value!r}; expected one of {', '.join(values)}. Unset it for auto.")
    return value


def fall_back(what: str, reason: str, instead: str = "plain torch operations") -> None:
    """Log once per reason that ``what`` uses something slower, or raise with ``LORA_NULL_STRICT=1``."""
    import torch  # here, so that the command line answers --help without it

    message = f"{what} falls back to {instead}: {reason}."
    if switched_on("LORA_NULL_STRICT"):
        raise RuntimeError(f"{message} LORA_NULL_STRICT=1 turns this fallback into an error.")
    if not torch.compiler.is_compiling():
        warn_once(f"fallback: {what}: {reason}", message)

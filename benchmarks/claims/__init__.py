"""One script for each number that a comment of the library quotes: ``python -m benchmarks.claims [NAME ...]``.

A claim is a module of this folder. ``SOURCE`` is the file, ``QUOTE`` the words there that hold the numbers, ``TIMED``
says whether they are times, which only a quiet machine can repeat, and ``measure()`` returns
``{what: (claimed, measured)}``.
"""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from .. import timing

Found = dict[str, tuple[float, float]]


def milliseconds(calls: Mapping[str, Callable[[], Any]], seconds: float = 4.0) -> dict[str, float]:
    """Return the median time of each call, in milliseconds; the calls take turns."""
    timed = {name: timing.Timed(call) for name, call in calls.items()}
    for call in timed.values():
        call()
    samples = timing.interleave(timed, timing.clock("cpu"), seconds=seconds)
    return {name: timing.Times.of(values).median_ms for name, values in samples.items()}


def covariance_errors(T: int, d: int) -> tuple[torch.Tensor, Callable[[torch.Tensor], float]]:
    """Return random ``x (T, d)``, and a function of C that says how far its lower triangle is from the fp64 sum."""
    x = torch.randn(T, d, generator=torch.Generator().manual_seed(0))
    truth = (x.double().T @ x.double()).tril()
    return x, lambda C: float((C.double().tril() - truth).norm() / truth.norm())


def compiled_with(**constants: str) -> ModuleType:
    """Compile the C++ sources with other values of some ``constexpr int64_t`` constants; takes a minute or two."""
    from lora_null.system import extension

    sources = extension.source_folder()
    assert sources is not None
    with tempfile.TemporaryDirectory() as folder:
        for path in sources.iterdir():
            shutil.copy(path, folder)
        code = Path(folder, "covariance.cpp")
        for name, value in constants.items():
            text = code.read_text()
            before, _, rest = text.partition(f" {name} = ")
            assert rest, f"covariance.cpp defines no {name}"
            end = min(rest.index(mark) for mark in (",", ";") if mark in rest)
            code.write_text(f"{before} {name} = {value}{rest[end:]}")
        return extension.build(Path(folder))

"""What this installation is made of, and what will be used on this machine."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
from collections.abc import Iterator

import torch

from ..ops import covariance_backend, explain
from ..system import extension
from ..system.environment import cache_folder, settings, switched_on
from ..system.version import __version__

PACKAGES = ("torch", "triton", "transformers", "peft", "safetensors", "accelerate", "trl", "bitsandbytes")
# A layer of a 1B model under a training batch: what is chosen for it is what most users get.
SHAPE = {"tokens": 2048, "d": 2048, "m": 2048, "r": 32}


def examine() -> Iterator[tuple[str, str]]:
    """Yield names and findings: versions, compiler, extension, devices, cache, variables, and what is chosen."""
    yield "lora_null", f"{__version__}, Python {platform.python_version()}"
    for package in PACKAGES:
        yield package, _version(package)
    compiler = next(filter(None, map(shutil.which, ("c++", "g++", "clang++"))), None)
    yield "compiler", compiler or "none: what is not compiled ahead goes through plain torch"
    folder = cache_folder()
    yield "cache", f"{folder}{'' if folder.exists() else ' (not made yet)'}"
    yield "extension", _extension()
    yield "processor", f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        memory = properties.total_memory / 2**30
        yield f"cuda:{index}", f"{properties.name}, sm_{properties.major}{properties.minor}, {memory:.0f} GiB"
    if not torch.cuda.device_count():
        yield "cuda", "no device" if torch.version.cuda else "torch was built without it"
    yield from settings().items()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        name = str(dtype).removeprefix("torch.")
        x = torch.empty(SHAPE["tokens"], SHAPE["d"], dtype=dtype, device=device)
        weight = torch.empty(SHAPE["m"], SHAPE["d"], dtype=dtype, device=device)
        A, B = (torch.empty(shape, device=device) for shape in ((SHAPE["r"], SHAPE["d"]), (SHAPE["m"], SHAPE["r"])))
        yield f"covariance, {name}", covariance_backend(x)
        yield f"linear, {name}", explain(x, weight, A, B)


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension() -> str:
    if switched_on("LORA_NULL_NO_EXTENSION"):
        return "switched off by LORA_NULL_NO_EXTENSION"
    # compiled now if need be: whether that succeeds is what is asked here
    module = extension.load()
    return f"ready: {module.__file__}" if module else "none: it could not be built, see the warning"

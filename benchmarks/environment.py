"""The conditions of a measurement: device, clocks, versions, threads, commit."""

from __future__ import annotations

import importlib.metadata
import platform
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
# What is measured; a change elsewhere makes no new measurement.
LIBRARY = ("lora_null", "kernels", "csrc")
_PACKAGES = ("triton", "transformers", "peft", "scipy", "liger-kernel", "unsloth", "axolotl")


def _output(*command: str) -> str | None:
    if shutil.which(command[0]) is None:
        return None
    try:
        result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=20)
    except (subprocess.TimeoutExpired, OSError):
        return None
    return result.stdout.strip() if result.returncode == 0 else None


def commit() -> str | None:
    """Return the last commit that touched the library, marked where its files differ from it."""
    head = _output("git", "log", "-1", "--format=%h", "--abbrev=12", "--", *LIBRARY)
    if not head:
        return None
    changed = _output("git", "status", "--porcelain", "--untracked-files=no", "--", *LIBRARY)
    return f"{head}+changes" if changed else head


def cpu_name() -> str:
    """Return the processor's own name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


@cache
def describe(device: str) -> dict:
    """Return what stays the same during a run, as JSON values."""
    versions = {}
    for package in _PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    name = torch.cuda.get_device_name() if device == "cuda" else f"{cpu_name()}, {torch.get_num_threads()} threads"
    found: dict[str, Any] = {
        "device": name,
        "threads": torch.get_num_threads(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        **versions,
        "commit": commit(),
    }
    if device == "cuda":
        found["cuda"] = torch.version.cuda
        found["capability"] = list(torch.cuda.get_device_capability())
    return found


def clocks(device: str) -> dict:
    """Read the clocks, without ever setting them: MHz, and on a GPU also watts and degrees."""
    if device == "cuda":
        fields = "clocks.sm,clocks.mem,power.draw,temperature.gpu"
        # the number that torch counts by is another one where CUDA_VISIBLE_DEVICES hides or reorders devices
        index = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
        line = _output("nvidia-smi", f"--query-gpu={fields}", "--format=csv,noheader,nounits", "-i", index)
        if line is None:
            return {}
        try:
            values = [float(value) for value in line.split(",")]
        except ValueError:
            return {}
        return dict(zip(("sm_mhz", "memory_mhz", "watts", "celsius"), values, strict=True))
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return {}
    mhz = [float(line.split(":")[1]) for line in lines if line.startswith("cpu MHz")]
    return {"cpu_mhz": round(sum(mhz) / len(mhz), 1)} if mhz else {}

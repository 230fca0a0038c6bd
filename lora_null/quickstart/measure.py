"""Wall-clock time and peak memory of the stages of a run."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch


@dataclass
class Stage:
    """What one stage took.

    Attributes:
        name: What was done.
        seconds: Wall-clock time.
        peak_bytes: Highest memory in use during the stage: of the process on a CPU, of the allocator on CUDA.
            None where the system does not tell.
    """

    name: str
    seconds: float = 0.0
    peak_bytes: int | None = None


class Stages:
    """Times stages one after the other.

    Args:
        device: Where the work is done; decides which memory is measured.
    """

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.device = device
        self.done: list[Stage] = []

    @contextmanager
    def stage(self, name: str) -> Iterator[Stage]:
        """Measure the block; it is recorded when it ends without an error."""
        stage = Stage(name)
        self._reset()
        start = time.perf_counter()
        yield stage
        if self.cuda:
            torch.cuda.synchronize(self.device)
        stage.seconds = time.perf_counter() - start
        stage.peak_bytes = torch.cuda.max_memory_allocated(self.device) if self.cuda else peak_resident_bytes()
        self.done.append(stage)

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            reset_peak_resident()


def reset_peak_resident() -> bool:
    """Start a new peak of the resident memory; False where the system cannot, so that peaks only grow."""
    try:
        # Linux: writing 5 resets VmHWM, and nothing else (proc_pid_clear_refs, man page proc(5)).
        with open("/proc/self/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        return False
    return True


def peak_resident_bytes() -> int | None:
    """Return the highest resident memory of this process since the last reset, in bytes."""
    try:
        with open("/proc/self/status") as file:
            found = re.search(r"VmHWM:\s+(\d+) kB", file.read())
        if found:
            return int(found.group(1)) * 1024
    except OSError:
        pass
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024

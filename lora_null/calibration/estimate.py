"""What a calibration would take, before it is run: memory, time, and the size of its file."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from ..config import LoraNullConfig
from ..models.modes import evaluating
from ..models.wrappers import uncompiled
from .calibrate import run
from .job import Job, log_plan
from .memory import MemoryPlan, readable
from .memory_plan import plan_for
from .options import Options


@dataclass(frozen=True)
class Estimate:
    """What a calibration would take.

    Attributes:
        plan: The memory.
        tokens: How many tokens count.
        seconds: Measured on one batch, and extrapolated by the number of positions, padding included.
        measured: Positions of that batch.
        file_size: Bytes of the covariance file, its header aside.
    """

    plan: MemoryPlan
    tokens: int
    seconds: float
    measured: int
    file_size: int

    def __str__(self) -> str:
        lines = [
            str(self.plan),
            f"Tokens: {self.tokens:,}",
            f"Time: about {_duration(self.seconds)}, extrapolated from one batch of {self.measured:,} positions",
            f"File: {readable(self.file_size)}",
        ]
        return "\n".join(lines)


def estimate(model: nn.Module, batches: Sequence[Any], config: LoraNullConfig, options: Options) -> Estimate:
    """Plan the calibration of ``model`` on ``batches``, and time it on the largest of them; nothing is written.

    The time holds what is done once per run, too, so that it errs on the long side.

    Raises:
        ValueError: What :func:`lora_null.calibrate` would refuse before its run, a plan that does not fit among it.
    """
    # No checkpoint for the batch that is timed; the plan says what one would change.
    timed = replace(options, checkpoint=None, progress=False, shard=False)
    job, trial = (Job.of(uncompiled(model), config, each) for each in (options, timed))
    read = [job.reader.read(item, index) for index, item in enumerate(batches)]
    largest = max(range(len(read)), key=lambda index: read[index].positions if read[index].tokens else 0)
    measured, positions = read[largest].positions, sum(batch.positions for batch in read)
    with evaluating(job.model):
        plan, seen = plan_for(job, read, tokens=positions)
        log_plan(plan, options.memory_limit)
        # the first run sets up what stays: kernels, workspaces, what transformers keeps on first use
        for _ in range(2):
            start = time.perf_counter()
            run(trial, [batches[largest]])
            seconds = time.perf_counter() - start
    numbers = sum(each.d * (each.d + 1) // 2 for each in seen.inputs.values())
    return Estimate(
        plan,
        tokens=sum(batch.tokens for batch in read),
        seconds=seconds * positions / max(1, measured),
        measured=measured,
        file_size=numbers * options.placement(queue=False).dtype.itemsize,
    )


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.1f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"

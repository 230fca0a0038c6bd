"""Passes of the model over the data: one for all layers, one per layer, or the caller's own."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.identity import digest_of, weights_key
from ..system.distributed import rank_and_size
from ..system.log import logger
from .batches import Batch, BatchReader, probe, to_device
from .checkpoint import Checkpoint
from .collector import Collector
from .memory import MemoryPlan, Observation, observe


@dataclass
class Job:
    """What all passes need.

    Attributes:
        flush_every: Queues are emptied after so many batches. The order of additions, and so every bit of the result,
            then depends on the data alone, not on whether checkpoints are written.
    """

    model: nn.Module
    reader: BatchReader
    collector: Collector
    inputs_to: torch.device | None
    flush_every: int
    progress: bool

    @contextmanager
    def bar(self, total: int | None, initial: int = 0, unit: str = "batch") -> Iterator[Callable[[int], None]]:
        """Show progress, on the first process only; yields ``advance(tokens)``."""
        silent = not self.progress or rank_and_size()[0] > 0
        start, tokens = time.perf_counter(), 0
        with tqdm(total=total, initial=initial, desc="calibrate", unit=unit, disable=silent) as bar:

            def advance(count: int) -> None:
                nonlocal tokens
                tokens += count
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
                bar.update()

            yield advance

    def end_batch(self, index: int) -> bool:
        """Check the batch; True if the queues were emptied after it."""
        self.collector.end()
        if (index + 1) % self.flush_every:
            return False
        self.collector.accumulator.flush()
        return True


@dataclass(frozen=True)
class Settings:
    """Where a run keeps things, and the options that its checkpoint's key names."""

    checkpoint: Path | None
    offload: str | None
    memory_limit: int | None
    options: Mapping[str, str]


@dataclass(frozen=True)
class Sums:
    """Full symmetric matrices, members and tokens by group key, and the fingerprint of the data."""

    matrices: Mapping[str, Tensor]
    groups: Mapping[str, Sequence[str]]
    tokens: Mapping[str, int]
    data: str


def wants_queue(batches: Sequence[Batch], queue_tokens: int) -> bool:
    """Tell whether any of the batches is too small for a launch of its own."""
    return any(batch.shape is None or 2 * batch.shape[0] * batch.shape[1] < queue_tokens for batch in batches)


def _observe(job: Job, batch: Batch) -> Observation:
    inputs = to_device(probe(batch.inputs), job.inputs_to)
    return observe(job.model, inputs, job.collector.linears, job.collector.shared.share)


def _log_plan(plan: MemoryPlan, limit: int | None, refuse: bool = True) -> None:
    logger.info("%s", plan)
    if refuse:
        plan.check(
            limit,
            "Pass low_memory=True to keep one decoder layer's covariances at a time, with a checkpoint to keep the "
            'finished ones on disk, or offload="cpu" to keep all of them in CPU memory, or fewer target_modules.',
        )


def _open(path: Path, job: Job, options: Mapping[str, str]) -> Checkpoint:
    rank, size = rank_and_size()
    key = {
        "model": weights_key(job.model),
        "targets": digest_of(job.collector.linears),
        **options,
        "process": f"{rank} of {size}",
    }
    return Checkpoint(path if size == 1 else path.with_name(f"{path.name}.rank{rank}"), key)

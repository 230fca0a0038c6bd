"""What the three ways to calibrate share: model, reader of batches, progress bar, plan in the log, checkpoint."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import LoraNullConfig
from ..models.identity import digest_of, weights_key
from ..models.modes import input_device
from ..models.targets import output_head_names, target_linears
from ..system.distributed import rank_and_size
from ..system.log import logger
from .batches import Batch, BatchReader, first_tokens, to_device
from .checkpoint import Checkpoint
from .collector import Collector
from .memory import MemoryPlan
from .options import Options
from .probe import Probe, probe
from .sides import Sides


@dataclass(frozen=True)
class Job:
    """One calibration.

    Attributes:
        linears: The target layers by name, in the order of the model.
        inputs_to: Device of the model's inputs; ``None``: hooks move them.
    """

    model: nn.Module
    linears: Mapping[str, nn.Linear]
    options: Options
    reader: BatchReader
    inputs_to: torch.device | None

    @classmethod
    def of(cls, model: nn.Module, config: LoraNullConfig, options: Options) -> Job:
        """Find the target layers of ``model``; ValueError if there are none."""
        linears = target_linears(model, config)
        reader = BatchReader(model, options.mask, needs_head=bool(output_head_names(model) & set(linears)))
        return cls(model, linears, options, reader, input_device(model))

    def collector(self, batches: Sequence[Batch] | None) -> Collector:
        """Return an empty collector, with queues if any of ``batches`` needs one; ``None``: they are not known."""
        queue = batches is None or wants_queue(batches, self.options.queue_tokens)
        return Collector(
            self.linears,
            Sides(self.model, self.linears, masked=self.options.mask != "none"),
            self.options.placement(queue),
            share_inputs=self.options.share_inputs,
            flush_every=self.options.checkpoint_every,
        )

    def probe(self, batch: Batch) -> Probe:
        """Run a few tokens of ``batch``."""
        inputs = to_device(first_tokens(batch.inputs), self.inputs_to)
        return probe(self.model, inputs, self.linears, self.options.share_inputs)

    def run(self, batch: Batch) -> None:
        """Run the model on ``batch``, unless none of its tokens counts."""
        if batch.tokens:
            self.model(**to_device(batch.inputs, self.inputs_to))

    @contextmanager
    def bar(self, total: int | None, initial: int = 0, unit: str = "batch") -> Iterator[Callable[[int], None]]:
        """Show progress, on the first process only; yields ``advance(tokens)``."""
        silent = not self.options.progress or rank_and_size()[0] > 0
        start, tokens = time.perf_counter(), 0
        with tqdm(total=total, initial=initial, desc="calibrate", unit=unit, disable=silent) as bar:

            def advance(count: int) -> None:
                nonlocal tokens
                tokens += count
                bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):,.0f} tokens/s", refresh=False)
                bar.update()

            yield advance

    @contextmanager
    def checkpoint(self, **also: str) -> Iterator[Checkpoint | None]:
        """Hold this process's checkpoint, if one is wanted; ``also`` must be equal too for the sums to be continued."""
        path = self.options.checkpoint_path
        if path is None:
            yield None
            return
        rank, size = rank_and_size()
        key = {
            "model": weights_key(self.model),
            "targets": digest_of(self.linears),
            **self.options.key(),
            **also,
            "process": f"{rank} of {size}",
        }
        checkpoint = Checkpoint(path if size == 1 else path.with_name(f"{path.name}.rank{rank}"), key)
        with checkpoint.locked():
            yield checkpoint


@dataclass(frozen=True)
class Sums:
    """What a calibration gives.

    Attributes:
        matrices: Full symmetric matrices by group key.
        groups: Members by group key.
        tokens: Tokens by group key.
        data: Fingerprint of the data.
        left_out: Target layers that compute something else than ``x W^T``, and what.
    """

    matrices: Mapping[str, Tensor]
    groups: Mapping[str, Sequence[str]]
    tokens: Mapping[str, int]
    data: str
    left_out: Mapping[str, str]


def wants_queue(batches: Sequence[Batch], queue_tokens: int) -> bool:
    """Tell whether any of the batches is too small for a launch of its own."""
    return any(batch.shape is None or 2 * batch.positions < queue_tokens for batch in batches)


def log_plan(plan: MemoryPlan, limit: int | None, refuse: bool = True) -> None:
    """Log the plan; ``refuse``: raise ValueError if it does not fit."""
    logger.info("%s", plan)
    if refuse:
        plan.check(
            limit,
            "Pass low_memory=True to keep one decoder layer's covariances at a time, with a checkpoint to keep the "
            'finished ones on disk, or offload="cpu" to keep all of them in CPU memory, or fewer target_modules.',
        )

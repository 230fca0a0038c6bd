"""Calibrate in one pass of the model over the data, with all sums at the same time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain
from typing import Any

import torch

from ..models.identity import digest_of
from ..system.distributed import exchange
from .batches import Batch, DataFingerprint
from .checkpoint import Checkpoint
from .collector import Collector, combined
from .job import Job, Sums, log_plan
from .memory import plan_streaming


def run_streaming(job: Job, source: Iterable[Any], total: int | None) -> Sums:
    """Run the model once over the batches of ``source``, of which there are ``total`` if that is known."""
    batches = (job.reader.read(item, index) for index, item in enumerate(source))
    head, first = _first_counted(batches)
    collector = job.collector(first)
    with ExitStack() as stack:
        checkpoint, devices = None, {}
        if first:
            devices = _plan(job, collector, first[0])
            checkpoint = stack.enter_context(job.checkpoint())
        record = _Record(collector, checkpoint, devices)
        advance = stack.enter_context(job.bar(total, initial=record.done))
        stack.enter_context(collector.watching(job.linears))
        for index, batch in enumerate(chain(head, batches)):
            if record.holds(batch):
                continue
            collector.begin(index, batch.masks, batch.weight)
            job.run(batch)
            if collector.end():
                record.save(finished=False)
            advance(batch.tokens)
        record.finish()
    return Sums(*combined(collector), data=digest_of(exchange(str(record.data))), left_out=collector.left_out)


def _first_counted(batches: Iterator[Batch]) -> tuple[list[Batch], list[Batch]]:
    """Read up to the first batch of which a token counts: an empty text shows nothing of the model.

    Returns:
        What was read, and that batch; none where a process has got no such batch.
    """
    head = []
    for batch in batches:
        head.append(batch)
        if batch.tokens:
            return head, [batch]
    return head, []


def _plan(job: Job, collector: Collector, first: Batch) -> dict[str, torch.device]:
    """Refuse a plan that does not fit; return the device of the sum to which each target layer may belong."""
    seen, placement = job.probe(first), collector.placement
    collector.left_out.update(seen.left_out)
    log_plan(plan_streaming(seen, placement), job.options.memory_limit)
    home = placement.store or placement.compute
    return {name: home or seen.inputs[key].device for key, names in seen.groups.items() for name in names}


class _Record:
    """Which batches are in the sums, in memory and in the checkpoint, which is read here.

    Attributes:
        done: How many batches the checkpoint's sums hold.
        data: Fingerprint of the batches met so far.
    """

    def __init__(self, collector: Collector, checkpoint: Checkpoint | None, devices: Mapping[str, torch.device]):
        self.collector, self.checkpoint = collector, checkpoint
        self.data, self.count = DataFingerprint(), 0
        loaded = checkpoint.load(collector.widths) if checkpoint else None
        self.saved = loaded[0] if loaded else None
        self.done = self.saved.batches if self.saved else 0
        if checkpoint and loaded:
            if not self.done or set(loaded[0].calls) != set(loaded[0].groups):
                raise checkpoint.damaged(f"its sums are of {self.done} batches and calls of other layers")
            collector.restore(*loaded, devices)

    def holds(self, batch: Batch) -> bool:
        """Take a batch into account; True if the sums held it when they were read."""
        self.count += 1
        self.data.add(batch)
        if self.checkpoint and self.saved:
            if self.count == self.done:
                # the saved sums are divided by it
                self.collector.weight = batch.weight
                self.checkpoint.refuse_other({"data": self.saved.data}, {"data": str(self.data)})
            if self.count > self.done and self.saved.finished:
                self.checkpoint.refuse_other({"batches": str(self.done)}, {"batches": f"more than {self.done}"})
        return self.count <= self.done

    def save(self, finished: bool) -> None:
        """Write the flushed sums."""
        if self.checkpoint:
            state = self.collector.progress()
            state = replace(state, batches=self.count, data=str(self.data), finished=finished)
            self.checkpoint.save(state, self.collector.matrices())

    def finish(self) -> None:
        """Flush and save at the end of the data; refuse data that end before the checkpoint does."""
        if self.checkpoint and self.count < self.done:
            self.checkpoint.refuse_other({"batches": f"at least {self.done}"}, {"batches": str(self.count)})
        if not (self.saved and self.saved.finished):
            self.collector.flush()
            self.save(finished=True)

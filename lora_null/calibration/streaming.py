"""Calibrate in one pass of the model over the data."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import replace
from itertools import chain, islice
from typing import Any

import torch

from ..covariances.packed import DenseMatrices
from ..models.identity import digest_of
from ..system.distributed import exchange
from .batches import Batch, DataFingerprint, to_device
from .checkpoint import Checkpoint
from .collector import combined
from .job import Job, Settings, Sums, _log_plan, _observe, _open, wants_queue
from .memory import plan_streaming
from .shared_inputs import watching


def run_streaming(job: Job, source: Iterable[Any], total: int | None, settings: Settings) -> Sums:
    """Run all batches once, with all sums at the same time."""
    items = iter(source)
    first = [job.reader.read(item, 0) for item in islice(items, 1)]
    linears, accumulator = job.collector.linears, job.collector.accumulator
    with ExitStack() as stack:
        checkpoint, device_of = None, {}
        # a process may have got no batch at all
        if first:
            seen = _observe(job, first[0])
            placement = replace(accumulator.placement, queue=wants_queue(first, accumulator.placement.queue_tokens))
            accumulator.placement = placement
            _log_plan(plan_streaming(seen, placement), settings.memory_limit)
            for key, names in seen.groups.items():
                where = placement.store or placement.compute or seen.inputs[key].device
                device_of.update(dict.fromkeys(names, where))
            if settings.checkpoint is not None:
                checkpoint = _open(settings.checkpoint, job, settings.options)
                stack.enter_context(checkpoint.locked())
        rest = (job.reader.read(item, index) for index, item in enumerate(items, 1))
        with watching(linears, job.collector.receive):
            data = stream(job, chain(first, rest), total, checkpoint, device_of)
    return Sums(*combined(job.collector), data=digest_of(exchange(data)))


def stream(
    job: Job,
    batches: Iterable[Batch],
    total: int | None,
    checkpoint: Checkpoint | None,
    device_of: Mapping[str, torch.device],
) -> str:
    """Run the model once over all batches; returns the fingerprint of the data."""
    data = DataFingerprint()
    resumed = checkpoint.load() if checkpoint else None
    done = resumed[0].batches if resumed else 0
    if resumed:
        job.collector.restore(*resumed, device_of)
    count = 0

    def save(finished: bool) -> None:
        if checkpoint:
            state = replace(job.collector.progress(), batches=count, data=str(data), finished=finished)
            matrices = {key: entry.matrix for key, entry in job.collector.accumulator.sums.items()}
            checkpoint.save(state, DenseMatrices(matrices))

    with job.bar(total, initial=done) as advance:
        for batch in batches:
            index, count = count, count + 1
            data.add(batch)
            if count <= done:
                if count == done and checkpoint and resumed:
                    checkpoint.refuse_other({"data": resumed[0].data}, {"data": str(data)})
                continue
            if checkpoint and resumed and resumed[0].finished:
                checkpoint.refuse_other({"batches": str(done)}, {"batches": f"more than {done}"})
            if batch.tokens:
                job.collector.begin(index, batch.mask)
                job.model(**to_device(batch.inputs, job.inputs_to))
            if job.end_batch(index):
                save(finished=False)
            advance(batch.tokens)
    if checkpoint and count < done:
        checkpoint.refuse_other({"batches": f"at least {done}"}, {"batches": str(count)})
    if not (resumed and resumed[0].finished):
        job.collector.accumulator.flush()
        save(finished=True)
    return str(data)

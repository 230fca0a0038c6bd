"""The three ways to calibrate: one pass, one pass per layer, or the caller's own loop."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ._accumulate import Placement
from ._batches import Batch, DataFingerprint, probe, to_device
from ._checkpoint import Checkpoint, digest_of, weights_key
from ._collect import combined
from ._layerwise import LayerWalk, decoder_layers, split_by_layer
from ._logging import logger
from ._memory_plan import MemoryPlan, Observation, observe, plan_layerwise, plan_streaming, unobserved
from ._observe import watching
from ._passes import Job, run_callback, stream, walk
from ._storage import PackedMemory
from .distributed import exchange, rank_and_size


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


def run_function(job: Job, run_model: Callable[[], Any], memory_limit: int | None) -> Sums:
    """Sum over the calls of the model that ``run_model()`` makes."""
    linears, placement = job.collector.linears, job.collector.accumulator.placement
    # Which layers share an input is not known before the first call, so this is the most that can be needed: a
    # reason to refuse only what the caller has forbidden.
    _log_plan(plan_streaming(unobserved(linears), placement), memory_limit, refuse=memory_limit is not None)
    with watching(linears, job.collector.receive):
        run_callback(job, run_model)
    return Sums(*combined(job.collector), data="function")


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


def run_layerwise(job: Job, source: Iterable[Any], settings: Settings) -> Sums:
    """Run one pass per decoder layer, with that layer's sums only."""
    batches = [job.reader.read(item, index) for index, item in enumerate(source)]
    linears, accumulator = job.collector.linears, job.collector.accumulator
    placement = replace(accumulator.placement, queue=wants_queue(batches, accumulator.placement.queue_tokens))
    accumulator.placement = placement
    name, layers = decoder_layers(job.model, linears)
    linears_of, outside = split_by_layer(linears, name, len(layers))
    if batches:
        sizes = [batch.shape[0] * batch.shape[1] if batch.shape else batch.tokens for batch in batches]
        plan = plan_walk(
            job.model,
            linears,
            _observe(job, batches[0]),
            placement,
            settings.offload,
            tokens=sum(sizes),
            largest_batch=max(sizes),
            on_disk=settings.checkpoint is not None,
        )
        _log_plan(plan, settings.memory_limit)
    fingerprint = DataFingerprint()
    for batch in batches:
        fingerprint.add(batch)
    layer_walk = LayerWalk(
        job.model,
        layers,
        batches,
        inputs_to=job.inputs_to,
        compute=placement.compute,
        keep=torch.device("cpu") if settings.offload == "cpu" else None,
    )
    with ExitStack() as stack:
        checkpoint = None
        if settings.checkpoint is not None:
            checkpoint = _open(settings.checkpoint, job, {**settings.options, "data": str(fingerprint)})
            stack.enter_context(checkpoint.locked())
        done = walk(job, layer_walk, linears_of, outside, checkpoint)
    matrices = PackedMemory(done.triangles, placement.dtype)
    return Sums(matrices, done.groups, done.tokens, digest_of(exchange(str(fingerprint))))


def plan_walk(
    model: nn.Module,
    linears: Mapping[str, nn.Linear],
    seen: Observation,
    placement: Placement,
    offload: str | None,
    *,
    tokens: int,
    largest_batch: int,
    on_disk: bool,
) -> MemoryPlan:
    """Plan :func:`run_layerwise` for ``tokens`` tokens in all, of which ``largest_batch`` in one batch."""
    name, layers = decoder_layers(model, linears)
    keys = [[key for key in seen.groups if key.startswith(f"{name}.{i}.")] for i in range(len(layers))]
    entering = seen.inputs[next(key for layer in keys for key in layer)]
    hidden_device = torch.device("cpu") if offload == "cpu" else placement.compute or entering.device
    return plan_layerwise(
        seen,
        placement,
        keys,
        layers,
        moves_weights=placement.compute is not None,
        hidden_bytes=tokens * entering.d * entering.dtype.itemsize,
        hidden_device=hidden_device,
        largest_batch=largest_batch,
        on_disk=on_disk,
    )


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

"""Passes of the model over the data: one for all layers, one per layer, or the caller's own."""

from __future__ import annotations

import inspect
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._batches import Batch, BatchReader, DataFingerprint, to_device
from ._checkpoint import Checkpoint, Progress
from ._collect import Collector, combined
from ._layerwise import LayerWalk
from ._observe import watching
from ._storage import DenseMatrices, PackedMatrices, PackedMemory, pack_lower
from .distributed import exchange, rank_and_size


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


def run_callback(job: Job, run_model: Callable[[], Any]) -> None:
    """Let the caller run the model; each outermost call of it, or of its base model, is one batch."""
    model, depth, index = job.model, 0, 0
    roots = list(dict.fromkeys([model, getattr(model, "base_model", model)]))
    signatures = {root: inspect.signature(root.forward) for root in roots}

    with job.bar(None) as advance:
        tokens = 0

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal depth, tokens
            depth += 1
            if depth == 1:
                bound = signatures[module].bind_partial(*args, **kwargs).arguments
                inputs = {**bound, **bound.get("kwargs", {})}
                job.reader.check_ids(inputs, index)
                job.collector.begin(index, job.reader.mask(inputs, index))
                ids = next((value for value in inputs.values() if isinstance(value, Tensor)), None)
                tokens = 0 if ids is None else ids.shape[:2].numel()

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            nonlocal depth, index
            depth -= 1
            if depth == 0:
                # output is None when the forward raised; its error is on its way already
                if output is not None:
                    job.end_batch(index)
                    advance(tokens)
                index += 1

        handles = []
        try:
            for root in roots:
                handles.append(root.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(root.register_forward_hook(after, always_call=True))
            run_model()
        finally:
            for handle in handles:
                handle.remove()
    job.collector.accumulator.flush()


@dataclass
class Finished:
    """The covariances of finished layers: packed triangles on the CPU, groups and tokens by key."""

    triangles: dict[str, Tensor] = field(default_factory=dict)
    groups: dict[str, list[str]] = field(default_factory=dict)
    tokens: dict[str, int] = field(default_factory=dict)

    def add(self, state: Progress, matrices: PackedMatrices) -> None:
        """Take over a layer. Triangles of a file are views of the mapped file, without memory of their own."""
        self.triangles.update({name: matrices.packed(name) for name in matrices})
        self.groups.update(state.groups)
        self.tokens.update(state.tokens)


def walk(
    job: Job,
    walk: LayerWalk,
    linears_of: Sequence[Mapping[str, nn.Linear]],
    outside: Mapping[str, nn.Linear],
    checkpoint: Checkpoint | None,
) -> Finished:
    """Run the model layer by layer.

    Args:
        job: The collector's sums are of one layer at a time.
        walk: Carries the hidden states.
        linears_of: The target linears of each layer.
        outside: Target linears elsewhere in the model; they are summed in the last layer's pass.
        checkpoint: Each finished layer is written once, to ``<checkpoint>.<layer>``; ``None``: not at all.
    """
    count = len(walk.layers)
    parts = [checkpoint.part(number) if checkpoint else None for number in range(count)]
    saved = [part.load() if part else None for part in parts]
    # A process may have been killed when others had finished a layer more: continue where all of them are.
    done = min(exchange(next((number for number, part in enumerate(saved) if part is None), count)))
    finished = Finished()
    for part in saved[:done]:
        assert part is not None
        finished.add(*part)
    with job.bar(count * len(walk.batches), unit="layer batch") as advance:
        # Finished layers run once more, without sums, for the hidden states that enter the next one.
        for number in range(count) if done < count else ():
            last = number == count - 1
            watched = {} if number < done else {**linears_of[number], **(outside if last else {})}
            with walk.prepared(number), watching(watched, job.collector.receive):
                for index, batch in enumerate(walk.batches):
                    if batch.tokens:
                        job.collector.begin(index, batch.mask)
                        walk.run(number, index, to_the_end=last and bool(outside))
                    job.end_batch(index)
                    advance(batch.tokens)
            if number >= done:
                _finish_layer(job.collector, parts[number], finished)
    return finished


def _finish_layer(collector: Collector, part: Checkpoint | None, finished: Finished) -> None:
    # a function of its own, so that no variable keeps this layer's matrices while the next one fills its own
    collector.accumulator.flush()
    state = collector.progress()
    matrices, state.groups, state.tokens = combined(collector)
    triangles = {name: pack_lower(matrices.pop(name)) for name in list(matrices)}
    packed = PackedMemory(triangles, collector.accumulator.placement.dtype)
    collector.forget()
    if part:
        part.save(state, packed)
    loaded = part.load() if part else None
    finished.add(*(loaded or (state, packed)))

"""Calibrate one decoder layer at a time, so that only its weights and sums need the accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from ..covariances.packed import PackedMatrices, PackedMemory, pack_lower
from ..models.identity import digest_of
from ..system.distributed import exchange
from .accumulator import Placement
from .batches import Batch, DataFingerprint
from .checkpoint import Checkpoint, Progress
from .collector import Collector, combined
from .job import Job, Sums, log_plan
from .memory import MemoryPlan, plan_layerwise
from .probe import Probe
from .walk import LayerWalk, decoder_layers, split_by_layer


def run_layerwise(job: Job, source: Iterable[Any]) -> Sums:
    """Run one pass per decoder layer over the batches of ``source``, with that layer's sums only."""
    batches, collector, data = read_all(job, source)
    counted = [batch for batch in batches if batch.tokens]
    options = job.options
    name, layers = decoder_layers(job.model, job.linears)
    if counted:
        sizes = [batch.positions for batch in batches]
        seen = job.probe(counted[0])
        collector.left_out.update(seen.left_out)
        plan = plan_walk(job, seen, collector.placement, tokens=sum(sizes), largest_batch=max(sizes))
        log_plan(plan, options.memory_limit)
    linears_of, outside = split_by_layer(job.linears, name, len(layers))
    walk = LayerWalk(
        job.model,
        layers,
        batches,
        inputs_to=job.inputs_to,
        compute=collector.placement.compute,
        keep=options.hidden_device,
    )
    with (
        job.checkpoint(data=data) as checkpoint,
        job.bar(len(layers) * len(batches), unit="layer batch") as advance,
    ):
        finished = Finished()
        parts = [checkpoint.part(number) if checkpoint else None for number in range(len(layers))]
        done = _read_finished(parts, collector.widths, finished)
        if done < len(layers):
            # Target layers outside of the stack are summed in the last layer's pass.
            watched = [*linears_of[:-1], {**linears_of[-1], **outside}]

            def finish(number: int) -> None:
                _finish_layer(collector, parts[number], finished)

            walk_layers(walk, collector, watched, finish, done=done, to_the_end=bool(outside), advance=advance)
    matrices = PackedMemory(finished.triangles, collector.placement.dtype)
    return Sums(matrices, finished.groups, finished.tokens, digest_of(exchange(data)), collector.left_out)


def read_all(job: Job, source: Iterable[Any]) -> tuple[list[Batch], Collector, str]:
    """Return all batches of ``source``, an empty collector for them, and their fingerprint."""
    batches = [job.reader.read(item, index) for index, item in enumerate(source)]
    data = DataFingerprint()
    for batch in batches:
        data.add(batch)
    # an empty text shows nothing of the model
    return batches, job.collector([batch for batch in batches if batch.tokens]), str(data)


def walk_layers(
    walk: LayerWalk,
    collector: Collector,
    linears_of: Sequence[Mapping[str, nn.Linear]],
    finish: Callable[[int], None],
    *,
    done: int,
    advance: Callable[[int], None],
    to_the_end: bool = False,
) -> None:
    """Run one layer after another on all batches, and call ``finish`` when the sums of one are complete.

    Args:
        walk: Carries the hidden states; where it has them already, it begins there.
        collector: Sums the inputs of the layer at work; ``finish`` takes its sums.
        linears_of: What is summed in each layer's pass.
        finish: Called with the number of the layer, whose weights are still in place.
        done: Layers before this one run once more without sums, for the hidden states that enter the next.
        advance: Called with the tokens of every batch.
        to_the_end: The last layer's pass goes on to the end of the model.
    """
    for number in range(walk.start, len(linears_of)):
        with walk.prepared(number):
            with walk.running(number), collector.watching({} if number < done else linears_of[number]):
                for index, batch in enumerate(walk.batches):
                    collector.begin(index, batch.masks, batch.weight)
                    if batch.tokens:
                        walk.run(number, index, to_the_end=to_the_end and number == len(linears_of) - 1)
                    collector.end()
                    advance(batch.tokens)
            if number >= done:
                finish(number)


def plan_walk(job: Job, seen: Probe, placement: Placement, *, tokens: int, largest_batch: int) -> MemoryPlan:
    """Plan :func:`run_layerwise` for ``tokens`` tokens in all, of which ``largest_batch`` in one batch."""
    name, layers = decoder_layers(job.model, job.linears)
    keys = [[key for key in seen.groups if key.startswith(f"{name}.{i}.")] for i in range(len(layers))]
    entering = seen.inputs[next(key for layer in keys for key in layer)]
    return plan_layerwise(
        seen,
        placement,
        keys,
        layers,
        moves_weights=placement.compute is not None,
        hidden_bytes=tokens * entering.d * entering.dtype.itemsize,
        hidden_device=job.options.hidden_device or placement.compute or entering.device,
        largest_batch=largest_batch,
        on_disk=job.options.checkpoint is not None,
    )


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


def _read_finished(parts: Sequence[Checkpoint | None], widths: Mapping[str, int], finished: Finished) -> int:
    """Read the layers that all processes have finished; returns how many there are."""
    saved = [part.load(widths) if part else None for part in parts]
    own = next((number for number, part in enumerate(saved) if part is None), len(parts))
    # A process may have been killed when others had finished a layer more: continue where all of them are.
    done = min(exchange(own))
    for part in saved[:done]:
        assert part is not None
        finished.add(*part)
    return done


def _finish_layer(collector: Collector, part: Checkpoint | None, finished: Finished) -> None:
    # a function of its own, so that no variable keeps this layer's matrices while the next one fills its own
    state, matrices = taken(collector)
    triangles = {name: pack_lower(matrices.pop(name)) for name in list(matrices)}
    packed = PackedMemory(triangles, collector.placement.dtype)
    if part:
        part.save(state, packed)
    loaded = part.load(collector.widths) if part else None
    finished.add(*(loaded or (state, packed)))


def taken(collector: Collector) -> tuple[Progress, dict[str, Tensor]]:
    """Return groups, tokens and full matrices of the sums, of all processes together, and empty the collector."""
    collector.flush()
    state = collector.progress()
    matrices, state.groups, state.tokens = combined(collector)
    collector.forget()
    return state, matrices

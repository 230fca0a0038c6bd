"""Calibrate one decoder layer at a time, so that only its weights and sums need the accelerator."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from ..covariances.packed import PackedMatrices, PackedMemory, pack_lower
from ..models.identity import digest_of
from ..system.distributed import exchange
from .accumulator import Placement
from .batches import DataFingerprint
from .checkpoint import Checkpoint, Progress
from .collector import Collector, combined
from .job import Job, Sums, log_plan
from .memory import MemoryPlan, plan_layerwise
from .probe import Probe
from .walk import LayerWalk, decoder_layers, split_by_layer


def run_layerwise(job: Job, source: Iterable[Any]) -> Sums:
    """Run one pass per decoder layer over the batches of ``source``, with that layer's sums only."""
    batches = [job.reader.read(item, index) for index, item in enumerate(source)]
    # an empty text shows nothing of the model
    counted = [batch for batch in batches if batch.tokens]
    collector, options = job.collector(counted), job.options
    name, layers = decoder_layers(job.model, job.linears)
    if counted:
        sizes = [batch.positions for batch in batches]
        seen = job.probe(counted[0])
        collector.left_out.update(seen.left_out)
        plan = plan_walk(job, seen, collector.placement, tokens=sum(sizes), largest_batch=max(sizes))
        log_plan(plan, options.memory_limit)
    data = DataFingerprint()
    for batch in batches:
        data.add(batch)
    # Target layers outside of the stack are summed in the last layer's pass.
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
        job.checkpoint(data=str(data)) as checkpoint,
        job.bar(len(layers) * len(batches), unit="layer batch") as advance,
    ):
        finished = Finished()
        parts = [checkpoint.part(number) if checkpoint else None for number in range(len(layers))]
        done = _read_finished(parts, collector.widths, finished)
        # Finished layers run once more, without sums, for the hidden states that enter the next one.
        for number in range(len(layers)) if done < len(layers) else ():
            last = number == len(layers) - 1
            watched = {} if number < done else {**linears_of[number], **(outside if last else {})}
            with walk.prepared(number), collector.watching(watched):
                for index, batch in enumerate(batches):
                    collector.begin(index, batch.masks)
                    if batch.tokens:
                        walk.run(number, index, to_the_end=last and bool(outside))
                    collector.end()
                    advance(batch.tokens)
            if number >= done:
                _finish_layer(collector, parts[number], finished)
    matrices = PackedMemory(finished.triangles, collector.placement.dtype)
    return Sums(matrices, finished.groups, finished.tokens, digest_of(exchange(str(data))), collector.left_out)


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
    collector.flush()
    state = collector.progress()
    matrices, state.groups, state.tokens = combined(collector)
    triangles = {name: pack_lower(matrices.pop(name)) for name in list(matrices)}
    packed = PackedMemory(triangles, collector.placement.dtype)
    collector.forget()
    if part:
        part.save(state, packed)
    loaded = part.load(collector.widths) if part else None
    finished.add(*(loaded or (state, packed)))

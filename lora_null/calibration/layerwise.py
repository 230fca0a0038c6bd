"""Calibrate one decoder layer at a time, so that only its weights and sums need the accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..covariances.packed import PackedMatrices, PackedMemory, pack_lower
from ..models.identity import digest_of
from ..system.distributed import exchange
from .accumulator import Placement
from .batches import Batch, DataFingerprint, to_device
from .checkpoint import Checkpoint, Progress
from .collector import Collector, combined
from .job import Job, Settings, Sums, _log_plan, _observe, _open, wants_queue
from .memory import MemoryPlan, Observation, plan_layerwise
from .shared_inputs import watching


class _LayerDone(BaseException):
    """Ends a forward pass once its layer has run; not an Exception, so that no model catches it by accident."""


def decoder_layers(model: nn.Module, linears: Mapping[str, nn.Linear]) -> tuple[str, list[nn.Module]]:
    """Return the name and members of the list of layers that holds most of the target linears.

    Raises:
        ValueError: The model has no ``nn.ModuleList`` with target linears in it, or that list repeats a layer.
    """
    best: tuple[int, str, list[nn.Module]] = (0, "", [])
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList):
            count = sum(linear.startswith(name + ".") for linear in linears)
            # named_modules lists parents first: among equals the outermost list wins
            if count > best[0]:
                best = count, name, list(module)
    if not best[0]:
        raise ValueError(
            f"{type(model).__name__} has no torch.nn.ModuleList that holds target layers, so low_memory=True cannot "
            "walk through it. Expected a stack of decoder layers; calibrate it with low_memory=False."
        )
    if len({id(layer) for layer in best[2]}) < len(best[2]):
        raise ValueError(f"A layer of {best[1]} is used twice; low_memory=True cannot tell its turns apart.")
    return best[1], best[2]


def split_by_layer(
    linears: Mapping[str, nn.Linear], name: str, count: int
) -> tuple[list[dict[str, nn.Linear]], dict[str, nn.Linear]]:
    """Sort the target linears by the ``count`` layers of the list ``name``; the second result are all others."""
    inside = [{n: m for n, m in linears.items() if n.startswith(f"{name}.{i}.")} for i in range(count)]
    taken = {n for layer in inside for n in layer}
    return inside, {n: m for n, m in linears.items() if n not in taken}


class LayerWalk:
    """Hidden states of all batches, carried from layer to layer.

    For each layer and batch the model's own forward runs, with the earlier layers replaced by a pass-through
    that ends in the stored hidden state, and is left as soon as the layer is done. So each layer gets exactly the
    masks, positions and rotary embeddings that the model makes for it, which differ between layers in some models
    (sliding windows), and none of that is stored.

    Args:
        model: The model.
        layers: Its decoder layers, in order of execution.
        batches: All batches.
        compute: Device to which each layer's weights are copied for its turn; ``None``: they stay.
        keep: Device for the hidden states; ``None``: where the layers leave them.
    """

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        batches: Sequence[Batch],
        *,
        inputs_to: torch.device | None,
        compute: torch.device | None,
        keep: torch.device | None,
    ):
        self.model, self.layers, self.batches = model, layers, batches
        self.inputs_to, self.compute, self.keep = inputs_to, compute, keep
        self._hidden: list[Tensor | None] = [None] * len(batches)
        self._rest: list[tuple | None] = [None] * len(layers)

    def run(self, number: int, batch: int, *, to_the_end: bool = False) -> None:
        """Run layer ``number`` on batch ``batch``; ``to_the_end``: and what the model has after it."""
        layer = self.layers[number]
        original = layer.forward

        def work(*args: Any, **kwargs: Any) -> Any:
            output = original(*to_device(args, self.compute), **to_device(kwargs, self.compute))
            hidden, self._rest[number] = _hidden_and_rest(output, number)
            self._hidden[batch] = hidden.detach().to(self.keep or hidden.device)
            if not to_the_end:
                raise _LayerDone
            return to_device(output, _incoming(args, kwargs).device)

        forwards = {earlier: self._passing(k, batch, k == number - 1) for k, earlier in enumerate(self.layers[:number])}
        with replaced_forwards({**forwards, layer: work}):
            try:
                self.model(**to_device(self.batches[batch].inputs, self.inputs_to))
            except _LayerDone:
                pass

    def _passing(self, number: int, batch: int, is_last: bool) -> Callable:
        """Return a forward that stands for layer ``number``; the last one hands out the stored hidden state."""

        def forward(*args: Any, **kwargs: Any) -> Any:
            hidden, rest = _incoming(args, kwargs), self._rest[number]
            if is_last:
                stored = self._hidden[batch]
                assert stored is not None
                hidden = stored.to(hidden.device)
            return hidden if rest is None else (hidden, *rest)

        return forward

    @contextmanager
    def prepared(self, number: int) -> Iterator[None]:
        """Hold the weights of layer ``number`` on the compute device for the length of the block."""
        layer = self.layers[number]
        if self.compute is None:
            yield
            return
        tensors = [*layer.parameters(), *layer.buffers()]
        homes = [tensor.data for tensor in tensors]
        try:
            for tensor in tensors:
                tensor.data = tensor.data.to(self.compute, non_blocking=True)
            yield
        finally:
            # The original memory comes back, not a copy: nothing to transfer, and not a bit can differ.
            for tensor, home in zip(tensors, homes, strict=True):
                tensor.data = home


@contextmanager
def replaced_forwards(forwards: Mapping[nn.Module, Callable]) -> Iterator[None]:
    """Replace ``forward`` of modules for the length of the block, under their hooks."""
    before = {module: module.__dict__.get("forward") for module in forwards}
    try:
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[method-assign]
        yield
    finally:
        for module, own in before.items():
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = own  # type: ignore[method-assign]


def _incoming(args: tuple, kwargs: Mapping[str, Any]) -> Any:
    return args[0] if args else kwargs["hidden_states"]


def _hidden_and_rest(output: Any, number: int) -> tuple[Tensor, tuple | None]:
    """Take a layer's output apart: the hidden state, and what else its tuple holds, if it is one."""
    if isinstance(output, Tensor):
        return output, None
    if isinstance(output, tuple) and output and not any(isinstance(value, Tensor) for value in output[1:]):
        return output[0], output[1:]
    raise ValueError(
        f"Decoder layer {number} returns a {type(output).__name__}; low_memory=True needs layers that pass on one "
        "tensor, the hidden state. Calibrate this model with low_memory=False."
    )


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

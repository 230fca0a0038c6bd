"""Carry the hidden states of all batches from decoder layer to decoder layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .batches import Batch, to_device


class _LayerDone(BaseException):
    """Ends a forward pass once its layer has run; not an Exception, so that no model catches it by accident."""


class HiddenStates(Protocol):
    """Holds a tensor for each batch, by its number."""

    def __getitem__(self, batch: int, /) -> Tensor:
        """Return what enters the layer at work."""

    def __setitem__(self, batch: int, hidden: Tensor, /) -> None:
        """Keep what leaves it."""


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
        hidden: Holds the hidden states by number of the batch; the default is a dictionary.

    Attributes:
        start: The layer to begin with, whose hidden states are there.
        rest: What else the tuples of each layer hold; ``None`` where it returns a tensor.
    """

    start: int = 0

    def __init__(
        self,
        model: nn.Module,
        layers: Sequence[nn.Module],
        batches: Sequence[Batch],
        *,
        inputs_to: torch.device | None,
        compute: torch.device | None,
        keep: torch.device | None,
        hidden: HiddenStates | None = None,
    ):
        self.model, self.layers, self.batches = model, layers, batches
        self.inputs_to, self.compute, self.keep = inputs_to, compute, keep
        self.hidden: HiddenStates = {} if hidden is None else hidden
        self.rest: list[tuple | None] = [None] * len(layers)

    def run(self, number: int, batch: int, *, to_the_end: bool = False) -> None:
        """Run layer ``number`` on batch ``batch``; ``to_the_end``: and what the model has after it."""
        layer = self.layers[number]
        original = layer.forward

        def work(*args: Any, **kwargs: Any) -> Any:
            output = original(*to_device(args, self.compute), **to_device(kwargs, self.compute))
            hidden, self.rest[number] = _hidden_and_rest(output, number)
            self.hidden[batch] = hidden.detach().to(self.keep or hidden.device)
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
            hidden, rest = _incoming(args, kwargs), self.rest[number]
            if is_last:
                hidden = self.hidden[batch].to(hidden.device)
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

    def running(self, number: int) -> AbstractContextManager:
        """Hold what the passes of layer ``number`` need besides its weights."""
        return nullcontext()


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

"""The walk from layer to layer with weights that come from disk, and hidden states that lie there."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.batches import Batch
from ..calibration.walk import LayerWalk, replaced_forwards
from ..models.shards import DiskWeights
from .hidden import HiddenFiles


class DiskWalk(LayerWalk):
    """A :class:`~lora_null.calibration.walk.LayerWalk` over a model whose parameters lie on the device meta.

    A layer's weights are read for its turn, from the system's cache: it reads them while the layer before is at work.
    What the model runs before its layers (embeddings, above all) is read when
    it is called, and dropped before the layer's null spaces are solved; from the second layer on the input embedding
    is not read any more, since the stored hidden states replace all that is made of it.

    Args:
        model: The model.
        name: Of its list of layers.
        layers: Those to walk over, in order of execution.
        batches: All batches.
        weights: The model's weights.
        hidden: Holds the hidden states.
    """

    def __init__(
        self,
        model: nn.Module,
        name: str,
        layers: Sequence[nn.Module],
        batches: Sequence[Batch],
        weights: DiskWeights,
        hidden: HiddenFiles,
    ):
        super().__init__(
            model,
            layers,
            batches,
            inputs_to=weights.device,
            compute=None,
            keep=torch.device("cpu"),
            hidden=hidden,
        )
        self.name, self.weights, self.files, self.start = name, weights, hidden, hidden.start
        self.rest[: len(hidden.rest)] = hidden.rest

    @contextmanager
    def prepared(self, number: int) -> Iterator[None]:
        """Hold the weights of layer ``number``; afterwards its hidden states are those to go on from."""
        last = number == len(self.layers) - 1
        with (
            self.files.around(number, self.rest, last=last),
            self.weights.placed(f"{self.name}.{number}", self.layers[number]),
        ):
            if not last:
                self.weights.read_ahead(f"{self.name}.{number + 1}", self.layers[number + 1])
            yield

    @contextmanager
    def running(self, number: int) -> Iterator[None]:
        """Read the weights of what is called outside of the layers, and drop them at the end."""
        embedding = input_embedding(self.model)
        handles = []
        with (
            ExitStack() as placed,
            replaced_forwards(
                {}
                if number == 0 or embedding is None
                else {embedding: partial(_nothing, embedding, self.weights.device)}
            ),
        ):
            for name, module in outside_of(self.model, self.name):
                if module is not embedding or number == 0:
                    handles.append(module.register_forward_pre_hook(partial(self._place, placed, name, [])))
            try:
                yield
            finally:
                for handle in handles:
                    handle.remove()

    def _place(self, stack: ExitStack, name: str, called: list[bool], module: nn.Module, _args: Any) -> None:
        if not called:
            called.append(True)
            stack.enter_context(self.weights.placed(name, module, whole=False))


def input_embedding(model: nn.Module) -> nn.Embedding | None:
    """Return the module that turns token ids into hidden states, if the model says which and it is an embedding."""
    try:
        found = model.get_input_embeddings()  # type: ignore[operator]
    except (AttributeError, NotImplementedError):
        return None
    return found if isinstance(found, nn.Embedding) else None


def outside_of(model: nn.Module, layers: str) -> list[tuple[str, nn.Module]]:
    """Return the modules outside of the list ``layers`` that hold weights themselves, with their names."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if not f"{name}.".startswith(f"{layers}.") and (module._parameters or module._buffers)
    ]


def _nothing(embedding: nn.Embedding, device: torch.device, ids: Tensor, *_: Any, **__: Any) -> Tensor:
    """Stand in for an embedding whose output is not used."""
    return torch.zeros(*ids.shape, embedding.embedding_dim, dtype=embedding.weight.dtype, device=device)

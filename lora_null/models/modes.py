"""A model's state during calibration, put back on every way out."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import nn

from .quantised import layout_kept


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Switch off dropout, gradients and compiled programs for the length of the block.

    Traced into a program, the hooks that watch layers would have it compiled again for each of them. Each module's
    own ``training`` flag comes back, not one for the whole model: a frozen part that was in eval mode stays so.
    """
    flags = [(module, module.training) for module in model.modules()]
    try:
        model.eval()
        with torch.no_grad(), layout_kept(model), torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for module, training in flags:
            module.training = training


def input_device(model: nn.Module) -> torch.device | None:
    """Return where the model wants its token ids, or ``None`` if its weights are offloaded and hooks move them."""
    try:
        first = model.get_input_embeddings().weight  # type: ignore[operator, union-attr]
    except (AttributeError, NotImplementedError):
        first = next(model.parameters(), None)
    return None if not isinstance(first, torch.Tensor) or first.is_meta else first.device

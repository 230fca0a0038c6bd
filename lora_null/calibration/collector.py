"""From the input of a layer to the sum of its group."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import AbstractContextManager

import torch
from torch import Tensor, nn

from ..covariances.packed import DenseMatrices, PackedMatrices, unpack_lower
from ..ops.covariance import symmetrize_
from ..system.distributed import add_up, exchange
from .accumulator import Accumulator, Placement, Selection, Sum
from .checkpoint import Progress
from .shared_inputs import SharedInputs
from .watching import watching


class Collector:
    """Receives the layers' inputs of one batch after another.

    Args:
        linears: The target layers by name, in the order of the model.
        placement: Where and how the sums are kept.
        share_inputs: Layers that receive the same tensor share a sum.
        flush_every: Queues are emptied after so many batches. The order of additions, and so every bit of the result,
            then depends on the data alone, not on whether checkpoints are written.

    Attributes:
        batch: Number of the batch that is running.
        shared: The groups found so far.
        accumulator: Their sums.
        placement: Where and how they are kept.
        widths: The number of input features of each target layer.
        left_out: Target layers that compute something else than ``x W^T``, and what; they have no sum.
    """

    def __init__(self, linears: Mapping[str, nn.Linear], placement: Placement, *, share_inputs: bool, flush_every: int):
        self.linears, self.placement = linears, placement
        self.widths = {name: linear.in_features for name, linear in linears.items()}
        self.flush_every = flush_every
        self.shared = SharedInputs(share_inputs)
        self.accumulator = Accumulator(placement)
        self.left_out: dict[str, str] = {}
        self.batch = 0
        self._selection = Selection(None)

    def begin(self, batch: int, mask: Tensor | None) -> None:
        """Start a batch whose tokens count where ``mask (B, L)`` is True; ``None``: all count."""
        self.batch, self._selection = batch, Selection(mask)

    def end(self) -> bool:
        """Finish the batch: True if the queues were emptied after it; ValueError if it held a NaN or an Inf."""
        self.accumulator.check()
        if (self.batch + 1) % self.flush_every:
            return False
        self.accumulator.flush()
        return True

    def flush(self) -> None:
        """Empty the queues, and check the sums."""
        self.accumulator.flush()

    def matrices(self) -> DenseMatrices:
        """Return the flushed sums; their strict upper triangles are arbitrary."""
        return DenseMatrices({key: entry.matrix for key, entry in self.accumulator.sums.items()})

    def watching(self, linears: Mapping[str, nn.Linear]) -> AbstractContextManager[None]:
        """Receive the inputs of these of the target layers, for the length of the block."""
        return watching(linears, self.receive, self.left_out)

    def receive(self, name: str, x: Tensor) -> None:
        """Take the input ``x (..., d)`` of the layer ``name``."""
        if not self.shared.receive(name, x):
            return
        # The caller's loop may run under inference_mode, whose tensors could never be updated outside of it, or
        # under autocast, which would form the sums in bf16.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach()
            self._check_alignment(name, x)
            self.accumulator.add(name, x.reshape(-1, x.shape[-1]), self._selection, self.batch)

    def progress(self) -> Progress:
        """Describe the flushed sums for a checkpoint."""
        sums = self.accumulator.sums
        groups = {key: list(names) for key, names in self.shared.members().items()}
        return Progress(
            groups=groups,
            tokens={key: sums[key].tokens for key in groups if key in sums},
            calls={key: group.calls for key, group in self.shared.groups.items()},
        )

    def restore(self, progress: Progress, matrices: PackedMatrices, device_of: Mapping[str, torch.device]) -> None:
        """Continue from a checkpoint, each sum on its device."""
        self.shared.restore(progress.groups, progress.calls)
        for key in matrices:
            matrix = unpack_lower(matrices.packed(key), symmetric=False).to(device_of[key])
            self.accumulator.sums[key] = Sum(key, matrix, progress.tokens[key])

    def forget(self) -> None:
        """Drop all sums and groups, to start on other layers."""
        self.shared = SharedInputs(self.shared.share)
        self.accumulator.sums.clear()

    def _check_alignment(self, name: str, x: Tensor) -> None:
        mask = self._selection.mask
        if mask is None or (x.dim() == 2 and x.shape[0] == mask.numel()):
            return
        # an axis of one, for heads that share an input, leaves the rows in order
        if [n for n in x.shape[:-1] if n != 1] == [n for n in mask.shape if n != 1]:
            return
        raise ValueError(
            f"Batch {self.batch} has padding, mask {tuple(mask.shape)}, but the input of {name} is {tuple(x.shape)}: "
            "its rows cannot be told apart into tokens and padding. Give batches without padding (one text each, "
            'or packed), pass mask="none" if padding may count, or leave the layer out of target_modules.'
        )


def combined(collector: Collector) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, int]]:
    """Add the flushed sums up over all processes and mirror them: matrices, groups and tokens by key.

    A group's key becomes the first of its members in the order of the model, whichever was called first.
    """
    collector.shared.check()
    order = {name: position for position, name in enumerate(collector.linears)}
    sums = {}
    for leader, names in collector.shared.members().items():
        if leader in collector.accumulator.sums:
            members = sorted(names, key=order.__getitem__)
            sums[members[0]] = members, collector.accumulator.sums[leader]
    described = {key: (members, entry.matrix.shape[0], entry.tokens) for key, (members, entry) in sums.items()}
    groups: dict[str, list[str]] = {}
    tokens: dict[str, int] = {}
    sides: dict[str, int] = {}
    for part in exchange(described):
        for key, (members, d, count) in part.items():
            if groups.setdefault(key, members) != members:
                raise ValueError(
                    f"{key} shares its input with {groups[key]} in one process and with {members} in another. Pass "
                    "share_inputs=False to give each layer a covariance of its own."
                )
            sides[key], tokens[key] = d, tokens.get(key, 0) + count
    groups = {key: groups[key] for key in sorted(groups, key=order.__getitem__)}
    matrices = {}
    for key in groups:
        if key in sums:
            entry = sums[key][1]
            entry.queue, matrix = None, entry.matrix
        else:
            # this process had no batch that reached the layer
            matrix = torch.zeros(sides[key], sides[key], dtype=collector.placement.dtype)
        matrices[key] = symmetrize_(add_up(matrix))
    return matrices, groups, {key: tokens[key] for key in groups}

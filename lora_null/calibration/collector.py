"""From the input of a layer to the sum of its group."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ..covariances.packed import DenseMatrices, PackedMatrices, unpack_lower
from ..models.layout import shape_of
from ..ops.covariance import symmetrize_
from ..system.distributed import add_up, exchange
from .accumulator import Accumulator, Placement, Sum
from .checkpoint import Progress
from .masks import Masks
from .shared_inputs import SharedInputs
from .sides import Sides
from .watching import Routed, watching


class Collector:
    """Receives the layers' inputs of one batch after another.

    Args:
        linears: The target layers by name, in the order of the model.
        sides: Know which mask belongs to a layer.
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
        weight: How often a token of the batch that is running counts. The sums are held divided by it, so that rows
            are added as they are, to the bits of their dtype.
    """

    def __init__(
        self,
        linears: Mapping[str, nn.Linear],
        sides: Sides,
        placement: Placement,
        *,
        share_inputs: bool,
        flush_every: int,
    ):
        self.sides = sides
        self.linears, self.placement = linears, placement
        self.widths = {name: shape_of(linear)[1] for name, linear in linears.items()}
        self.flush_every = flush_every
        self.shared = SharedInputs(share_inputs)
        self.accumulator = Accumulator(placement)
        self.left_out: dict[str, str] = {}
        self.batch = 0
        self.weight = 1.0

    def begin(self, batch: int, masks: Masks, weight: float = 1.0) -> None:
        """Start a batch."""
        self.batch = batch
        self.weigh(weight)
        self.sides.begin(batch, masks)

    def weigh(self, weight: float) -> None:
        """Let what comes next count ``weight`` times."""
        if weight != self.weight:
            self.accumulator.scale(self.weight / weight)
            self.weight = weight

    def leave(self) -> None:
        """Finish a batch whose forward pass has failed."""
        self.sides.end()

    def end(self) -> bool:
        """Finish the batch: True if the queues were emptied after it; ValueError if it held a NaN or an Inf."""
        self.sides.end()
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

    @contextmanager
    def watching(self, linears: Mapping[str, nn.Linear]) -> Iterator[None]:
        """Receive the inputs of these of the target layers, for the length of the block."""
        with self.sides.following(), watching(linears, self.receive, self.left_out):
            yield

    def receive(self, name: str, x: Tensor, routed: Routed | None = None) -> None:
        """Take the input ``x (..., d)`` of the layer ``name``; ``routed`` says of which tokens an expert made it."""
        if not self.shared.receive(name, x):
            return
        # The caller's loop may run under inference_mode, whose tensors could never be updated outside of it, or
        # under autocast, which would form the sums in bf16.
        with torch.inference_mode(False), torch.no_grad(), torch.autocast(x.device.type, enabled=False):
            x = x.detach()
            if routed is not None:
                mask = self.sides.selection(name, routed.tokens)
                counts = None if mask.mask is None else mask.on(x.device)[0][routed.rows]
                self.accumulator.add_at_once(name, x if counts is None else x[counts], self.batch)
                return
            selection = self.sides.selection(name, x)
            self.accumulator.add(name, x.reshape(-1, x.shape[-1]), selection, self.batch)

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


def combined(collector: Collector) -> tuple[dict[str, Tensor], dict[str, list[str]], dict[str, int]]:
    """Add the flushed sums up over all processes and mirror them: matrices, groups and tokens by key.

    A group's key becomes the first of its members in the order of the model, whichever was called first.
    """
    collector.shared.check()
    collector.weigh(1.0)
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

"""Running sums ``C += X^T X``, one per group of layers: queued, flushed in large launches, checked for NaN."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops.covariance import covariance_update

ACCUMULATORS = {"fp32": torch.float32, "fp64": torch.float64}


# (batch, first row, end row) in the queue; rows -1 for inputs that were not queued
Origin = tuple[int, int, int]


@dataclass(frozen=True)
class Placement:
    """Where and how a sum is kept.

    Attributes:
        dtype: Of the sum, float32 or float64.
        compute: Device on which ``X^T X`` is formed; ``None``: where the inputs are.
        store: Device on which the sum lies; ``None``: where it is computed.
        queue_tokens: Rows of the queue in front of it.
        queue: Off, every input goes straight into its sum.
    """

    dtype: torch.dtype = torch.float32
    compute: torch.device | None = None
    store: torch.device | None = None
    queue_tokens: int = 4096
    queue: bool = True


class Selection:
    """The tokens of one batch that count, on whatever device a layer needs them."""

    def __init__(self, mask: Tensor | None):
        self.mask = mask  # (B, L) bool, or None where all count
        self._on: dict[torch.device, tuple[Tensor, Tensor]] = {}

    def on(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """Return the flat mask ``(B L,)`` and the row numbers of its True entries."""
        assert self.mask is not None
        if device not in self._on:
            flat = self.mask.reshape(-1)
            index = flat.cpu().nonzero().view(-1)
            self._on[device] = flat.to(device), index.to(device)
        return self._on[device]


@dataclass
class Sum:
    """One group's running sum.

    Attributes:
        matrix: ``C (d, d)``, lower triangle; the strict upper triangle is arbitrary.
        tokens: How many rows were added, the queue's included.
        queue: Rows that wait, ``queued`` of them.
        origins: ``(batch, first row, end row)`` of what lies in the queue.
    """

    key: str
    matrix: Tensor
    tokens: int = 0
    queue: Tensor | None = None
    queued: int = 0
    origins: tuple[Origin, ...] = ()


class Accumulator:
    """The sums of all groups.

    Inputs of fewer than half of ``queue_tokens`` rows are copied into a queue, which is flushed as soon as it is
    half full: a launch on few rows is bound by reading and writing ``C``, below about 800 tokens on a large GPU.
    Longer inputs go straight into the sum. The order of additions depends on nothing but the batches and on
    when :meth:`flush` is called.
    """

    def __init__(self, placement: Placement):
        self.placement = placement
        self.sums: dict[str, Sum] = {}
        # One launch's product on its way to a sum on another device.
        self._buffers: dict[tuple[torch.device, int], Tensor] = {}
        # A NaN or Inf in any row shows on the diagonal of its sum. The traces are fetched together, once per
        # batch, so that no layer waits for the device.
        self._traces: list[tuple[Sum, tuple[Origin, ...], Tensor]] = []

    def add(self, key: str, rows: Tensor, selection: Selection, batch: int) -> None:
        """Add those of the rows ``(T, d)``, of any floating dtype, that count; ``batch`` is for errors."""
        index = None if selection.mask is None else selection.on(rows.device)[1]
        count = rows.shape[0] if index is None else index.numel()
        if count == 0:
            return
        rows, entry, device = self._entry(key, rows)
        entry.tokens += count
        capacity = self.placement.queue_tokens
        if not self.placement.queue or 2 * rows.shape[0] >= capacity:
            # Compacted: a launch without a mask reads whole tiles ahead (TMA), and padding costs no products.
            rows = rows if index is None else rows.index_select(0, index)
            self._update(entry, rows.to(device), ((batch, -1, -1),))
            return
        if entry.queue is None or entry.queue.dtype != rows.dtype:
            self._flush(entry)
            entry.queue = torch.empty(capacity, rows.shape[1], dtype=rows.dtype, device=device)
        target = entry.queue[entry.queued : entry.queued + count]
        if index is None:
            target.copy_(rows)
        elif rows.device == device:
            torch.index_select(rows, 0, index, out=target)
        else:
            target.copy_(rows.index_select(0, index))
        entry.origins += ((batch, entry.queued, entry.queued + count),)
        entry.queued += count
        if 2 * entry.queued >= capacity:
            self._flush(entry)

    def add_at_once(self, key: str, rows: Tensor, batch: int) -> None:
        """Add rows ``(n, d)``, perhaps none, that all count, without a queue in front of the sum."""
        rows, entry, device = self._entry(key, rows)
        entry.tokens += len(rows)
        if len(rows):
            self._update(entry, rows.to(device), ((batch, -1, -1),))

    def flush(self) -> None:
        """Empty every queue, and check the sums."""
        for entry in self.sums.values():
            self._flush(entry)
        self.check()

    def scale(self, factor: float) -> None:
        """Multiply the sums of all rows so far."""
        self.flush()
        for entry in self.sums.values():
            entry.matrix.mul_(factor)

    def check(self) -> None:
        """Raise ValueError if a NaN or an Inf has reached a sum; one transfer for all layers of a device.

        To be called after every batch, while the rows that it flushed still lie in their queues.
        """
        by_device = defaultdict(list)
        for update in self._traces:
            by_device[update[2].device].append(update)
        self._traces.clear()
        for updates in by_device.values():
            finite = torch.stack([trace for *_, trace in updates]).isfinite().tolist()
            for (entry, origins, _), good in zip(updates, finite, strict=True):
                if not good:
                    raise ValueError(_not_finite(entry, origins))

    def _entry(self, key: str, rows: Tensor) -> tuple[Tensor, Sum, torch.device]:
        """Return the rows in a type that can be summed, the sum of ``key``, and the device where it is formed."""
        if rows.dtype not in (torch.float16, torch.bfloat16, torch.float32, torch.float64):
            rows = rows.float()
        device = self.placement.compute or rows.device
        return rows, self.sums.get(key) or self._new_sum(key, rows.shape[1], device), device

    def _new_sum(self, key: str, d: int, device: torch.device) -> Sum:
        matrix = torch.zeros(d, d, dtype=self.placement.dtype, device=self.placement.store or device)
        return self.sums.setdefault(key, Sum(key, matrix))

    def _flush(self, entry: Sum) -> None:
        if entry.queue is not None and entry.queued:
            self._update(entry, entry.queue[: entry.queued], entry.origins)
            entry.queued, entry.origins = 0, ()

    def _update(self, entry: Sum, rows: Tensor, origins: tuple[Origin, ...]) -> None:
        matrix = entry.matrix
        if matrix.dtype == torch.float32 and rows.dtype == torch.float64:
            rows = rows.float()
        if matrix.device == rows.device:
            covariance_update(matrix, rows)
        else:
            part = self._product_buffer(rows.device, matrix)
            covariance_update(part, rows)
            matrix.add_(part.to(matrix.device))
        self._traces.append((entry, origins, matrix.diagonal().sum()))

    def _product_buffer(self, device: torch.device, matrix: Tensor) -> Tensor:
        where = (device, matrix.shape[0])
        if where not in self._buffers:
            self._buffers[where] = torch.empty_like(matrix, device=device)
        return self._buffers[where].zero_()


def _not_finite(entry: Sum, origins: tuple[Origin, ...]) -> str:
    """Name the layer and, where its rows still lie in the queue, the very batch."""
    suspects = [batch for batch, *_ in origins]
    if entry.queue is not None and origins[0][1] >= 0:
        bad = [batch for batch, start, end in origins if not bool(entry.queue[start:end].isfinite().all())]
        suspects = bad[:1] or suspects
    where = f"batch {suspects[0]}" if len(suspects) == 1 else f"one of the batches {suspects[0]} to {suspects[-1]}"
    return (
        f"NaN or Inf in the input of {entry.key}, {where} (or entries whose squares overflow float32). Expected "
        "finite activations. Float16 overflows in models trained in bfloat16: load the model in bfloat16 or "
        "float32. Otherwise look at that batch (ids out of range, rows of padding only) and at the weights."
    )

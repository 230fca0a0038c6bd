"""What calibration will keep in memory, where, and whether it fits: known before the run."""

from __future__ import annotations

import os
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..models.layout import is_linear, shape_of
from .accumulator import Placement
from .probe import Probe


@dataclass(frozen=True)
class Item:
    """One line of the plan: ``size`` bytes for ``what`` on ``device``."""

    what: str
    device: torch.device
    size: int


@dataclass(frozen=True)
class MemoryPlan:
    """Memory that calibration takes on top of the model and of one forward pass.

    Attributes:
        title: What is planned.
        items: What is kept while calibration runs.
        later: What training keeps besides, where A learns within the free directions; in no total.
    """

    title: str
    items: tuple[Item, ...]
    later: tuple[Item, ...] = ()

    def total(self, device: torch.device | str) -> int:
        """Return the bytes on ``device``."""
        return sum(item.size for item in self.items if item.device == torch.device(device))

    @property
    def devices(self) -> list[torch.device]:
        """Return the devices that the plan uses, in order."""
        return list(dict.fromkeys(item.device for item in self.items))

    def __str__(self) -> str:
        lines = [f"Memory plan: {self.title}"]
        lines += [f"  {readable(item.size):>10} on {item.device}: {item.what}" for item in self.items if item.size]
        lines += [f"  {readable(self.total(device)):>10} on {device} in total" for device in self.devices]
        lines += [f"  {readable(item.size):>10} on {item.device} in training: {item.what}" for item in self.later]
        return "\n".join(lines)

    def check(self, limit: int | None, remedy: str) -> None:
        """Raise ValueError if a device would need more than ``limit`` bytes; ``None``: its free memory."""
        for device in self.devices:
            allowed = limit if limit is not None else free_memory(device)
            if allowed is not None and self.total(device) > allowed:
                raise ValueError(
                    f"{readable(self.total(device))} are needed on {device}, and {readable(allowed)} may be used. "
                    f"{remedy}\n{self}"
                )


def readable(size: int) -> str:
    """Return ``size`` bytes in KiB, MiB or GiB."""
    for unit, power in (("KiB", 10), ("MiB", 20)):
        if size < 2 ** (power + 10):
            return f"{size / 2**power:.1f} {unit}"
    return f"{size / 2**30:.2f} GiB"


def free_memory(device: torch.device) -> int | None:
    """Return the bytes that can still be allocated on ``device``; ``None`` where nobody knows."""
    if device.type == "cuda" and torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            available = [line.split()[1] for line in lines if line.startswith("MemAvailable:")]
        return 1024 * int(available[0]) if available else None
    return None


def plan_directions(seen: Probe, dtype: torch.dtype, group_pooling: int = 1) -> tuple[Item, ...]:
    """Plan for the free directions in training: at most half of all in each group, or else the others are kept."""
    counts = Counter((shape.device, shape.d // group_pooling) for shape in seen.inputs.values())
    name = str(dtype).removeprefix("torch.")
    return tuple(
        Item(
            f"free directions of {count} groups, at most ({d}, {d // 2}) {name}",
            device,
            count * d * (d // 2) * dtype.itemsize,
        )
        for (device, d), count in counts.items()
    )


def plan_streaming(seen: Probe, placement: Placement) -> MemoryPlan:
    """Plan one pass over the data with all sums at once."""
    title = f"{len(seen.groups)} covariances for {sum(map(len, seen.groups.values()))} linear layers"
    items = _sums(seen, list(seen.groups), placement) + _queues(seen, list(seen.groups), placement)
    return MemoryPlan(title, tuple(items))


def plan_layerwise(
    seen: Probe,
    placement: Placement,
    layer_keys: Sequence[Sequence[str]],
    layer_modules: Sequence[nn.Module],
    *,
    moves_weights: bool,
    hidden_bytes: int,
    hidden_device: torch.device,
    largest_batch: int,
    on_disk: bool,
) -> MemoryPlan:
    """Plan one pass per decoder layer, with that layer's sums only.

    Args:
        seen: From :func:`~lora_null.calibration.probe.probe`.
        placement: Of the sums of the layer at work.
        layer_keys: The group keys of each layer.
        layer_modules: The layers.
        moves_weights: Each layer's weights are copied to ``placement.compute`` for its turn.
        hidden_bytes: Size of the hidden states of all batches, kept on ``hidden_device``.
        hidden_device: See there.
        largest_batch: ``B L`` of the largest batch.
        on_disk: Finished sums lie in the checkpoint's files only.
    """
    plans = [_sums(seen, keys, placement) + _queues(seen, keys, placement) for keys in layer_keys]
    largest = max(plans, key=lambda items: sum(item.size for item in items))
    items = [Item(f"{item.what}, one layer at a time", item.device, item.size) for item in largest]
    if moves_weights and placement.compute:
        weights = max(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layer_modules)
        items.append(Item("weights of one layer", placement.compute, weights))
        width = max(sum(sum(shape_of(m)) for m in layer.modules() if is_linear(m)) for layer in layer_modules)
        itemsize = max(shape.dtype.itemsize for shape in seen.inputs.values())
        items.append(Item("activations of one layer, at most", placement.compute, largest_batch * width * itemsize))
    items.append(Item("hidden states of all batches", hidden_device, hidden_bytes))
    if not on_disk:
        packed = sum(shape.d * (shape.d + 1) // 2 for shape in seen.inputs.values()) * placement.dtype.itemsize
        items.append(Item("finished covariances, packed", torch.device("cpu"), packed))
    return MemoryPlan(f"{len(seen.groups)} covariances, layer by layer over {len(layer_modules)} layers", tuple(items))


def _sums(seen: Probe, keys: Sequence[str], placement: Placement) -> list[Item]:
    counts: Counter[tuple[torch.device, int]] = Counter()
    scratch: dict[torch.device, set[int]] = defaultdict(set)
    for key in keys:
        shape = seen.inputs[key]
        compute = placement.compute or shape.device
        store = placement.store or compute
        counts[store, shape.d] += 1
        if store != compute:
            scratch[compute].add(shape.d)
    dtype = str(placement.dtype).removeprefix("torch.")
    items = [
        Item(f"{count} covariances ({d}, {d}) {dtype}", device, count * d * d * placement.dtype.itemsize)
        for (device, d), count in counts.items()
    ]
    itemsize = placement.dtype.itemsize
    items += [
        Item("products of one launch", device, sum(d * d for d in sizes) * itemsize)
        for device, sizes in scratch.items()
    ]
    return items


def _queues(seen: Probe, keys: Sequence[str], placement: Placement) -> list[Item]:
    sizes: Counter[torch.device] = Counter()
    for key in keys:
        shape = seen.inputs[key]
        if not shape.queued:
            continue
        sizes[placement.compute or shape.device] += placement.queue_tokens * shape.d * shape.dtype.itemsize
    return [
        Item(f"queues of {placement.queue_tokens} tokens", device, size if placement.queue else 0)
        for device, size in sizes.items()
    ]

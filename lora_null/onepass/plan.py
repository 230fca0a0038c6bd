"""What a run in one pass takes, said before it: the memory of each of its phases, the largest of which counts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import finalize

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..calibration.batches import Batch
from ..calibration.job import Job
from ..calibration.memory import Item, MemoryPlan, readable
from ..calibration.memory_plan import inputs_on_meta, plan_for
from ..calibration.probe import Probe
from ..config import LoraNullConfig
from ..models.layout import shape_of
from ..models.shards import size_of
from ..solver.null_basis import workspace as basis_workspace
from ..solver.null_space import workspace as space_workspace
from ..solver.overlapped import ALONE
from .walk import outside_of

# What MKL keeps from its first large product on, measured with one thread.
_BUFFERS = 18 * 2**20


@dataclass(frozen=True)
class OnePassPlan:
    """Memory that a run in one pass takes on top of the process before it.

    Attributes:
        phases: One plan for each; what one has taken is free again in the next.
        disk: Bytes in the folder of work at most, the adapter and the covariances aside.
    """

    phases: tuple[MemoryPlan, ...]
    disk: int

    def total(self, device: torch.device | str) -> int:
        """Return the most bytes on ``device`` at a time."""
        return max(phase.total(device) for phase in self.phases)

    def __str__(self) -> str:
        devices = dict.fromkeys(device for phase in self.phases for device in phase.devices)
        lines = [str(phase) for phase in self.phases]
        lines += [f"{readable(self.total(device))} on {device} at most" for device in devices]
        return "\n".join([*lines, f"{readable(self.disk)} on disk for the hidden states, removed at the end"])

    def check(self, limit: int | None, remedy: str) -> None:
        """Raise ValueError if a device would need more than ``limit`` bytes; ``None``: its free memory."""
        for phase in self.phases:
            phase.check(limit, remedy)


def plan_one_pass(
    job: Job, batches: Sequence[Batch], config: LoraNullConfig, name: str, layers: Sequence[nn.Module], threads: int
) -> tuple[OnePassPlan, Probe]:
    """Plan for a model that lies on the device meta as a whole, without computing anything.

    Args:
        job: Of that model; its options name the device.
        batches: All of them.
        config: Of the adapters.
        name: Of the list of layers.
        layers: Those that are walked over.
        threads: Of torch; with more than one, two null spaces are solved at a time.

    Returns:
        The plan, and what a small forward pass showed.
    """
    device = torch.device(job.options.device or "cpu")
    positions = [batch.positions for batch in batches]
    plan, seen = plan_for(job, batches, tokens=sum(positions))
    sums = [item for item in plan.items if "covariances (" in item.what]
    queues = [item for item in plan.items if "queue" in item.what]
    weights = Item("weights of one layer", device, max(size_of(layer) for layer in layers))
    largest = max(batches, key=lambda batch: batch.positions)
    peak, called = _activations(job, largest, name)
    entering = next(iter(seen.inputs.values()))
    one_batch = largest.positions * _width(job.model, seen, name) * entering.dtype.itemsize
    running = MemoryPlan(
        "a layer runs on all batches, and its covariances are summed",
        (
            *sums,
            *queues,
            weights,
            Item("weights before the first layer", device, called),
            Item(f"activations of a batch of {largest.positions} positions", device, peak),
        ),
    )
    solving = MemoryPlan(
        "its null spaces are solved",
        (
            *sums,
            weights,
            Item("workspace of the solver", device, _solving(seen, config, name, layers, sum(positions), threads)),
            Item(f"buffers of the libraries, {threads} threads", device, threads * _BUFFERS),
        ),
    )
    numbers = sum(config.rank_of(n) * sum(shape_of(m)) for n, m in job.linears.items() if n not in seen.left_out)
    stored = (2 if config.train == "ab" else 1) * numbers * 4
    # read from their files, padded to one rank
    writing = MemoryPlan("the adapter is written", (Item("its factors, twice", torch.device("cpu"), 2 * stored),))
    hidden = sum(positions) * one_batch // max(1, largest.positions)
    return OnePassPlan((running, solving, writing), 2 * hidden + stored), seen


def _width(model: nn.Module, seen: Probe, name: str) -> int:
    """Return the width of the hidden states."""
    return getattr(getattr(model, "config", None), "hidden_size", None) or next(iter(seen.inputs.values())).d


def _solving(
    seen: Probe, config: LoraNullConfig, name: str, layers: Sequence[nn.Module], tokens: int, threads: int
) -> int:
    """Return the bytes that the solves of a layer take at most."""
    most, whole = 0, config.protected is not None
    for number in range(len(layers)):
        alone, beside = [0], [0]
        for key, shape in seen.inputs.items():
            if key.startswith(f"{name}.{number}."):
                least = space_workspace(shape.d, max(map(config.rank_of, seen.groups[key])), tokens)
                solves = alone if threads == 1 or shape.d >= ALONE else beside
                solves.append(basis_workspace(shape.d) if whole else least)
        most = max(most, *alone, sum(sorted(beside)[-2:]))
    return most


def _activations(job: Job, batch: Batch, name: str) -> tuple[int, int]:
    """Return the bytes of all tensors that live at a time in a forward pass, and of the weights before the layers."""
    first = job.model.get_submodule(f"{name}.0")
    called: dict[int, nn.Module] = {}
    reached: list[bool] = []

    def note(module: nn.Module, _: Any) -> None:
        if not reached:
            called[id(module)] = module

    handles = [first.register_forward_pre_hook(lambda *_: reached.append(True))]
    handles += [module.register_forward_pre_hook(note) for _, module in outside_of(job.model, name)]
    inputs = inputs_on_meta(job, batch.inputs)
    try:
        with _Living([*job.model.parameters(), *job.model.buffers()]) as living:
            job.model(**inputs)
    finally:
        for handle in handles:
            handle.remove()
    return living.peak, sum(size_of(module, whole=False) for module in called.values())


class _Living(TorchDispatchMode):
    """Counts the bytes of the tensors that operations make, as long as they live; views of ``others`` aside."""

    def __init__(self, others: Sequence[Tensor]) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known = {tensor.untyped_storage()._cdata for tensor in others}

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping | None = None) -> Any:
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor):
                self._note(tensor)
        return result

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        finalize(storage, self._forget, key, size)

    def _forget(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size

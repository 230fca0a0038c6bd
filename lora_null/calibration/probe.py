"""One small forward pass shows which layers share an input, and of what kind it is; nothing is summed."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from ..models.layout import shape_of
from .shared_inputs import SharedInputs
from .watching import Routed, watching


@dataclass(frozen=True)
class SeenInput:
    """The input of a group of layers, as the probe saw it; ``queued``: its rows may wait for more of them."""

    d: int
    device: torch.device
    dtype: torch.dtype
    queued: bool = True


@dataclass
class Probe:
    """What a small forward pass showed.

    Attributes:
        groups: Key to members.
        inputs: Key to the input's size, device and dtype.
        unreached: Target layers that the pass did not call; each counts as a group of its own.
        left_out: Target layers that compute something else than ``x W^T``, and what.
    """

    groups: dict[str, tuple[str, ...]] = field(default_factory=dict)
    inputs: dict[str, SeenInput] = field(default_factory=dict)
    unreached: tuple[str, ...] = ()
    left_out: dict[str, str] = field(default_factory=dict)


def probe(model: nn.Module, inputs: Mapping, linears: Mapping[str, nn.Linear], share_inputs: bool) -> Probe:
    """Run ``model(**inputs)`` once."""
    shared, seen, left_out = SharedInputs(share_inputs), {}, dict[str, str]()

    def receive(name: str, x: Tensor, routed: Routed | None = None) -> None:
        if shared.receive(name, x):
            seen[name] = SeenInput(x.shape[-1], x.device, x.dtype, routed is None)

    with watching(linears, receive, left_out):
        model(**inputs)
    groups = shared.members()
    known = {name for names in groups.values() for name in names} | set(left_out)
    rest = unprobed({name: linear for name, linear in linears.items() if name not in known})
    return Probe({**groups, **rest.groups}, {**seen, **rest.inputs}, rest.unreached, left_out)


def unprobed(linears: Mapping[str, nn.Linear]) -> Probe:
    """Assume that no two layers share an input: the most that calibration can need."""
    return Probe(
        {name: (name,) for name in linears},
        {
            name: SeenInput(shape_of(m)[1], m.weight.device, m.weight.dtype, not getattr(m, "is_routed", False))
            for name, m in linears.items()
        },
        tuple(linears),
    )

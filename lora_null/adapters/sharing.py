"""Which adapted layers read the same input and may share one projection."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import nn

from .layer import LoraNullLinear, adapter_layers
from .projection import ProjectionGroup, row_space_coordinates


def share_projections(model: nn.Module) -> int:
    """Let the adapted layers of ``model`` that can share a projection do so; return the number of groups.

    A group is made of the layers directly under one module whose frozen ``lora_A`` span the same space. Whether they
    do read the same tensor is seen at every call, so that grouping too much costs nothing. Groups are no part of
    the state dict, of the parameters or of an exported adapter. Call it again after factors were replaced.
    Factors held in bf16 or fp16 share only where they span one space to rounding of fp32, as equal ones do.
    """
    parents: dict[str, list[LoraNullLinear]] = {}
    for name, layer in adapter_layers(model).items():
        layer.projection_group = None
        lora_A = layer.lora_A.weight
        if type(lora_A) is nn.Parameter and lora_A.ndim == 2 and lora_A.device.type != "meta":
            parents.setdefault(name.rpartition(".")[0], []).append(layer)
    return sum(_group(layers) for layers in parents.values())


def _group(layers: Iterable[LoraNullLinear]) -> int:
    waiting = [layer for layer in layers if not layer.lora_A.weight.requires_grad and not layer.shifted]
    groups = 0
    while waiting:
        first, *others = waiting
        factor = first.lora_A.weight.detach()
        members: Sequence[LoraNullLinear] = [first] + [
            layer
            for layer in others
            if layer.lora_A.weight.shape == factor.shape
            and row_space_coordinates(layer.lora_A.weight.detach(), factor.to(layer.lora_A.weight.device)) is not None
        ]
        if len(members) > 1:
            group = ProjectionGroup(members)
            for layer in members:
                layer.projection_group = group
            groups += 1
        waiting = [layer for layer in waiting if not any(layer is member for member in members)]
    return groups

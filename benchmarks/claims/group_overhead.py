"""What small q, k and v cost in the interpreter, with a projection of each or one for all, beside PEFT's three."""

from functools import partial
from unittest import mock

import torch
from torch import nn

from . import Found, milliseconds

SOURCE = "lora_null/adapters/projection.py"
QUOTE = "three layers that share take 0.77 of the time of PEFT's, three that do not 0.55"
TIMED = True


def measure() -> Found:
    """Time forward and backward of the three, at T = 4, d = m = 64, r = 8."""
    from lora_null.adapters.projection import ProjectionGroup

    from ..peers import layers
    from ..questions.linear import frozen_linears

    x, A = torch.randn(4, 64, requires_grad=True), torch.randn(8, 64)
    rotation = torch.linalg.qr(torch.randn(8, 8)).Q

    def three(holder: nn.Module) -> None:
        q, k, v = (holder.get_submodule(name)(x) for name in "qkv")
        (q + k + v).sum().backward()

    ways = {"sharing": layers.attach_ours, "apart": layers.attach_ours, "PEFT": layers.attach_peft}
    calls = {}
    for way, attach in ways.items():
        holder = frozen_linears({name: torch.randn(64, 64) for name in "qkv"})
        for name, factor in zip("qkv", (A, rotation @ A, rotation.T @ A), strict=True):
            attach(holder, name, factor, torch.randn(64, 8), False)
        if way == "sharing":
            layers.share_projections(holder)
        calls[way] = partial(three, holder)
    with mock.patch.object(ProjectionGroup, "pays", lambda group, x: True):
        times = milliseconds(calls)
    claimed = {"sharing": 0.77, "apart": 0.55}
    return {f"{way} / PEFT": (ratio, times[way] / times["PEFT"]) for way, ratio in claimed.items()}

"""What a small adapted layer costs in the interpreter, forward and backward."""

from functools import partial
from unittest import mock

import torch
from torch import nn

from . import Found, milliseconds

SOURCE = "lora_null/ops/dispatch.py"
QUOTE = "120 us of a 2-core EPYC; 45 us where C++ calls the vendor's GEMMs, 75 us in PEFT"
TIMED = True


def measure() -> Found:
    """Time the layer through Python's operations, through C++, and in PEFT, at T = 4, d = m = 64, r = 8."""
    from lora_null.system import extension

    from ..peers import layers
    from ..questions.linear import frozen_linears

    x, A, B = torch.randn(4, 64, requires_grad=True), torch.randn(8, 64), torch.randn(64, 8)

    def both(holder: nn.Module) -> None:
        holder.get_submodule("proj")(x).sum().backward()

    calls = {}
    for name, attach in (("ours", layers.attach_ours), ("PEFT", layers.attach_peft)):
        holder = frozen_linears({"proj": torch.randn(64, 64)})
        attach(holder, "proj", A, B, False)
        calls[name] = partial(both, holder)
    compiled = milliseconds(calls)
    with mock.patch.object(extension, "ready", return_value=None):  # the same products, called from Python
        python = milliseconds({"ours": calls["ours"]})
    times = {"Python": (120.0, python["ours"]), "C++": (45.0, compiled["ours"]), "PEFT": (75.0, compiled["PEFT"])}
    return {f"{name} (us)": (claimed, 1e3 * measured) for name, (claimed, measured) in times.items()}

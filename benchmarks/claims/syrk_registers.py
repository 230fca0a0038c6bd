"""Registers of the covariance kernel with and without relaxed additions, compiled for a GPU that need not be there."""

import sys
from dataclasses import replace

import torch

from ..environment import ROOT
from . import Found

SOURCE = "kernels/gpu/syrk_kernels.py"
QUOTE = "117 registers instead of 228 for 128 x 128 on sm_90"
TIMED = False


def measure() -> Found:
    """Compile the shipped configuration of 8192 tokens at d = 4096 in bf16 both ways; needs pytest and Triton."""
    import pytest
    from lora_null.kernels import syrk

    sys.path.insert(0, str(ROOT / "tests" / "support"))
    from triton_tools import compile_for, intercepted, resources

    with intercepted(pytest.MonkeyPatch, "sm_90") as launches:
        syrk.covariance_update(
            torch.empty(4096, 4096, device="meta"), torch.empty(8192, 4096, dtype=torch.bfloat16, device="meta")
        )
    found: Found = {}
    for atomic, claimed in ((True, 117), (False, 228)):
        launch = replace(launches[0], options={**launches[0].options, "ATOMIC": atomic})
        found["atomic" if atomic else "plain"] = (claimed, resources(compile_for(launch, "sm_90"))["registers"])
    return found

"""The covariance through BLAS by halves, over the full product."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from . import Found, milliseconds

SOURCE = "lora_null/ops/covariance.py"
QUOTE = "leaves of 128 to 384 run at 1.79x to 1.81x the full product, 512 at 1.70x"
TIMED = True


def measure() -> Found:
    """Time each size of the leaves at ``d = T = 4096`` in fp32, rows of blocks too."""
    from lora_null.ops.covariance import _halve

    x, C = torch.randn(4096, 4096), torch.zeros(4096, 4096)

    def rows() -> None:
        for start in range(0, 4096, 256):
            C[start : start + 256, : start + 256].addmm_(x[:, start : start + 256].T, x[:, : start + 256])

    calls: dict[str, Callable[[], Any]] = {
        f"leaves of {n}": partial(_halve, C, x, 0, 4096, n) for n in (128, 256, 384, 512)
    }
    calls["rows of blocks"] = rows
    times = milliseconds({"full": lambda: C.addmm_(x.T, x)} | calls)
    claimed = {"leaves of 512": 1.70, "rows of blocks": 1.68}
    return {name: (claimed.get(name, 1.80), times["full"] / times[name]) for name in calls}

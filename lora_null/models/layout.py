"""Which modules are linear layers, and how their weight lies in memory: ``W (m, d)``, or transposed.

Everything else asks here, and reads and writes a weight as ``(m, d)``.
"""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn


def is_linear(module: Any) -> bool:
    """Tell whether a module is a linear layer: torch's, GPT-2's, or a quantised one of its own kind, as HQQ's are."""
    if isinstance(module, nn.Linear) or is_transposed(module):
        return True
    named = isinstance(getattr(module, "in_features", None), int) and hasattr(module, "out_features")
    return named and callable(getattr(module, "dequantize", None))


def is_transposed(module: Any) -> bool:
    """Tell whether a module computes ``x V + b`` with ``V = W^T (d, m)``, as ``Conv1D`` of transformers does."""
    # Where nobody has imported the class there are no instances.
    known: Any = sys.modules.get("transformers.pytorch_utils")
    return known is not None and isinstance(module, known.Conv1D)


def shape_of(linear: Any) -> tuple[int, int]:
    """Return ``(m, d)``, the numbers of outputs and inputs."""
    return (linear.nf, linear.nx) if is_transposed(linear) else (linear.out_features, linear.in_features)


def matrix_of(linear: Any) -> Tensor:
    """Return the weight seen as ``(m, d)``; what is written into it is written into the layer."""
    return linear.weight.t() if is_transposed(linear) else linear.weight

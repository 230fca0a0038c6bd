"""Launcher of the symmetric kernel ``C += X^T X``."""

import torch
from torch import Tensor

from . import runtime

__all__ = ["supported"]


def supported(x: Tensor, *, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why the kernel cannot add ``x^T x`` into a C of ``dtype``, or None if it can."""
    reason = runtime.unavailable(x.device)
    if reason is not None:
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"x is {x.dtype}"
    if dtype not in (torch.float32, torch.float64):
        return f"C is {dtype}"
    return None

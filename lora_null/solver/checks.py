"""What a covariance must be before it is solved, and the float64 working copy."""

from __future__ import annotations

import torch
from torch import Tensor

UPLO = ("full", "lower", "upper")


def check_rank(r: int, d: int) -> int:
    """Return ``r`` as an int in ``[1, d]``."""
    if isinstance(r, bool) or not hasattr(r, "__index__"):
        raise TypeError(f"null_space: r is {r!r}; expected an integer, for instance r=128.")
    r = r.__index__()
    if not 1 <= r <= d:
        raise ValueError(
            f"null_space: r is {r} for a covariance of size {d}; expected 1 <= r <= {d}. A rank cannot exceed the "
            "number of in-features of the layer: lower r, or leave the layer out of target_modules."
        )
    return r


def working_copy(C: Tensor, uplo: str) -> Tensor:
    """Return the full symmetric matrix ``(d, d)`` in float64, contiguous; ``C`` itself where it already is that.

    Raises:
        TypeError: not a float32 or float64 tensor.
        ValueError: not square, NaN or infinite entries, zero, or asymmetric with ``uplo="full"``.
    """
    if not isinstance(C, Tensor):
        raise TypeError(f"null_space: C is {type(C).__name__}; expected a torch tensor (d, d).")
    if C.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"null_space: C has dtype {C.dtype}; expected float32 or float64. A half-precision sum has already lost "
            "the small eigenvalues that the null space is made of: accumulate in float32."
        )
    if C.dim() != 2 or C.shape[0] != C.shape[1] or C.shape[0] == 0:
        raise ValueError(
            f"null_space: C has shape {tuple(C.shape)}; expected a square matrix (d, d). "
            "Pass the covariance sum_t x_t x_t^T, not the activations."
        )
    if uplo not in UPLO:
        raise ValueError(f"null_space: uplo is {uplo!r}; expected one of {UPLO}.")
    C = C.detach()
    if uplo == "full":
        full = C.to(torch.float64).contiguous()
    else:
        triangle = C.tril() if uplo == "lower" else C.triu()
        full = triangle.to(torch.float64)
        full = full + full.mT
        full.diagonal().mul_(0.5)
    _check_values(full, C)
    return full


def _check_values(full: Tensor, C: Tensor) -> None:
    # Two products with one vector see every entry: a NaN or Inf survives any sum, and an asymmetric part cannot
    # hide from a fixed dense vector except on a set of measure zero. Far cheaper than comparing with the transpose.
    d = full.shape[0]
    probe = torch.linspace(0.5, 1.5, d, dtype=torch.float64, device=full.device).cos()
    right, left = full @ probe, full.mT @ probe
    scale = full.diagonal().abs().max()
    difference = (right - left).abs().max()
    finite, scale, difference = torch.stack([torch.isfinite(right).all().to(scale.dtype), scale, difference]).tolist()
    if not finite:
        bad = int((~torch.isfinite(C)).sum())
        raise ValueError(
            f"null_space: C has {bad} NaN or infinite entries; expected a finite matrix. Activations that overflow "
            "half precision are the usual cause: calibrate in bfloat16 or float32."
        )
    if scale == 0:
        raise ValueError(
            "null_space: the diagonal of C is zero, so C carries no activations; expected a positive trace. Did the "
            "calibration data reach this layer (all tokens masked, or an expert that was never routed to)?"
        )
    # 2e-5: float32 sums of 1e5 tokens differ by about 1e-6 relative between the triangles; a forgotten mirror
    # or a matrix that is not a covariance is off by order 1.
    if difference > 2e-5 * scale * d**0.5:
        raise ValueError(
            f"null_space: C is not symmetric (|C v - C^T v| reaches {difference:.3e}, largest diagonal entry "
            f"{scale:.3e}); expected a symmetric matrix. If only one triangle was accumulated, pass uplo='lower' or "
            "call ops.symmetrize_(C) first."
        )

"""What a covariance must be before it is solved, and the float64 working copy."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .options import UPLO, named

# Entries within these powers of two are left as they are: the solvers square and invert, and float64 ends at 2^1024.
SAFE_EXPONENT = 200


def working_copy(C: Any, uplo: str, what: str = "null_space: C") -> tuple[Tensor, int]:
    """Return the full symmetric matrix in float64, contiguous, in a range where squares are safe.

    Args:
        C: ``(d, d)``, as a user gave it. Not modified.
        uplo: Which part of it holds the data.
        what: Its name in messages.

    Returns:
        ``(d, d)``, ``C`` itself where that already is what is wanted, and the exponent ``e``: the matrix times ``2^e``
        is ``C``.

    Raises:
        TypeError: not a dense float32 or float64 tensor.
        ValueError: not square, without data, NaN or infinite entries, zero, or asymmetric with ``uplo="full"``.
    """
    _check_tensor(C, uplo, what)
    C = C.detach()
    if uplo == "full":
        full = C.to(torch.float64).contiguous()
    else:
        triangle = C.tril() if uplo == "lower" else C.triu()
        full = triangle.to(torch.float64)
        full = full + full.mT
        full.diagonal().mul_(0.5)
    # Of C where that is all of it: in float32 it is half as long to read.
    low, high = torch.stack(torch.aminmax(C if uplo == "full" else full)).tolist()
    scale = max(-low, high)
    exponent = 0
    if 0 < scale < math.inf and abs(math.frexp(scale)[1]) > SAFE_EXPONENT:
        exponent = math.frexp(scale)[1]
        full = scaled(full, -exponent)
    _check_values(full, scale, what)
    return full, exponent


def scaled(values: Tensor, exponent: int) -> Tensor:
    """Return ``values 2^exponent``, in two steps: the power itself may be out of range."""
    half = exponent // 2
    return values * 2.0**half * 2.0 ** (exponent - half) if exponent else values


def _check_tensor(C: Any, uplo: str, what: str) -> None:
    if not isinstance(C, Tensor):
        remedy = (
            "For many matrices by key call null_spaces."
            if isinstance(C, Mapping) or hasattr(C, "group_of")
            else "Were the arguments swapped, or has the layer no covariance? Convert an array by torch.from_numpy."
        )
        raise TypeError(f"{what} is {named(C)}; expected a torch tensor (d, d), sum_t x_t x_t^T. {remedy}")
    if C.layout != torch.strided:
        raise TypeError(f"{what} has the layout {C.layout}; expected a dense matrix (d, d): call to_dense() first.")
    if C.is_complex() or not C.is_floating_point():
        raise TypeError(
            f"{what} has dtype {C.dtype}; expected float32 or float64. A sum of real activations is neither complex "
            "nor integer: was another tensor passed, token ids or a mask?"
        )
    if C.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{what} has dtype {C.dtype}; expected float32 or float64. A half-precision sum has already lost "
            "the small eigenvalues that the null space is made of: accumulate in float32."
        )
    if C.dim() != 2 or C.shape[0] != C.shape[1] or C.shape[0] == 0:
        raise ValueError(
            f"{what} has shape {tuple(C.shape)}; expected a square matrix (d, d). "
            "Pass the covariance sum_t x_t x_t^T, not the activations."
        )
    if C.device.type == "meta":
        raise ValueError(
            f"{what} is on the meta device and has no data; expected a matrix with values. Was it made under "
            "init_empty_weights or torch.device('meta')? Calibrate a model whose weights are loaded."
        )
    if uplo not in UPLO:
        raise ValueError(f"{what.partition(':')[0]}: uplo is {uplo!r}; expected one of {UPLO}.")


def _check_values(full: Tensor, scale: float, what: str) -> None:
    if not math.isfinite(scale):
        bad = int((~torch.isfinite(full)).sum())
        raise ValueError(
            f"{what} has {bad} NaN or infinite entries; expected a finite matrix. Activations that overflow "
            "half precision are the usual cause: calibrate in bfloat16 or float32."
        )
    # One product with a vector sees every entry: an asymmetric part cannot hide from a fixed dense vector except on a
    # set of measure zero. Far cheaper than comparing with the transpose.
    d = full.shape[0]
    probe = torch.linspace(0.5, 1.5, d, dtype=torch.float64, device=full.device).cos()
    largest, difference = torch.stack(
        [full.diagonal().abs().max(), (full @ probe - full.mT @ probe).abs().max()]
    ).tolist()
    if largest == 0:
        raise ValueError(
            f"{what}: the diagonal is zero, so that it carries no activations; expected a positive trace. Did the "
            "calibration data reach this layer (all tokens masked, or an expert that was never routed to)?"
        )
    # 2e-5: triangles that were summed in different orders differ by roundings of float32; a forgotten mirror or a
    # matrix that is not a covariance is off by order 1.
    if difference > 2e-5 * largest * d**0.5:
        raise ValueError(
            f"{what} is not symmetric (|C v - C^T v| reaches {difference / largest:.3e} of the largest diagonal "
            "entry); expected a symmetric matrix. If only one triangle was accumulated, pass uplo='lower' or "
            "call ops.symmetrize_(C) first."
        )


def refuse_indefinite(norm: float, values: Tensor, what: str = "null_space: C") -> None:
    """Refuse a matrix of this Frobenius norm if its least eigenvalue, ``values[0]``, is negative beyond rounding."""
    # A float32 sum of activations has eigenvalues down to about -1e-7 of the largest.
    if float(values[0]) < -1e-5 * norm:
        raise ValueError(
            f"{what} has an eigenvalue of {float(values[0]) / norm:.3e} of its Frobenius norm; "
            "expected a positive semidefinite matrix, as every sum of x x^T is. Was it accumulated in half precision, "
            "or is it a centred, differenced or corrupted matrix?"
        )

"""Proof that nothing below the found eigenvalues was missed, by counting eigenvalues with a factorisation."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

WIDTHS = (1e-3, 1e-2, 1e-1)


def certificate(C: Tensor, basis: Tensor, values: Tensor, r: int) -> dict[str, Any]:
    """Count the eigenvalues of ``C`` below a threshold at the edge of the basis and compare with the Ritz values.

    For ``i`` Ritz values below the threshold ``mu`` there are at least ``i`` eigenvalues below it (Cauchy). If
    ``C - mu I + gamma U_i U_i^T`` has a Cholesky factorisation it is positive definite, and a perturbation of rank
    ``i`` moves at most ``i`` eigenvalues past zero, so that there are at most ``i``. The threshold is put into the
    widest gap between Ritz values near the edge; those above it, up to the ``r``-th, are the cluster at the edge.

    Args:
        C: ``(d, d)`` float64, symmetric.
        basis: ``(d, r)``, Ritz vectors.
        values: Ritz values, ascending; those beyond the ``r``-th, if any, help to find the gap.
        r: How many are wanted.

    Returns:
        ``proved``, ``threshold``, ``below`` (eigenvalues below it) and ``edge`` (``r - below``).
    """
    theta = values.cpu().tolist()
    norm = float(C.norm())
    # A factorisation cannot see shifts smaller than its own rounding.
    floor = len(C) * torch.finfo(torch.float64).eps * norm
    gamma = norm + 2 * abs(theta[r - 1])
    result: dict[str, Any] = {"proved": False}
    for width in WIDTHS:
        low = theta[r - 1] - max(width * abs(theta[r - 1]), floor)
        candidates = [(theta[i] - theta[i - 1], i) for i in range(1, min(r + 1, len(theta))) if theta[i] > low]
        below = max(candidates)[1] if candidates else 0
        if below:
            threshold = (theta[below] + theta[below - 1]) / 2
        if theta[0] > low and (not below or theta[below] - theta[below - 1] < 2 * floor):
            below, threshold = 0, low
        shifted = C.clone()
        shifted.diagonal().sub_(threshold)
        found = basis[:, :below]
        shifted.addmm_(found, found.mT, alpha=gamma)
        proved = int(torch.linalg.cholesky_ex(shifted).info) == 0
        result = {"proved": proved, "threshold": threshold, "below": below, "edge": r - below}
        if proved:
            break
    return result


def of_largest(C: Tensor, basis: Tensor, values: Tensor) -> dict[str, Any]:
    """Do the same from the other end of the spectrum, where ``-C`` has its smallest eigenvalues.

    Args:
        C: ``(d, d)`` float64, symmetric.
        basis: ``(d, n)``, Ritz vectors of the largest eigenvalues, ascending; ``n`` may be 0.
        values: Ritz values, ascending, at least ``n``; those of the basis are the last.

    Returns:
        As :func:`certificate`, with ``above`` (eigenvalues above the threshold) instead of ``below``.
    """
    n = basis.shape[1]
    if not n:
        return {"proved": True, "threshold": math.inf, "above": 0, "edge": 0}
    result = certificate(-C, basis.flip(1), -values.flip(0), n)
    return {
        "proved": result["proved"],
        "threshold": -result["threshold"],
        "above": result["below"],
        "edge": result["edge"],
    }


def rescale(result: dict[str, Any], exponent: int) -> None:
    """Turn the threshold into one of the matrix times ``2^exponent``."""
    result["threshold"] = math.ldexp(result["threshold"], exponent)

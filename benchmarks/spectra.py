"""Covariances with the spectrum of real activations, at any width."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


@cache
def _measured() -> dict:
    return json.loads((Path(__file__).parent / "spectra.json").read_text())


def spectrum(d: int, kind: str = "o") -> Tensor:
    """Return ``d`` eigenvalues in ascending order, the largest 1, in fp64.

    The smooth part is interpolated by relative index from the measured spectrum; the isolated tiny eigenvalues
    below it keep their number and size.

    Args:
        d: Width.
        kind: Which linear input: ``"qkv"``, ``"o"``, ``"gate_up"`` or ``"down"``.
    """
    measured = _measured()[kind]
    isolated = measured["isolated_log10"][: max(0, d - 1)]
    bulk = d - len(isolated)
    t = (np.arange(bulk) + 0.5) / bulk
    # Near the bottom, and below its first point, the spectrum is a power of the index.
    x, y = np.log(np.array(measured["index"])), np.array(measured["log10"])
    values = np.interp(np.log(t), x, y)
    below = np.log(t) < x[0]
    slope = (y[4] - y[0]) / (x[4] - x[0])
    values[below] = y[0] + slope * (np.log(t[below]) - x[0])
    values[-1] = 0.0
    return torch.tensor(np.sort(10.0 ** np.concatenate([isolated, values])), dtype=torch.float64)


def covariance(d: int, kind: str = "o", *, seed: int = 0, device: str = "cpu") -> tuple[Tensor, Tensor]:
    """Return a dense symmetric ``C (d, d)`` in fp64 and its exact eigenvalues in ascending order.

    ``C = Q diag Q^T``. On a CPU ``Q`` is a product of random signs, permutations and cosine transforms: orthogonal to
    rounding at a cost of ``d^2 log d``, where the QR of a random matrix, taken on a GPU, costs more than the
    solvers that are timed.
    """
    from scipy import fft

    eigenvalues = spectrum(d, kind)
    if device == "cuda":
        random = torch.randn(d, d, generator=torch.Generator(device).manual_seed(seed), device=device)
        Q = torch.linalg.qr(random.double())[0]
        C = (Q * eigenvalues.to(device)) @ Q.T
        return (C + C.T) / 2, eigenvalues
    generator = np.random.default_rng(seed)
    matrix = np.diag(eigenvalues.numpy())
    for _ in range(3):
        signs = generator.choice([-1.0, 1.0], d)
        order = generator.permutation(d)
        matrix = signs[:, None] * matrix[order][:, order] * signs
        for axis in (0, 1):
            matrix = fft.dct(matrix, axis=axis, norm="ortho", overwrite_x=True, workers=-1)
    C = torch.from_numpy(np.ascontiguousarray(matrix)).to(device)
    return (C + C.T) / 2, eigenvalues


def energy(C: Tensor, basis: Tensor) -> float:
    """``tr(U^T C U)`` in fp64, of the orthonormalised basis: a basis that is short must not look quiet."""
    Q, _ = torch.linalg.qr(basis.double())
    return float((Q * (C @ Q)).sum())

"""Covariances with known spectra: what the solver must get right."""

import json
from pathlib import Path

import numpy as np
import torch

MEASURED = Path(__file__).parents[2] / "benchmarks" / "spectra.json"


def with_spectrum(eigenvalues, seed=0):
    """Return ``(C, V)``: ``C = V diag(eigenvalues) V^T`` in float64, exactly symmetric."""
    values = torch.as_tensor(eigenvalues, dtype=torch.float64)
    generator = torch.Generator().manual_seed(seed)
    V, _ = torch.linalg.qr(torch.randn(len(values), len(values), generator=generator, dtype=torch.float64))
    C = (V * values) @ V.mT
    return (C + C.mT) / 2, V


def power(d, exponent):
    return np.arange(1, d + 1.0) ** -exponent


def exponential(d, decades):
    return 10.0 ** (-decades * np.arange(d) / max(1, d - 1))


def isolated(d, count, decades):
    """A smooth spectrum with ``count`` values below it, each further down."""
    values = np.linspace(0.1, 1.0, d) ** 2
    count = min(count, d - 1)
    values[:count] *= 10.0 ** -np.linspace(decades, 3, count)
    return values


def null(d, nullity):
    values = np.linspace(0.1, 1.0, d)
    values[: min(nullity, d - 1)] = 0
    return values


def repeated(d, low, high):
    """Equal eigenvalues from index ``low`` to ``high`` in a smooth spectrum."""
    values = np.linspace(0.1, 1.0, d)
    values[low:high] = values[min(low, d - 1)]
    return values


def measured(d, kind):
    """The spectrum of a SmolLM2-135M covariance, interpolated by relative index, isolated values kept."""
    data = json.loads(MEASURED.read_text())[kind]
    bulk = d - len(data["isolated_log10"])
    t = (np.arange(bulk) + 0.5) / bulk
    smooth = np.interp(np.log(t), np.log(data["index"]), data["log10"])
    return 10.0 ** np.concatenate([data["isolated_log10"], smooth])


def few_tokens(d, tokens, seed=0):
    """A covariance of rank ``tokens < d``, summed in float32 as calibration does."""
    X = torch.randn(tokens, d, generator=torch.Generator().manual_seed(seed))
    return X.T @ X


def optimum(C, r):
    """The least energy of any ``r``-dimensional subspace, and the size of its rounding."""
    values = torch.linalg.eigvalsh(C.double())
    return float(values[:r].sum()), r * 1e-15 * float(C.double().norm())


def assert_null_space(C, r, result, excess=1e-3):
    """Orthonormal to 1e-12; at most ``excess`` above the optimum; eigenvalues and energy belong to the basis."""
    C, U = C.double(), result.basis.double()
    assert U.shape == (len(C), r)
    departure = float((U.mT @ U - torch.eye(r, dtype=torch.float64)).abs().max())
    assert departure <= 1e-12, f"basis departs from orthonormal by {departure:.2e}"
    best, rounding = optimum(C, r)
    energy = float((U * (C @ U)).sum())
    assert energy <= best + excess * abs(best) + rounding, f"energy {energy:.9e}, optimum {best:.9e}"
    assert energy >= best - rounding, f"energy {energy:.9e} below the optimum {best:.9e}"
    assert abs(result.energy - energy) <= 1e-9 * abs(best) + rounding
    assert bool((result.eigenvalues.diff() >= 0).all()), "eigenvalues are not ascending"
    diagonal = (U * (C @ U)).sum(dim=0)
    assert float((diagonal - result.eigenvalues).abs().max()) <= 1e-9 * float(diagonal.abs().max()) + rounding

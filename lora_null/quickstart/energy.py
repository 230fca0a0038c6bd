"""How close the rows of an adapter's A are to the best null space of the activations."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..covariances.covariances import Covariances


def optimal_energies(covariances: Covariances, r: int, *, progress: bool = True) -> dict[str, float]:
    """Return the sum of the ``r`` smallest eigenvalues of each covariance, by group, in float64.

    Computed by LAPACK from the full spectrum, without this package's solver: it is what that solver is judged by.
    """
    bar = tqdm(covariances.items(), "optimal energies", total=len(covariances), unit="matrix", disable=not progress)
    return {key: float(torch.linalg.eigvalsh(C.double())[:r].sum()) for key, C in bar}


def energy_over_optimum(
    lora_A: Mapping[str, Tensor], covariances: Covariances, optimum: Mapping[str, float]
) -> list[float]:
    """Return ``tr(Q^T C Q) / optimum`` of each layer, ``Q (d, r)`` an orthonormal basis of the rows of A ``(r, d)``.

    1 is the null space; ``tr(C) r / d`` over the optimum, often many powers of ten, is a random choice.
    """
    ratios = []
    for name, factor in lora_A.items():
        C = covariances[name].double()
        Q, _ = torch.linalg.qr(factor.detach().to(C.device, torch.float64).T)
        ratios.append(float((Q * (C @ Q)).sum()) / optimum[covariances.group_of(name)])
    return ratios

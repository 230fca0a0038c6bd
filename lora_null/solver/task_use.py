"""Free directions that a task uses: the choice of an adapter's input directions when the task's text is known."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from . import certificate, checks
from .exact import exact
from .null_basis import NullBasis

# Of the mean eigenvalue. The directions beyond 99 % of the energy, about a third of all (arXiv 2609.25618), have a mean
# of 0.03: differences among them count, those far below do not.
DAMPING = 1e-2


def most_used(T: Tensor, free: NullBasis, r: int, rounding: float) -> Tensor:
    """Return the ``r`` free directions that hold most of the task's energy: the largest eigenvectors of ``N^T T N``.

    Args:
        T: ``(d, d)`` float64, covariance of the task's text.
        free: Of the covariance to keep, float64, with at least ``r`` directions.
        r: How many are wanted.
        rounding: Of ``T``, relative.

    Returns:
        ``(d, r)`` orthonormal.

    Raises:
        ValueError: the task has no energy in the free directions, or ``T`` is indefinite.
    """
    norm = float(T.norm())
    N, P = free.basis, free.complement
    if N is not None:
        compressed = _symmetric(N.mT @ (T @ N))
    else:
        assert P is not None
        # The same on all of R^d, with the protected directions put below every other eigenvalue.
        rows = T - P @ (P.mT @ T)
        compressed = _symmetric(rows - (rows @ P) @ P.mT - 2 * norm * (P @ P.mT))
    values, S = exact(compressed, lambda values: (len(values) - r, len(values)), overwrite=True)
    checks.refuse_indefinite(norm, values[len(values) - free.k :], "null_space: task")
    # Of T, each entry to `rounding` of itself; of the free directions and the products with them, sqrt(d) of fp64's.
    if float(values[-1]) <= 4 * max(rounding, len(T) ** 0.5 * torch.finfo(T.dtype).eps) * norm:
        raise ValueError(
            f"null_space: task sees nothing in the {free.k} free directions (its largest eigenvalue there is "
            f"{float(values[-1]) / norm:.1e} of its norm, which is rounding); expected a task that uses some of them. "
            "Is its text a part of the text to keep, or from fewer tokens than features? Leave task out for the least "
            "used directions, lower energy, or calibrate on more of the task's text."
        )
    if N is not None:
        return N @ S
    assert P is not None
    return torch.linalg.qr(S - P @ (P.mT @ S))[0]


def most_used_per_energy(
    T: Tensor, C: Tensor, r: int, damping: float, certify: bool
) -> tuple[Tensor, dict[str, Any] | None]:
    """Return the leading generalised eigenvectors of ``(T, C + damping mu I)``, ``mu`` the mean eigenvalue of ``C``.

    The first maximises ``u^T T u / u^T (C + damping mu I) u``, and so on in their complement in that metric.

    Args:
        T: ``(d, d)`` float64, covariance of the task's text.
        C: ``(d, d)`` float64, covariance to keep.
        r: How many are wanted.
        damping: Positive; the larger, the less ``C`` counts.
        certify: Prove that they are the leading ones.

    Returns:
        Their span, orthonormalised, ``(d, r)``, and the certificate if asked for, of the whitened matrix.

    Raises:
        ValueError: ``T`` or ``C`` is indefinite.
    """
    damped = C.clone()
    damped.diagonal().add_(damping * float(C.diagonal().mean()))
    L, failed = torch.linalg.cholesky_ex(damped)
    if int(failed):
        raise ValueError(
            f"null_space: C is not positive definite with damping={damping}; expected a positive semidefinite matrix "
            "up to rounding. A float32 sum has eigenvalues down to -1e-7 of the largest: raise damping above that, or "
            "look for a centred or corrupted matrix."
        )
    # L^-1 T L^-T: two solves from the left, T being symmetric.
    half = torch.linalg.solve_triangular(L, T, upper=False)
    whitened = _symmetric(torch.linalg.solve_triangular(L, half.mT, upper=False)).contiguous()
    values, S = exact(whitened, lambda values: (len(values) - r, len(values)), overwrite=not certify)
    checks.refuse_indefinite(float(values.norm()), values, "null_space: task")
    proof = certificate.of_largest(whitened, S, values) if certify else None
    # From the leading down: QR keeps the span of the first columns.
    return torch.linalg.qr(torch.linalg.solve_triangular(L.mT, S.flip(1), upper=True))[0], proof


def by_energy(C: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Turn a basis within its span so that ``U^T C U`` is diagonal; return ``U (d, r)`` and the diagonal, ascending."""
    values, S = torch.linalg.eigh(_symmetric(basis.mT @ (C @ basis)))
    return basis @ S, values.cpu()


def _symmetric(M: Tensor) -> Tensor:
    return (M + M.mT) / 2

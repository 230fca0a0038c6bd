"""The null space of a covariance: eigenvectors of its ``r`` smallest eigenvalues."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..system import extension
from . import certificate, checks, exact

if TYPE_CHECKING:
    pass

METHODS = ("auto", "exact", "filtered")
# From where on the filtered solver wins: order of C, and how many times the rank that must be. CPU: measured on two
# Zen 4 cores with real spectra at r = 128, 0.7 to 0.95 times as fast as syevr at d = 2048 and 1.9 to 2.7 times at 4096.
# CUDA: estimated, not measured.
FILTERED_FROM = {"cpu": (1024, 20), "cuda": (512, 6)}


@dataclass(frozen=True)
class NullSpace:
    """The ``r`` directions that the activations use least.

    Attributes:
        basis: ``U (d, r)``, orthonormal columns, in the order of the eigenvalues.
        eigenvalues: ``(r,)`` float64 on the host, ascending. Values below about ``1e-16`` of the largest eigenvalue
            of ``C`` are rounding, and may be negative.
        energy: ``tr(U^T C U)``, the sum of the eigenvalues: what the basis catches of the activations.
        info: How it was found, see :func:`null_space`.
    """

    basis: Tensor
    eigenvalues: Tensor
    energy: float
    info: dict[str, Any] = field(default_factory=dict, compare=False)


def null_space(
    C: Tensor,
    r: int,
    *,
    method: str = "auto",
    tol: float = 1e-4,
    oversample: int | None = None,
    max_cycles: int = 16,
    seed: int = 0,
    certify: bool = False,
    uplo: str = "full",
    dtype: torch.dtype = torch.float64,
) -> NullSpace:
    """Solve for the eigenvectors of the ``r`` smallest eigenvalues of a covariance, in float64, on its device.

    ``exact`` is a direct eigensolver (LAPACK's ``syevr`` by index on the CPU, ``eigh`` on CUDA). ``filtered`` is one
    Cholesky factorisation and a block Krylov space of the inverse, stopped when the energy of the basis is within
    ``tol`` of the least possible; it hands over to ``exact`` where that does not come about. ``auto`` picks by size.
    The adapter depends on the subspace only through its energy, so single vectors of a cluster are not resolved.

    Args:
        C: ``(d, d)`` float32 or float64, symmetric positive semidefinite up to rounding. Not modified.
        r: Number of vectors, ``1 <= r <= d``.
        method: ``"auto"``, ``"exact"`` or ``"filtered"``.
        tol: Excess of ``tr(U^T C U)`` over the sum of the ``r`` smallest eigenvalues that ends the iteration, relative.
            Energies below the rounding of ``C``, ``r * 2e-16 * |C|``, count as zero.
        oversample: Vectors beyond ``r`` in the final Rayleigh-Ritz step; ``None`` means ``max(8, r // 8)``.
        max_cycles: Rayleigh-Ritz tests before handing over, one per ``r / 2`` columns of the Krylov space.
        seed: Of the random start. Equal seeds give equal results on one machine, and results equal up to rounding
            on any device and number of threads.
        certify: Prove the result with one more factorisation, see ``info["certificate"]``; what cannot be proved is
            solved directly.
        uplo: Which part of ``C`` holds the data: ``"full"``, or ``"lower"`` / ``"upper"`` for one triangle with the
            diagonal, whatever the rest contains.
        dtype: Of the basis.

    Returns:
        A :class:`NullSpace`. Its ``info`` has ``method`` (the one that gave the result), ``seconds`` per phase and
        ``gap`` (``lambda_{r+1} / lambda_r - 1``, an upper bound, ``None`` where it is unknown). From the filtered
        solver also ``cycles``, ``columns`` (dimension of the space), ``shift`` (absolute) and ``attempts`` of the
        factorisation, ``residual`` (largest ``|C u - theta u|`` over the Frobenius norm of ``C``), and
        ``handed_over`` with the reason where ``exact`` finished the job. With ``certify``: ``certificate``, a dict
        of ``proved``, ``threshold``, ``below`` (eigenvalues below the threshold, counted) and ``edge`` (how many of
        the ``r`` belong to a cluster at the edge that the count cannot separate).

    Raises:
        TypeError: ``C`` or ``r`` has the wrong type.
        ValueError: ``C`` is not square, has NaN or infinite entries, is zero, asymmetric or clearly indefinite;
            ``r`` is out of range; an unknown option.
    """
    if method not in METHODS:
        raise ValueError(f"null_space: method is {method!r}; expected one of {METHODS}.")
    if not 0 < tol < 1:
        raise ValueError(f"null_space: tol is {tol!r}; expected a relative excess in energy in (0, 1).")
    if (oversample is not None and oversample < 0) or max_cycles < 1:
        raise ValueError(
            f"null_space: oversample is {oversample!r} and max_cycles {max_cycles!r}; expected oversample >= 0 and "
            "max_cycles >= 1."
        )
    begin = time.perf_counter()
    full = checks.working_copy(C, uplo)
    r = checks.check_rank(r, len(full))
    prepared = time.perf_counter() - begin

    values = basis = None
    info: dict[str, Any] = {"method": "exact", "seconds": {}}
    if method == "filtered" or (method == "auto" and _pays(full, r)):
        oversample = max(8, r // 8) if oversample is None else oversample
        basis, values, info = _filtered(
            full, r, tol=tol, oversample=oversample, max_cycles=max_cycles, seed=seed, patient=method == "filtered"
        )
        reason = info.pop("reason")
        info["method"] = "filtered"
        if basis is None:
            info.update(method="exact", handed_over=reason)
    info["seconds"] = {"prepare": prepared, **info["seconds"]}
    if basis is None or values is None:
        basis, values = _exact(full, r, info)
    _refuse_indefinite(full, values)
    if certify:
        info["certificate"] = _certificate(full, basis, values, r, info)
        if not info["certificate"]["proved"] and info["method"] == "filtered":
            info.update(method="exact", handed_over="the certificate failed")
            basis, values = _exact(full, r, info)
            info["certificate"] = _certificate(full, basis, values, r, info)
    info["gap"] = float(values[r] / values[r - 1]) - 1 if len(values) > r and values[r - 1] > 0 else None
    info["seconds"]["total"] = time.perf_counter() - begin
    values = values[:r].clone()
    return NullSpace(basis.to(dtype), values, float(values.sum()), info)


def _pays(C: Tensor, r: int) -> bool:
    size, ratio = FILTERED_FROM.get(C.device.type, FILTERED_FROM["cpu"])
    return len(C) >= max(size, ratio * r)


def _filtered(C: Tensor, r: int, **options: Any) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
    compiled = extension.load()
    if compiled is None:  # load() has warned
        return None, None, {"seconds": {}, "reason": "there is no C++ extension"}
    return compiled.filtered(C, r, **options)


def _exact(C: Tensor, r: int, info: dict[str, Any]) -> tuple[Tensor, Tensor]:
    clock = time.perf_counter()
    # One value beyond r for the gap: an eigenvector more out of d costs nothing.
    values, vectors = exact.exact(C, min(len(C), r + 1))
    info["seconds"]["exact"] = time.perf_counter() - clock
    return vectors[:, :r].contiguous(), values.cpu()


def _certificate(C: Tensor, basis: Tensor, values: Tensor, r: int, info: dict[str, Any]) -> dict[str, Any]:
    clock = time.perf_counter()
    result = certificate.certificate(C, basis, values, r)
    info["seconds"]["certify"] = info["seconds"].get("certify", 0.0) + time.perf_counter() - clock
    return result


def _refuse_indefinite(C: Tensor, values: Tensor) -> None:
    # A float32 sum of activations has eigenvalues down to about -1e-7 of the largest.
    if float(values[0]) < -1e-5 * float(C.norm()):
        raise ValueError(
            f"null_space: C has the eigenvalue {float(values[0]):.3e}, its Frobenius norm is {float(C.norm()):.3e}; "
            "expected a positive semidefinite matrix, as every sum of x x^T is. Was it accumulated in half precision, "
            "or is it a centred, differenced or corrupted matrix?"
        )

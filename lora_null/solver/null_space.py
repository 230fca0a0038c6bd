"""The null space of a covariance: the directions that the activations use least, or that a task uses among the free."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from ..system import extension
from . import certificate, checks, task_use
from .exact import exact
from .null_basis import bound, free_directions, split
from .options import check_dtype, check_options, check_rank

# From where on the filtered solver wins: order of C, and how many times the rank that must be. CPU: measured on two
# Zen 4 cores with real spectra at r = 128, 0.7 to 0.95 times as fast as syevr at d = 2048 and 1.9 to 2.7 times at 4096.
# CUDA: estimated, not measured.
FILTERED_FROM = {"cpu": (1024, 20), "cuda": (512, 6)}


@dataclass(frozen=True)
class NullSpace:
    """The ``r`` directions that an adapter reads.

    Attributes:
        basis: ``U (d, r)``, orthonormal columns, in the order of the eigenvalues.
        eigenvalues: ``(r,)`` float64 on the host, ascending: the energies ``u^T C u`` of the columns; ``U^T C U`` is
            diagonal. Eigenvalues of ``C`` unless a task chose the span. Values below about ``1e-16`` of the largest
            eigenvalue of ``C`` are rounding, and may be negative.
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
    task: Tensor | None = None,
    energy: float | None = None,
    damping: float | None = None,
    method: str = "auto",
    tol: float = 1e-4,
    oversample: int | None = None,
    max_cycles: int = 16,
    seed: int = 0,
    certify: bool = False,
    uplo: str = "full",
    dtype: torch.dtype = torch.float64,
) -> NullSpace:
    """Solve for the ``r`` input directions of an adapter that keeps what ``C`` holds, in float64, on its device.

    Without a task: the eigenvectors of the ``r`` smallest eigenvalues (LoRA-Null, arXiv 2503.02659). ``exact`` is a
    direct eigensolver (LAPACK's tridiagonal reduction and MRRR on the CPU, ``eigh`` on CUDA). ``filtered`` is one
    Cholesky factorisation and a block Krylov space of the inverse, stopped when the energy of the basis is within
    ``tol`` of the least possible; it hands over to ``exact`` where that does not come about. ``auto`` picks by size.
    The adapter depends on the subspace only through its energy, so single vectors of a cluster are not resolved.

    With a task, a direction must be free of what ``C`` keeps and of use to the task ``T``. With ``energy``: of the
    ``k`` directions that it leaves free (:func:`lora_null.null_basis`), those that hold most of the task, the span of
    the ``r`` largest eigenvectors of ``N^T T N``. ``k = r`` is the null space as without a task; ``energy=0``,
    ``k = d``, is the principal space of the task (EVA, arXiv 2410.07170), which keeps nothing. Without ``energy``: the
    span of the ``r`` leading generalised eigenvectors of ``(T, C + damping mu I)``, ``mu = tr(C) / d``, a choice by the
    ratio of the two energies with no bound in advance.

    Whatever the choice, an update ``dW = M U^T`` moves the layer's outputs on the calibration inputs ``X``,
    ``C = X X^T``, by ``|dW X|_F <= |M|_2 energy^(1/2)``.

    Args:
        C: ``(d, d)`` float32 or float64, symmetric positive semidefinite up to rounding. Not modified.
        r: Number of vectors, ``1 <= r <= d``.
        task: ``T (d, d)``, the covariance of the same layer on the task's own text, in the same form as ``C``.
        energy: Share of ``tr(C)`` to protect, in ``[0, 1)``; the directions beyond it are free. Without a task it only
            refuses a rank that is larger than their number.
        damping: For a task without ``energy``, positive; ``None`` means 0.01. The larger, the less ``C`` counts.
        method: ``"auto"``, ``"exact"`` or ``"filtered"``; with ``task`` or ``energy`` the solution is ``exact``.
        tol: Excess of ``tr(U^T C U)`` over the sum of the ``r`` smallest eigenvalues that ends the iteration, relative.
            Energies below the rounding of ``C``, ``r * 2e-16 * |C|``, count as zero.
        oversample: Vectors beyond ``r`` in the final Rayleigh-Ritz step; ``None`` means ``max(8, r // 8)``.
        max_cycles: Rayleigh-Ritz tests before handing over, one per ``r / 2`` columns of the Krylov space.
        seed: Of the random start. Equal seeds give equal results on one machine, and results equal up to rounding
            on any device and number of threads.
        certify: Prove the result with one more factorisation, see ``info["certificate"]``; what cannot be proved is
            solved directly.
        uplo: Which part of ``C`` and ``task`` holds the data: ``"full"``, or ``"lower"`` / ``"upper"`` for one triangle
            with the diagonal, whatever the rest contains.
        dtype: Of the basis.

    Returns:
        A :class:`NullSpace`. Its ``info`` has ``method`` (the one that gave the result), ``seconds`` per phase,
        ``bound`` (``(energy / tr(C))^(1/2)``: ``|dW X|_F <= bound |dW|_2 |X|_F``) and without a task ``gap``
        (``lambda_{r+1} / lambda_r - 1``, an upper bound, ``None`` where it is unknown). With ``energy`` also ``k``, the
        number of free directions; with ``task`` also ``task_share``, ``tr(U^T T U) / tr(T)``. From the filtered
        solver also ``cycles``, ``columns`` (dimension of the space), ``shift`` (absolute) and ``attempts`` of the
        factorisation, ``residual`` (largest ``|C u - theta u|`` over the Frobenius norm of ``C``), and
        ``handed_over`` with the reason where ``exact`` finished the job. With ``certify``: ``certificate``, a dict
        of ``proved``, ``threshold``, ``below`` or ``above`` (eigenvalues on that side of the threshold, counted) and
        ``edge`` (how many of the wanted belong to a cluster at the edge that the count cannot separate). It is about
        ``C``: about its ``r`` smallest eigenvalues, or with ``task`` and ``energy`` about the smaller of the free and
        the protected directions; with ``task`` alone about the ``r`` largest generalised eigenvalues.

    Raises:
        TypeError: ``C``, ``task``, ``r`` or an option has the wrong type.
        ValueError: ``C`` or ``task`` is not square, has NaN or infinite entries, is zero, asymmetric or clearly
            indefinite; they differ in size; ``r`` is out of range; ``energy`` leaves fewer than ``r`` directions free,
            or none that the task uses; an unknown option.
    """
    check_options(task, energy, damping, method, tol, oversample, max_cycles, seed)
    check_dtype("null_space", dtype)
    begin = time.perf_counter()
    full, exponent = checks.working_copy(C, uplo)
    r = check_rank(r, len(full))
    T = None if task is None else _task_copy(task, full, uplo)
    info: dict[str, Any] = {"method": "exact", "seconds": {"prepare": time.perf_counter() - begin}}
    if T is not None:
        rounding = torch.finfo(task.dtype).eps if task is not None else 0.0
        basis, values = _of_task(T, full, r, energy, damping, rounding, certify, info)
    else:
        options = {"tol": tol, "oversample": oversample, "max_cycles": max_cycles, "seed": seed, "method": method}
        basis, values = _least_used(full, r, energy, options, certify, info)
        info["gap"] = float(values[r] / values[r - 1]) - 1 if len(values) > r and values[r - 1] > 0 else None
    if "shift" in info:
        info["shift"] = math.ldexp(info["shift"], exponent)
    if certify:
        certificate.rescale(info["certificate"], exponent)
    info["bound"] = bound(float(values[:r].sum()), full.diagonal().sum())
    info["seconds"]["total"] = time.perf_counter() - begin
    values = checks.scaled(values[:r].clone(), exponent)
    return NullSpace(basis.to(dtype), values, float(values.sum()), info)


def workspace(d: int, r: int, tokens: int) -> int:
    """Return the bytes that :func:`null_space` takes on the CPU besides ``C (d, d)``.

    Measured at d from 2560 to 8192: within 3 %.

    Args:
        d: Side of the matrix.
        r: Number of directions.
        tokens: That the matrix sums up; the filter hands over on a ``C`` of fewer than ``d``, whose least eigenvalues
            are the rounding of the sums.
    """
    size, ratio = FILTERED_FROM["cpu"]
    if d >= max(size, ratio * r) and tokens >= d:
        # the copy of C, the shifted one that becomes its factor; the Krylov space and its turns
        return 8 * (2 * d * d + 20 * r * d)
    # the copy of C, the one that LAPACK reduces, and room for all vectors that scipy sets to zero; then the vectors
    return 8 * (3 * d * d + 3 * r * d // 2)


def _least_used(
    C: Tensor, r: int, energy: float | None, options: dict[str, Any], certify: bool, info: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    method, oversample = options.pop("method"), options.pop("oversample")
    values = basis = None
    if energy is None and (method == "filtered" or (method == "auto" and _pays(C, r))):
        oversample = max(8, r // 8) if oversample is None else oversample
        basis, values, found = _filtered(C, r, oversample=oversample, patient=method == "filtered", **options)
        reason, seconds = found.pop("reason"), found.pop("seconds")
        info["seconds"].update(seconds)
        info.update(found, method="filtered")
        if basis is None:
            info.update(method="exact", handed_over=reason)
    if basis is None or values is None:
        basis, values = _exact(C, r, energy, info)
    checks.refuse_indefinite(float(C.norm()), values)
    if certify:
        info["certificate"] = _certificate(C, basis, values, r, info)
        if not info["certificate"]["proved"] and info["method"] == "filtered":
            info.update(method="exact", handed_over="the certificate failed")
            basis, values = _exact(C, r, energy, info)
            info["certificate"] = _certificate(C, basis, values, r, info)
    return basis, values


def _of_task(
    T: Tensor,
    C: Tensor,
    r: int,
    energy: float | None,
    damping: float | None,
    rounding: float,
    certify: bool,
    info: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    clock = time.perf_counter()
    if energy is None:
        damping = task_use.DAMPING if damping is None else damping
        span, proof = task_use.most_used_per_energy(T, C, r, damping, certify)
    else:
        free = split(C, energy, r, "null_space", certify=certify)
        info["k"] = free.k
        span, proof = task_use.most_used(T, free, r, rounding), free.info.get("certificate")
    if proof is not None:
        info["certificate"] = proof
    basis, values = task_use.by_energy(C, span)
    info["task_share"] = float((basis * (T @ basis)).sum() / T.diagonal().sum())
    info["seconds"]["exact"] = time.perf_counter() - clock
    return basis, values


def _task_copy(task: Tensor, C: Tensor, uplo: str) -> Tensor:
    T, _ = checks.working_copy(task, uplo, "null_space: task")
    if T.shape != C.shape:
        raise ValueError(
            f"null_space: task has the size {len(T)}, C {len(C)}; expected two covariances of one layer. Were they "
            "collected on different models, or for different layers?"
        )
    return T.to(C.device)


def _pays(C: Tensor, r: int) -> bool:
    size, ratio = FILTERED_FROM.get(C.device.type, FILTERED_FROM["cpu"])
    return len(C) >= max(size, ratio * r)


def _filtered(C: Tensor, r: int, **options: Any) -> tuple[Tensor | None, Tensor | None, dict[str, Any]]:
    compiled = extension.load()
    if compiled is None:  # load() has warned
        return None, None, {"seconds": {}, "reason": "there is no C++ extension"}
    return compiled.filtered(C, r, **options)


def _exact(C: Tensor, r: int, energy: float | None, info: dict[str, Any]) -> tuple[Tensor, Tensor]:
    def choose(values: Tensor) -> tuple[int, int]:
        assert energy is not None
        info["k"] = free_directions(values, energy, r, "null_space")
        return 0, r

    clock = time.perf_counter()
    # One value beyond r for the gap: a vector more costs next to nothing.
    values, basis = exact(C, min(len(C), r + 1) if energy is None else choose)
    info["seconds"]["exact"] = time.perf_counter() - clock
    return basis[:, :r].contiguous(), values


def _certificate(C: Tensor, basis: Tensor, values: Tensor, r: int, info: dict[str, Any]) -> dict[str, Any]:
    clock = time.perf_counter()
    result = certificate.certificate(C, basis, values, r)
    info["seconds"]["certify"] = info["seconds"].get("certify", 0.0) + time.perf_counter() - clock
    return result

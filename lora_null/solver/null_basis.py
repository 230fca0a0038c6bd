"""All directions that are free: everything but the leading eigenvectors that hold a share of the energy."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import certificate, checks
from .exact import exact
from .options import ENERGY, check_dtype, check_number, check_rank


@dataclass(frozen=True)
class NullBasis:
    """The ``k`` free directions of a covariance, as the smaller of themselves and their complement.

    Attributes:
        basis: ``N (d, k)``, orthonormal columns, by ascending eigenvalue; ``None`` where the complement is smaller.
        complement: ``P (d, d - k)``, orthonormal columns, the protected directions, by ascending eigenvalue; ``None``
            where the basis is smaller. ``N N^T = I - P P^T``.
        k: How many directions are free.
        eigenvalues: ``(d,)`` float64 on the host, ascending: of ``C``, the first ``k`` of the free directions. Values
            below about ``1e-16`` of the largest are rounding, and may be negative.
        energy_left: ``tr(N^T C N)``, the sum of the ``k`` free eigenvalues.
        info: ``seconds``, the ``bound`` (see :func:`null_basis`), and ``certificate`` where it was asked for.
    """

    basis: Tensor | None
    complement: Tensor | None
    k: int
    eigenvalues: Tensor
    energy_left: float
    info: dict[str, Any] = field(default_factory=dict, compare=False)

    def project(self, A: Tensor) -> Tensor:
        """Return the rows of ``A (r, d)`` projected onto the free directions, in the wider of the two types.

        ``A N N^T``, or ``A - (A P) P^T``: the same up to rounding. Rounded to bf16 the result leaks about ``2^-9 |A|``
        back into the protected directions.
        """
        held = self.basis if self.complement is None else self.complement
        assert held is not None
        dtype = torch.promote_types(A.dtype, held.dtype)
        wide, held = A.to(dtype), held.to(dtype)
        inside = (wide @ held) @ held.mT
        return inside if self.complement is None else wide - inside

    def leak(self, A: Tensor) -> float:
        """Return the part of the rows of ``A (r, d)`` that is not free, ``|A - A N N^T|_F / |A|_F``, in float64."""
        wide = A.detach().double()
        return float((wide - self.project(wide)).norm() / wide.norm())


def null_basis(
    C: Tensor,
    energy: float,
    *,
    at_least: int = 0,
    certify: bool = False,
    uplo: str = "full",
    dtype: torch.dtype = torch.float64,
) -> NullBasis:
    """Split the directions of a covariance into the protected, which hold a share of its energy, and the free.

    Protected are the fewest leading eigenvectors whose eigenvalues sum to ``energy * tr(C)`` (Null-Basis LoRA,
    arXiv 2609.25618). An update ``dW`` whose rows are free moves the layer's outputs on the calibration inputs ``X``,
    ``C = X X^T``, by ``|dW X|_F <= |dW|_2 bound |X|_F`` with ``bound = sqrt(energy_left / tr(C)) <= sqrt(1 - energy)``.
    Solved in float64 on the device of ``C``; on the CPU only the vectors that are returned are computed.

    Args:
        C: ``(d, d)`` float32 or float64, symmetric positive semidefinite up to rounding. Not modified.
        energy: Share of ``tr(C)`` to protect, in ``[0, 1)``. 0 leaves all directions free.
        at_least: So many of the least used directions are free whatever the energy, up to ``d``.
        certify: Prove with one more factorisation that no eigenvalue was missed; ``info["certificate"]`` has the
            entries described in :func:`lora_null.null_space`, counted from the side whose vectors are held.
        uplo: Which part of ``C`` holds the data: ``"full"``, ``"lower"`` or ``"upper"``.
        dtype: Of the vectors.

    Returns:
        A :class:`NullBasis`.

    Raises:
        TypeError: ``C``, ``energy``, ``at_least`` or ``dtype`` has the wrong type.
        ValueError: ``C`` is not a covariance, see :func:`lora_null.null_space`; ``energy`` or ``at_least`` is out of
            range; no direction is free.
    """
    begin = time.perf_counter()
    check_number("null_basis: energy", energy, 0, 1, ENERGY)
    check_dtype("null_basis", dtype)
    full, exponent = checks.working_copy(C, uplo, "null_basis: C")
    at_least = check_rank(at_least, len(full), "null_basis: at_least") if at_least else 0
    own = full.data_ptr() != C.data_ptr() and not certify
    found = split(full, energy, 1, "null_basis", at_least=at_least, certify=certify, overwrite=own)
    del full
    if certify:
        certificate.rescale(found.info["certificate"], exponent)
    found.info["seconds"] = time.perf_counter() - begin
    vectors = {"basis": found.basis, "complement": found.complement}
    values = checks.scaled(found.eigenvalues, exponent)
    return NullBasis(
        **{name: held if held is None else held.to(dtype) for name, held in vectors.items()},
        k=found.k,
        eigenvalues=values,
        energy_left=float(values[: found.k].sum()),
        info=found.info,
    )


def workspace(d: int) -> int:
    """Return the bytes that :func:`null_basis` takes on the CPU besides ``C (d, d)`` in float32, half of all held."""
    # the copy of C, which LAPACK reduces, and room for all vectors; then at most d / 2 of them and a copy
    return 8 * (2 * d * d + 5 * d * d // 8)


def split(
    C: Tensor,
    energy: float,
    r: int,
    caller: str,
    *,
    at_least: int = 0,
    certify: bool = False,
    overwrite: bool = False,
) -> NullBasis:
    """Do the work of :func:`null_basis` on a checked matrix, if it leaves ``r`` directions free."""
    d, k = len(C), 0

    def choose(values: Tensor) -> tuple[int, int]:
        nonlocal k
        k = free_directions(values, energy, r, caller, at_least)
        return (0, k) if k <= d - k else (k, d)

    values, vectors = exact(C, choose, overwrite=overwrite)
    left = float(values[:k].sum())
    info: dict[str, Any] = {"bound": bound(left, values.sum())}
    basis, complement = (vectors, None) if k <= d - k else (None, vectors)
    if certify and basis is not None:
        info["certificate"] = certificate.certificate(C, basis, values, k)
    elif certify:
        info["certificate"] = certificate.of_largest(C, vectors, values)
    return NullBasis(basis, complement, k, values, left, info)


def bound(energy: float, trace: float | Tensor) -> float:
    """Return ``sqrt(energy / tr(C))``; an energy that rounding has left below zero counts as zero."""
    return (max(energy, 0.0) / float(trace)) ** 0.5


def free_directions(values: Tensor, energy: float, r: int, caller: str, at_least: int = 0) -> int:
    """Count the eigenvalues (ascending) that are not among the leading ones that hold the share ``energy``.

    The ``at_least`` smallest are not, whatever they hold.

    Raises:
        ValueError: ``C`` is indefinite, or fewer than ``r`` directions are free.
    """
    d = len(values)
    checks.refuse_indefinite(float(values.norm()), values, f"{caller}: C")
    held = values.clamp_min(0).flip(0).cumsum(0)
    # A share that is met up to the rounding of the sum is met.
    protected = int((held < energy * held[-1] * (1 - d * torch.finfo(torch.float64).eps)).sum()) + 1 if energy else 0
    k = max(d - protected, at_least)
    if k < r:
        enough = sufficient_energy(values, r)
        raise ValueError(
            f"{caller}: energy={energy} leaves {k} of {d} directions free; expected at least {r}. The activations use "
            f"the directions too evenly for that share: lower it to energy={enough}"
            + (f", or the rank to r={k}." if k else ".")
        )
    return k


def sufficient_energy(values: Tensor, r: int) -> float:
    """Return a share of the energy that leaves ``r`` directions free, of eigenvalues in ascending order."""
    held = values.clamp_min(0).flip(0).cumsum(0)
    # Rounded down: a hair more would protect one more direction.
    return math.floor(1e6 * float(held[len(values) - r - 1] / held[-1])) / 1e6 if r < len(values) else 0.0

"""The null space of a covariance: eigenvectors of its ``r`` smallest eigenvalues."""

from __future__ import annotations

import time
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import _solver_exact, _solver_input

Key = TypeVar("Key", bound=Hashable)
METHODS = ("auto", "exact", "filtered")


@dataclass(frozen=True)
class NullSpace:
    """The ``r`` directions that the activations use least.

    Attributes:
        basis: ``U (d, r)``, orthonormal columns, ordered like the eigenvalues.
        eigenvalues: ``(r,)`` ascending, float64. Values below about ``1e-16`` of the largest eigenvalue of ``C`` are
            rounding, and may be negative.
        energy: ``tr(U^T C U)``, the sum of the eigenvalues: what the basis catches of the activations.
        info: How it was found; see :func:`null_space`.
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
    max_cycles: int = 4,
    seed: int = 0,
    certify: bool = False,
    uplo: str = "full",
    dtype: torch.dtype = torch.float64,
) -> NullSpace:
    """Solve for the eigenvectors of the ``r`` smallest eigenvalues of a covariance."""
    if method not in METHODS:
        raise ValueError(f"null_space: method is {method!r}; expected one of {METHODS}.")
    start = time.perf_counter()
    full = _solver_input.working_copy(C, uplo)
    r = _solver_input.check_rank(r, full.shape[0])
    eigenvalues, basis = _solver_exact.exact(full, r)
    info = {"method": "exact", "seconds": {"total": time.perf_counter() - start}}
    return NullSpace(basis.to(dtype), eigenvalues, float(eigenvalues.sum()), info)


def null_spaces(
    covariances: Iterable[tuple[Key, Tensor]],
    r: int,
    *,
    progress: bool = True,
    **options: Any,
) -> Iterator[tuple[Key, NullSpace]]:
    """Solve many covariances; yields ``(key, NullSpace)`` in the order of the input."""
    for key, C in tqdm(covariances, desc="null spaces", unit="matrix", disable=not progress):
        yield key, null_space(C, r, **options)

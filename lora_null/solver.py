"""The null space of a covariance: eigenvectors of its ``r`` smallest eigenvalues."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from . import _extension, _solver_certificate, _solver_exact, _solver_filtered, _solver_input
from ._logging import logger

if TYPE_CHECKING:
    from .covariances import Covariances

Key = TypeVar("Key", bound=Hashable)
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
    full = _solver_input.working_copy(C, uplo)
    r = _solver_input.check_rank(r, len(full))
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
    extension = _extension.load()
    if extension is None:
        outcome = _solver_filtered.filtered(C, r, **options)
        return outcome.basis, outcome.values, outcome.info
    return extension.filtered(C, r, **options)


def _exact(C: Tensor, r: int, info: dict[str, Any]) -> tuple[Tensor, Tensor]:
    clock = time.perf_counter()
    # One value beyond r for the gap: an eigenvector more out of d costs nothing.
    values, vectors = _solver_exact.exact(C, min(len(C), r + 1))
    info["seconds"]["exact"] = time.perf_counter() - clock
    return vectors[:, :r].contiguous(), values.cpu()


def _certificate(C: Tensor, basis: Tensor, values: Tensor, r: int, info: dict[str, Any]) -> dict[str, Any]:
    clock = time.perf_counter()
    result = _solver_certificate.certificate(C, basis, values, r)
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


def null_spaces(
    covariances: Iterable[tuple[Key, Tensor]] | Mapping[Key, Tensor] | Covariances,
    r: int,
    *,
    workers: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Iterator[tuple[Key, NullSpace]]:
    """Solve many covariances, overlapping them where that helps.

    On the CPU each worker solves one matrix with its share of torch's threads; on CUDA each has its own stream, so
    that the host work of one solve hides behind the kernels of another. At most ``workers + 1`` matrices are in
    memory at a time, and ``covariances`` is read only as far as needed, in the calling thread.

    Args:
        covariances: :class:`lora_null.Covariances`, another mapping of keys to matrices, or pairs of a key and a
            matrix.
        r: As for :func:`null_space`.
        workers: Matrices solved at the same time; ``None`` means 2, or 1 where torch has one thread.
        progress: Show a progress bar.
        **options: Passed on to :func:`null_space`.

    Yields:
        ``(key, NullSpace)`` in the order of the input.

    Raises:
        TypeError: ``covariances`` is nothing of the kind, or an item is no pair.
        TypeError, ValueError: as :func:`null_space` does, with the key of the matrix in front.
    """
    threads = torch.get_num_threads()
    workers = (2 if threads > 1 else 1) if workers is None else workers
    if workers < 1:
        raise ValueError(f"null_spaces: workers is {workers}; expected at least 1.")
    if not isinstance(covariances, Iterable):
        raise TypeError(
            f"null_spaces: covariances is a {type(covariances).__name__}; expected lora_null.Covariances, another "
            "mapping, or pairs of a key and a matrix."
        )
    total = len(covariances) if isinstance(covariances, Sized) else None
    pending: deque[tuple[Key, Future[NullSpace]]] = deque()
    pool = ThreadPoolExecutor(workers, "null_space", torch.set_num_threads, (max(1, threads // workers),))
    bar = tqdm(total=total, desc="null spaces", unit="matrix", disable=not progress)
    pairs: Iterable[Any] = covariances.items() if hasattr(covariances, "items") else covariances
    try:
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(
                    f"null_spaces: an item of covariances is a {type(pair).__name__}; expected pairs of a key and a "
                    "matrix. For matrices without keys pass enumerate(matrices), for a single one call null_space."
                )
            key, C = pair
            caller = torch.cuda.current_stream(C.device) if isinstance(C, Tensor) and C.is_cuda else None
            pending.append((key, pool.submit(_solve_one, key, C, r, options, caller)))
            del C, pair
            if len(pending) > workers:
                yield _next(pending, bar)
        while pending:
            yield _next(pending, bar)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        # The workers' setting is also the default of threads that torch starts later.
        torch.set_num_threads(threads)


def _next(pending: deque[tuple[Key, Future[NullSpace]]], bar: tqdm) -> tuple[Key, NullSpace]:
    key, future = pending.popleft()
    result = future.result()
    bar.update()
    logger.debug("null space of %s: %s", key, result.info)
    return key, result


_streams = threading.local()


def _own_stream(device: torch.device) -> Any:
    # One per thread: freed memory is kept for the stream that it was allocated on, gigabytes for each solve.
    streams = _streams.__dict__.setdefault("by_device", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def _solve_one(key: Hashable, C: Tensor, r: int, options: dict[str, Any], caller: Any) -> NullSpace:
    try:
        if caller is None:
            return null_space(C, r, **options)
        stream = _own_stream(C.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            result = null_space(C, r, **options)
        # The caller uses the basis on its own stream, and may still do so when it has dropped it.
        stream.synchronize()
        result.basis.record_stream(caller)
        return result
    except (TypeError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from error

"""The filtered solver in plain torch calls: the same algorithm, step by step, as ``csrc/null_space.cpp``.

One Cholesky factorisation ``C + shift I = R^T R``, then a block Krylov space of the inverse. Of all polynomial
filters of its degree in ``C^-1`` it holds the best one for every eigenvector separately, so it needs no bounds on the
spectrum, and isolated tiny eigenvalues cost one dimension each instead of spoiling the filter. Against a Chebyshev
filter of degree 8 on ``r + r/2`` vectors, two cycles, it takes 512 instead of 3072 columns through the factor
(d = 4096, r = 128, a smooth spectrum).

Vectors are stored as rows, ``V (b, d)``: a skinny product ``V C`` then has its long side where BLAS wants it, 2 to 4
times faster than ``C V`` for ``b <= 32`` on the CPU.
"""

from __future__ import annotations

import math
import time
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

EPS = torch.finfo(torch.float64).eps
# Order of the diagonal blocks of the factor that are inverted once, so that each solve is a chain of large products.
TILE = 256
SHIFT = 1e-10  # first shift, relative to tr(C) / d; above the rounding of the factorisation up to d = 1e5
SHIFT_GROWTH = 100.0
SHIFT_ATTEMPTS = 5
# Stop when the predicted excess is this part of tol: the prediction extrapolates a sequence of upper bounds.
SAFETY = 0.5
CLUSTER = 1e-3  # relative spread below which Ritz values count as one repeated eigenvalue


@dataclass
class Outcome:
    """``basis (d, r)`` and ``values (r + p,)`` ascending; ``basis`` is ``None`` where the direct solver must do it."""

    basis: Tensor | None = None
    values: Tensor | None = None
    info: dict[str, Any] = field(default_factory=dict)


def block_size(r: int, d: int) -> int:
    """Return ``b``: small blocks reach higher degrees for the same work, large ones run nearer to the peak."""
    return min(d, max(8, 8 * math.ceil(r / 32)))


def cycle_length(r: int, b: int) -> int:
    """Return how many columns the space grows by between two Rayleigh-Ritz tests."""
    return max(b, r // 2)


class _Factor:
    """``V -> V (C + shift I)^-1`` for row blocks ``V (b, d)``."""

    def __init__(self, C: Tensor, scale: float):
        self.shift = SHIFT * scale
        self.R: Tensor | None = None
        for self.attempts in range(1, SHIFT_ATTEMPTS + 1):
            shifted = C.clone()
            shifted.diagonal().add_(self.shift)
            L, failed = torch.linalg.cholesky_ex(shifted)
            if int(failed) == 0:
                self.R = L.mT
                break
            self.shift *= SHIFT_GROWTH
        if self.R is None:
            return
        self.spans = [(start, min(start + TILE, len(C))) for start in range(0, len(C), TILE)]
        self.inverses = []
        for start, stop in self.spans:
            eye = torch.eye(stop - start, dtype=C.dtype, device=C.device)
            tile = self.R[start:stop, start:stop]
            self.inverses.append(torch.linalg.solve_triangular(tile, eye, upper=True))

    def solve(self, V: Tensor) -> Tensor:
        assert self.R is not None
        Y = V.clone()
        d = Y.shape[1]
        for (start, stop), inverse in zip(self.spans, self.inverses, strict=True):  # Y <- V R^-1
            Y[:, start:stop] = Y[:, start:stop] @ inverse
            if stop < d:
                Y[:, stop:].addmm_(Y[:, start:stop], self.R[start:stop, stop:], alpha=-1)
        for (start, stop), inverse in zip(reversed(self.spans), reversed(self.inverses), strict=True):  # Y R^-T
            part = Y[:, start:stop]
            if stop < d:
                part = torch.addmm(part, Y[:, stop:], self.R[start:stop, stop:].mT, alpha=-1)
            Y[:, start:stop] = part @ inverse.mT
        return Y


def orthonormalise(W: Tensor, Q: Tensor, k: int) -> Tensor:
    """Return ``k`` orthonormal rows: the strongest directions of the rows of ``W``, orthogonal to those of ``Q``.

    SVQB (Stathopoulos and Wu, 2002): the Gram matrix cannot see directions below the root of the precision, so they
    are lifted to where the next pass sees them. They matter: next to an isolated tiny eigenvalue every direction
    that is not its eigenvector is that small.
    """
    for attempt in range(6):
        if attempt:  # of no use before: rounding brings back what it takes off rows of small norm
            W = W - (W @ Q.mT) @ Q
        gram = (W @ W.mT).cpu()
        scale = gram.diagonal().clamp_min(1e-300).rsqrt()
        values, vectors = torch.linalg.eigh(scale[:, None] * gram * scale)
        values, vectors = values[-k:], vectors[:, -k:]
        W = ((vectors / values.clamp_min(1e-14).sqrt()).mT * scale).to(W.device) @ W
        if attempt and float(values[0]) > 0.5:
            break
    return W


class _Krylov:
    """An orthonormal basis ``Q`` of the Krylov space and ``T = Q^T C^-1 Q``, grown block by block."""

    def __init__(self, factor: _Factor, d: int, capacity: int, b: int, seed: int, device: torch.device):
        self.factor, self.d, self.b = factor, d, b
        # Normal numbers from the CPU's generator: the same start on every device.
        self.generator = torch.Generator().manual_seed(seed)
        rows = min(d, capacity + 8 * b)  # some room for injected vectors
        self.Q = torch.empty(rows, d, dtype=torch.float64, device=device)
        self.T = torch.zeros(rows, rows, dtype=torch.float64)  # host: its eigenproblems are small
        self.n = self.previous = self.steps = 0
        self.m = b  # rows of Q including the block that the next step multiplies
        self.Q[:b] = orthonormalise(self._fresh(b), self.Q[:0], b)

    def _fresh(self, count: int) -> Tensor:
        noise = torch.randn(count, self.d, generator=self.generator, dtype=torch.float64)
        return noise.to(self.Q.device)

    @property
    def complete(self) -> bool:
        """Whether the space is everything there is."""
        return self.n == self.d

    def room(self, width: int) -> bool:
        """Whether the basis can take another step that adds up to ``width`` vectors."""
        rows = len(self.Q)
        return not self.complete and (rows == self.d or self.m + width <= rows)

    def extend(self, inject: int = 0) -> None:
        """Multiply the last block by the inverse; add the new directions, and ``inject`` random ones."""
        start, n = self.n, self.m
        Q = self.Q[:n]
        Z = self.factor.solve(Q[start:n])
        size = Z.norm(dim=1).max()
        # In exact arithmetic Z has components on the last two blocks only: take those off first, then whatever
        # rounding has left on all the others.
        near = Z @ Q[self.previous :].mT
        Z -= near @ Q[self.previous :]
        H = Z @ Q.mT
        Z -= H @ Q
        H[:, self.previous :] += near
        W = Z
        dead = (Z.norm(dim=1) <= 10 * EPS * size).nonzero()
        if len(dead):  # an invariant subspace: go on from new directions
            W = W.clone()
            W[dead[:, 0]] = self._fresh(len(dead))
        if inject:
            W = torch.cat([W, self._fresh(inject) * (size / self.d**0.5)])
        k = min(len(W), self.d - n)
        self.T[:n, start:n] = H.mT.cpu()
        if k:
            self.Q[n : n + k] = orthonormalise(W, Q, k)
            self.T[n : n + k, start:n] = (self.Q[n : n + k] @ Z.mT).cpu()
        self.previous, self.n, self.m = start, n, n + k
        self.steps += 1

    def ritz(self, vectors: int = 0) -> tuple[Tensor, Tensor | None]:
        """Rayleigh-Ritz for ``C + shift I`` on the space ``C^-1 Q``, without a product with ``C``.

        With ``u = C^-1 Q s = Q_ext T_ext s``: ``u^T C u = s^T T s`` and ``u^T u = |T_ext s|^2``. The QR factors
        ``T_ext = Z R`` turn that pencil into ``R^-T Z_top``, and ``Q_ext Z`` into an orthonormal basis.
        """
        n, m = self.n, self.m
        Z, R = torch.linalg.qr(self.T[:m, :n])
        M = torch.linalg.solve_triangular(R.mT, Z[:n], upper=False)
        M = (M + M.mT) / 2
        if not vectors:
            return torch.linalg.eigvalsh(M), None
        values, S = torch.linalg.eigh(M)
        return values, (Z @ S[:, :vectors]).mT.to(self.Q.device) @ self.Q[:m]


def missing_copies(values: Tensor, r: int, width: int, floor: float) -> float:
    """Bound the energy to be won if a repeated eigenvalue has more copies than the start block can show.

    A Krylov space with ``width`` random start vectors sees at most ``width`` copies of an eigenvalue. Where that many
    coincide, further copies would replace the values between them and ``r``.
    """
    v = values.tolist()
    worst = 0.0
    for i in range(r - width):
        j = i + width - 1
        if v[j] - v[i] <= CLUSTER * abs(v[j]) + floor:
            worst = max(worst, sum(v[j + 1 : r]) - (r - j - 1) * v[i])
    return worst


def filtered(C: Tensor, r: int, *, tol: float, oversample: int, max_cycles: int, seed: int, patient: bool) -> Outcome:
    """Find the ``r`` smallest eigenpairs of ``C (d, d)``, float64 and symmetric.

    ``patient=False`` hands over as soon as the convergence rate says that ``max_cycles`` will not do.
    """
    begin = time.perf_counter()
    d = len(C)
    norm, trace = torch.stack([C.norm(), C.diagonal().sum()]).tolist()
    factor = _Factor(C, trace / d)
    seconds = {"factor": time.perf_counter() - begin, "iterate": 0.0, "test": 0.0, "finish": 0.0}
    info: dict[str, Any] = {
        "shift": factor.shift,
        "attempts": factor.attempts,
        "cycles": 0,
        "columns": 0,
        "seconds": seconds,
        "reason": "",
    }
    if factor.R is None:
        info["reason"] = "no shift makes the factorisation succeed"
        return Outcome(info=info)

    b, length = block_size(r, d), cycle_length(r, block_size(r, d))
    first = min(d, 2 * r + length)
    capacity = min(d, first + max_cycles * length)
    space = _Krylov(factor, d, capacity, b, seed, C.device)
    rounding = EPS * norm
    slack = r * rounding
    energies: list[float] = []  # of the cycles since the last injection
    width, settle, before = b, 0, math.inf
    target = first
    while True:
        clock = time.perf_counter()
        while space.n < target and space.room(width):
            space.extend()
        seconds["iterate"] += time.perf_counter() - clock
        clock = time.perf_counter()
        values = space.ritz()[0] - factor.shift
        energy = float(values[:r].sum())
        energies.append(energy)
        info["cycles"] += 1
        allowed = tol * abs(energy) + slack
        excess, rate = predict_excess(energies)
        seconds["test"] += time.perf_counter() - clock
        left = max_cycles - info["cycles"]
        if space.complete:
            break  # nothing is left to converge
        if space.n < target or left <= 0:
            info["reason"] = f"not converged after {info['cycles']} cycles"
            break
        if excess <= SAFETY * allowed and space.steps >= settle:
            closeness = 10 * rounding + CLUSTER * factor.shift
            if before - energy <= allowed or missing_copies(values, r, width, closeness) <= allowed:
                break
            # Look for the copies from new random directions; what they do not find is not there.
            before, energies = energy, []
            settle = space.steps + 1 + max(3, space.steps // 3)
            width += b
            if space.room(width):
                space.extend(inject=b)
        elif not patient and 0 < rate < 1 and excess < math.inf:
            # The rate improves as the space grows; twice the cycles left is hopeless all the same.
            if math.log(excess / (SAFETY * allowed)) > -2 * left * math.log(rate):
                info["reason"] = "converges too slowly to pay"
                break
        target = min(d, space.n + length)
    info["columns"] = space.n
    if info["reason"]:
        return Outcome(info=info)
    return _finish(C, r, oversample, tol, space, energy, norm, info)


def predict_excess(energies: list[float]) -> tuple[float, float]:
    """Return the excess energy left and the factor it falls by per cycle, from the energies of equal cycles.

    Energies fall at least geometrically, so that with the last two falls ``a``, ``b`` the rest is below
    ``b q / (1 - q)``, ``q = b / a``.
    """
    if len(energies) < 3:
        return math.inf, 0.0
    before, last = energies[-3] - energies[-2], energies[-2] - energies[-1]
    if last <= 0:
        return 0.0, 0.0
    rate = min(0.95, last / before) if before > 0 else 0.95
    return last * rate / (1 - rate), rate


def _finish(
    C: Tensor, r: int, oversample: int, tol: float, space: _Krylov, energy: float, norm: float, info: dict
) -> Outcome:
    """Rayleigh-Ritz with ``C`` itself on ``r + oversample`` vectors, residuals, and the final tests."""
    clock = time.perf_counter()
    keep = min(r + oversample, space.n)
    _, U = space.ritz(vectors=keep)
    assert U is not None
    CU = U @ C
    H = CU @ U.mT
    values, S = torch.linalg.eigh((H + H.mT) / 2)
    U, CU = S.mT @ U, S.mT @ CU
    residuals = (CU[:r] - values[:r, None] * U[:r]).norm(dim=1)
    basis = U[:r].mT.contiguous()
    values, residuals = values.cpu(), residuals.cpu()
    true_energy = float(values[:r].sum())
    info["residual"] = float(residuals.max()) / norm
    slack = r * EPS * norm
    # Both tests fail only where rounding has destroyed the recurrence, whose energy is then wrong. A residual rho
    # towards the large eigenvalues costs rho^2 / |C| of energy: below |C| sqrt(eps) it is rounding.
    if abs(true_energy - energy) > 10 * (tol * abs(true_energy) + slack):
        info["reason"] = "the recurrence lost its accuracy"
    elif float(residuals.norm()) / r**0.5 > 10 * tol**0.5 * float(values.abs().max()) + EPS**0.5 * norm:
        info["reason"] = "the residuals are too large"
    info["seconds"]["finish"] = time.perf_counter() - clock
    if info["reason"]:
        return Outcome(info=info)
    return Outcome(basis, values, info)

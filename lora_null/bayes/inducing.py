"""A factor whose distribution is learned through a small inducing matrix: Bayesian-LoRA (arXiv 2601.21003).

    W = W0 + p [ T_r U T_c + lambda N ],   U = L_r u L_c^T,   K = Z Z^T + D^2 = L L^T,   T_r = Z_r^T K_r^-1,   T_c alike

with N the rest of a standard normal matrix given ``U``, and ``u = flow(u0)``, ``u0 ~ N(m, s^2)``. As
``T_r L_r = (L_r^-1 Z_r)^T``, only the whitened sides ``Q = L^-1 Z (k, side)`` are ever used.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, softplus

from .noise import require_fp32

# Of the published code: bounds and starts of s, lambda and D.
_MAX_STD, _STD = 0.1, 1e-3
_MAX_REST, _REST = 0.03, 1e-3
_DIAGONAL = 1e-3
# Pairs of opposite draws that the mean is taken over. Without a flow two are exact.
_PAIRS = 128


class Flow(nn.Module):
    """``u_ij = u0_ij exp(a_j) + b_j`` with a and b functions of ``u0_i1 .. u0_i(j-1)``; the identity at first.

    Args:
        features: Length of a row.
        hidden: Units of the one masked layer.
    """

    first_mask: Tensor
    second_mask: Tensor

    def __init__(self, features: int, hidden: int):
        super().__init__()
        order, unit = torch.arange(1, features + 1), torch.arange(hidden) % max(features - 1, 1) + 1
        first = (unit[:, None] >= order).float()
        second = (order[:, None] > unit).float().repeat(2, 1)
        self.register_buffer("first_mask", first, persistent=False)
        self.register_buffer("second_mask", second, persistent=False)
        self.first = nn.Parameter(torch.randn(hidden, features) * features**-0.5)
        self.second = nn.Parameter(torch.zeros(2 * features, hidden))
        self.bias = nn.Parameter(torch.zeros(2 * features))

    def forward(self, u0: Tensor) -> tuple[Tensor, Tensor]:
        """Map ``u0 (..., k, features)``; return u and the logarithm of the determinant ``(...)``."""
        units = linear(u0, self.first * self.first_mask).tanh()
        shift, raw = linear(units, self.second * self.second_mask, self.bias).chunk(2, -1)
        log_scale = raw.tanh()
        return u0 * log_scale.exp() + shift, log_scale.sum((-2, -1))


class Inducing(nn.Module):
    """A random factor ``W0 + deviation (rows, columns)``: a parametrisation while it is trained, then a noise.

    Attributes:
        size: ``(rows, columns)``.
        prior_std: p, of an entry under the prior.
        drawn: The deviation of the forward that is running; ``None`` outside of one, where the mean stands for it.
        handles: Of its hooks on the model.
    """

    kind: ClassVar[str] = "inducing"
    scale: Tensor

    def __init__(self, size: tuple[int, int], *, inducing: int = 9, prior_std: float = 0.1, hidden: int = 16):
        super().__init__()
        self.size, k = size, inducing
        self.register_buffer("scale", torch.tensor(prior_std))
        self.z_rows = nn.Parameter(torch.randn(k, size[0]) * k**-0.5)
        self.z_columns = nn.Parameter(torch.randn(k, size[1]) * k**-0.5)
        self.d_rows = nn.Parameter(torch.full((k,), math.log(math.expm1(_DIAGONAL))))
        self.d_columns = nn.Parameter(torch.full((k,), math.log(math.expm1(_DIAGONAL))))
        self.m = nn.Parameter(torch.zeros(k, k))
        self.raw_std = nn.Parameter(torch.full((k, k), _logit(_STD / _MAX_STD)))
        self.raw_rest = nn.Parameter(torch.tensor(_logit(_REST / _MAX_REST)))
        self.flow = Flow(k, hidden)
        self.drawn: Tensor | None = None
        self.handles: list[Any] = []

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the factor."""
        return self.size

    @property
    def std(self) -> Tensor:
        """``s (k, k)``."""
        return _MAX_STD * self.raw_std.sigmoid()

    @property
    def rest(self) -> Tensor:
        """``lambda``."""
        return _MAX_REST * self.raw_rest.sigmoid()

    def forward(self, original: Tensor) -> Tensor:
        """Return the factor from its start: the sample of the forward that is running, or the mean."""
        deviation = self.mean() if self.drawn is None else self.drawn
        return (original.detach() + deviation).to(original.dtype)

    def start_forward(self, original: Tensor) -> None:
        """Draw what the forward that begins will use."""
        self.drawn = self.sample()

    def end_forward(self) -> None:
        """Let the mean stand for the factor again."""
        self.drawn = None

    def sample(self, generator: torch.Generator | None = None) -> Tensor:
        """Return one deviation from ``W0``, differentiable."""
        u, _ = self._u(self._normal(self.m.shape, generator))
        (Qr, Lr, Dr), (Qc, Lc, Dc) = self._sides()
        k = len(u)
        e1 = self._normal(self.size, generator)
        e2, e3 = self._normal((k, k), generator), self._normal((k, self.size[1]), generator)
        # Matheron's rule: what U would be for the matrix e1, whitened. Its covariance is the identity.
        seen = Qr @ e1 @ Qc.T
        seen = seen + e2 @ _solved(Lc, Dc).to(e2).T + _solved(Lr, Dr).to(e2) @ e3 @ Qc.T
        return self.scale * (Qr.T @ (u - self.rest * seen) @ Qc + self.rest * e1)

    def mean(self) -> Tensor:
        """Return the mean deviation: exact without a flow, else over pairs of opposite draws, always the same."""
        generator = torch.Generator().manual_seed(0)
        half = torch.randn(_PAIRS, *self.m.shape, generator=generator).to(self.m)
        u = self._u(torch.cat([half, -half]))[0].mean(0)
        (Qr, _, _), (Qc, _, _) = self._sides()
        return self.scale * (Qr.T @ u @ Qc)

    def kl(self, original: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the divergence from the prior in nats: one draw of u, all else in closed form."""
        u, log_det = self._u(self._normal(self.m.shape, generator))
        rest, entries = self.rest, self.size[0] * self.size[1]
        # E log q0(u0) = -sum log s - k^2 / 2 but for what log p(u) has too
        of_u = (0.5 * u.square() - self.std.log() - 0.5).sum() - log_det
        return of_u + entries * (0.5 * rest.square() - rest.log() - 0.5)

    def noise(self) -> Inducing:
        """Return what is left of it when training has ended."""
        self.handles = []
        return self.requires_grad_(False).float().cpu()

    @torch.no_grad()
    def draw(self, generator: torch.Generator) -> Tensor:
        """Return one deviation from the mean, on the CPU, fp32."""
        return (self.sample(generator) - self.mean()).float()

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file needs to hold."""
        return dict(self.state_dict())

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Inducing:
        """Invert :meth:`tensors`, without trust.

        Raises:
            ValueError: Names, shapes, dtypes or values do not fit one another.
        """
        require_fp32(tensors)
        with torch.random.fork_rng(devices=[]):
            try:
                (k, rows), (_, columns) = tensors["z_rows"].shape, tensors["z_columns"].shape
                hidden = len(tensors["flow.first"])
                made = cls((rows, columns), inducing=k, hidden=hidden)
                made.load_state_dict(tensors)
            except (KeyError, RuntimeError, ValueError) as error:
                raise ValueError(f"its tensors do not fit one another ({error})") from None
        return made.requires_grad_(False)

    def _u(self, normal: Tensor) -> tuple[Tensor, Tensor]:
        return self.flow(self.m + self.std * normal)

    def _normal(self, size: tuple[int, ...], generator: torch.Generator | None) -> Tensor:
        return torch.randn(size, generator=generator, dtype=self.m.dtype, device=self.m.device)

    def _sides(self) -> list[tuple[Tensor, Tensor, Tensor]]:
        """Return Q, L and D of rows and columns. K is singular but for D where a side is shorter than k: in fp64."""
        sides = []
        for Z, raw in ((self.z_rows, self.d_rows), (self.z_columns, self.d_columns)):
            wide, D = Z.double(), softplus(raw.double())
            L = torch.linalg.cholesky(wide @ wide.T + D.square().diag())
            Q = torch.linalg.solve_triangular(L, wide, upper=False)
            sides.append((Q.to(Z.dtype), L, D))
        return sides


def _solved(L: Tensor, D: Tensor) -> Tensor:
    """Return ``L^-1 D``."""
    return torch.linalg.solve_triangular(L, D.diag(), upper=False)


def _logit(share: float) -> float:
    return math.log(share / (1 - share))

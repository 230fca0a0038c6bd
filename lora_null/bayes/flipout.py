"""A factor with independent Gaussian entries, sampled once per token: BLoB (arXiv 2406.11675), by flipout."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from .noise import Gaussian

_START = 0.05


class Flipout(nn.Module):
    """A random factor ``N(W, s^2)`` entry by entry, with W the ordinary parameter and ``s = rho^2``.

    The factor itself is never changed: what a token deviates by is added to the layer's output.

    Attributes:
        rho: ``(rows, columns)``, between 0.035 and 0.05 at first.
        centre: Of the prior, ``(rows, columns)``; ``None`` stands for zero.
        prior_std: Of the prior.
        drawn: ``s E`` of the forward that is running.
        handles: Of its hooks on the model.
    """

    centre: Tensor | None

    def __init__(self, weight: Tensor, centre: Tensor | None, prior_std: float):
        super().__init__()
        self.rho = nn.Parameter(torch.empty_like(weight).uniform_(_START / math.sqrt(2), _START))
        self.register_buffer("centre", None if centre is None else centre.detach(), persistent=False)
        self.prior_std = prior_std
        self.drawn: Tensor | None = None
        self.handles: list[Any] = []

    def forward(self, original: Tensor) -> Tensor:
        """Return the factor as it is."""
        return original

    def start_forward(self, original: Tensor) -> None:
        """Draw what the forward that begins will use."""
        self.drawn = self.rho.square() * torch.randn_like(self.rho)

    def end_forward(self) -> None:
        """Forget it."""
        self.drawn = None

    def flipped(self, x: Tensor) -> Tensor:
        """Return ``((x o p) (s E)^T) o q (..., rows)`` for ``x (..., columns)``, with signs p and q for every token."""
        assert self.drawn is not None
        drawn = self.drawn.to(x.dtype)
        columns, rows = _signs(x), _signs(x.new_empty(*x.shape[:-1], len(drawn)))
        return ((x * columns) @ drawn.T) * rows

    def kl(self, original: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Return the divergence from the prior in nats, in closed form."""
        std, wide = self.rho.square(), self.prior_std
        off = original if self.centre is None else original - self.centre
        return (math.log(wide) - std.log() + (std.square() + off.square()) / (2 * wide**2) - 0.5).sum()

    def noise(self) -> Gaussian:
        """Return what is left of it when training has ended."""
        rows, columns = self.rho.shape
        return Gaussian((rows, columns), self.rho.detach().square().float().cpu())


def _signs(like: Tensor) -> Tensor:
    return torch.empty_like(like, requires_grad=False).bernoulli_(0.5).mul_(2).sub_(1)

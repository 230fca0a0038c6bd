"""The published LoRA-Null procedure, written from its description.

Every linear collects a covariance of its own: each sample is divided by the absolute value of its largest
entry, the product and the running mean are fp16. The basis is the tail of a full fp32 SVD of the covariance; the
factors come from a full SVD of the projected weight ``W U U^T``.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class PublishedCovariance:
    """The running covariance of one linear, as the published procedure keeps it.

    On a CPU the fp16 product is made in fp32 and rounded to fp16, because processors without fp16 arithmetic
    multiply fp16 matrices some hundred times slower than fp32 ones; this favours the published procedure.
    """

    def __init__(self, d: int, samples: int, device: torch.device | str):
        self.matrix = torch.zeros(d, d, dtype=torch.float16, device=device)
        self.samples = samples

    def add(self, sample: Tensor) -> None:
        """Add one sample ``(tokens, d)``."""
        x = sample.half()
        x = x / x.max().abs()
        if x.device.type == "cpu":
            x = x.float()
        self.matrix += (x.T @ x).half() / self.samples


def published_basis(covariance: Tensor, r: int) -> Tensor:
    """Return the last ``r`` left singular vectors ``(d, r)`` of a full fp32 SVD."""
    U, _, _ = torch.linalg.svd(covariance.float(), full_matrices=True)
    return U[:, -r:]


def published_factors(weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    """Return ``A0 (r, d)``, ``B0 (m, r)`` from a full fp32 SVD of the ``(m, d)`` matrix ``W U U^T``."""
    projected = weight.float() @ basis @ basis.T
    U, S, Vh = torch.linalg.svd(projected, full_matrices=False)
    r = basis.shape[1]
    root = S[:r].sqrt()
    return root[:, None] * Vh[:r], U[:, :r] * root


class PublishedHooks:
    """Collects a published covariance for each of ``linears`` while the model runs, one sample per batch row."""

    def __init__(self, linears: dict[str, nn.Linear], samples: int):
        self.covariances = {
            name: PublishedCovariance(linear.in_features, samples, linear.weight.device)
            for name, linear in linears.items()
        }
        self._linears = linears

    def __enter__(self):
        self._handles = [
            linear.register_forward_pre_hook(lambda _, args, name=name: self._seen(name, args[0]))
            for name, linear in self._linears.items()
        ]
        return self

    def __exit__(self, *exception):
        for handle in self._handles:
            handle.remove()

    def _seen(self, name: str, x: Tensor) -> None:
        for sample in x.detach().reshape(-1, *x.shape[-2:]):
            self.covariances[name].add(sample)

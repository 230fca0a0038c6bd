"""The adapted linear written so that BLAS adds the low-rank product into the output of the base product."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class AccumulatedLinear(torch.autograd.Function):
    """``y = x W^T``, then ``y += s S B^T`` with ``beta = 1``; nothing of size ``(T, m)`` is made twice.

    Frozen factors are honoured: with A frozen neither x is kept nor dA computed.
    """

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, scaling: float) -> Tensor:
        """``x (T, d)``, ``weight (m, d)``, ``lora_A (r, d)``, ``lora_B (m, r)``."""
        A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
        S = x @ A.T
        y = x @ weight.T
        y.addmm_(S, B.T, alpha=scaling)
        ctx.save_for_backward(x if ctx.needs_input_grad[2] else None, S, weight, lora_A, lora_B)
        ctx.scaling = scaling
        return y

    @staticmethod
    def backward(ctx, dy: Tensor):
        """Return the gradients that are asked for."""
        x, S, weight, lora_A, lora_B = ctx.saved_tensors
        A, B = lora_A.to(dy.dtype), lora_B.to(dy.dtype)
        dx = dA = dB = None
        needs_x, _, needs_A, needs_B, _ = ctx.needs_input_grad
        if needs_x or needs_A:
            dS = dy @ B
        if needs_x:
            dx = dy @ weight
            dx.addmm_(dS, A, alpha=ctx.scaling)
        if needs_A:
            dA = (dS.T @ x).mul_(ctx.scaling).to(lora_A.dtype)
        if needs_B:
            dB = (dy.T @ S).mul_(ctx.scaling).to(lora_B.dtype)
        return dx, None, dA, dB, None


def accumulated_linear(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, scaling: float = 1.0) -> Tensor:
    """Apply :class:`AccumulatedLinear` to ``x (..., d)``."""
    y = AccumulatedLinear.apply(x.reshape(-1, x.shape[-1]), weight, lora_A, lora_B, scaling)
    return y.view(*x.shape[:-1], y.shape[-1])


class AccumulatedLinearModule(nn.Module):
    """A frozen base linear with an adapter on the accumulate path."""

    def __init__(self, base: nn.Linear, lora_A: Tensor, lora_B: Tensor, *, train_a: bool):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(lora_A, requires_grad=train_a)
        self.lora_B = nn.Parameter(lora_B)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (..., d)`` to ``(..., m)``."""
        return accumulated_linear(x, self.base.weight, self.lora_A, self.lora_B)

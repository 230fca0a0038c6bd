"""Kronecker factors of an adapter's Fisher matrix, streamed over batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.modes import evaluating
from .layers import AdaptedLayer
from .likelihood import counted, logits_of, model_inputs


class Curvature:
    """The largest eigenpairs of ``sum_t v_t v_t^T``, exact while the side is at most ``limit``.

    Beyond that only ``limit`` rows are kept, after each batch those of largest variance: what is dropped counts as no
    curvature, so that the posterior is as wide as the prior there.

    Args:
        side: Length of a vector.
        limit: Most eigenpairs.
    """

    def __init__(self, side: int, limit: int):
        self.side, self.limit = side, limit
        self.tokens = 0
        self._sum: Tensor | None = None
        self._rows: Tensor | None = None

    def add(self, rows: Tensor) -> None:
        """Take vectors ``(T, side)``."""
        self.tokens += rows.shape[0]
        if self.side <= self.limit:
            wide = rows.double()
            product = wide.T @ wide
            self._sum = product if self._sum is None else self._sum.add_(product)
            return
        rows = rows.float() if self._rows is None else torch.cat([self._rows, rows.float()])
        self._rows = _compressed(rows, self.limit)

    def spectrum(self) -> tuple[Tensor, Tensor]:
        """Return eigenvalues ``(k,)``, fp64, ascending, and eigenvectors ``(side, k)``, fp32, both on the CPU."""
        if self._sum is not None:
            values, vectors = torch.linalg.eigh(self._sum)
        else:
            rows = torch.zeros(0, self.side) if self._rows is None else self._rows
            # rows of one SVD are orthogonal already, but for rounding
            _, sizes, right = torch.linalg.svd(rows.double(), full_matrices=False)
            values, vectors = sizes.flip(0) ** 2, right.T.flip(1)
        return values.clamp_min(0).cpu(), vectors.float().cpu()


def of_matrix(matrix: Tensor, limit: int) -> tuple[Tensor, Tensor]:
    """Return the ``limit`` largest eigenpairs of a symmetric ``(side, side)``, as :meth:`Curvature.spectrum` does."""
    values, vectors = torch.linalg.eigh(matrix.double())
    return values[-limit:].clamp_min(0).cpu(), vectors[:, -limit:].float().cpu()


class KroneckerFactors:
    """Input and output factors of the random factors of every layer.

    For B, inputs are ``s A x`` and gradients those of the layer's output, g. For A, inputs are x and gradients
    ``s B^T g``.

    Args:
        layers: By name.
        factors: ``lora_A``, ``lora_B`` or both.
        limit: Most eigenpairs of a factor.
        inputs: Whether input factors are wanted too.
    """

    def __init__(self, layers: Mapping[str, AdaptedLayer], factors: tuple[str, ...], limit: int, *, inputs: bool):
        self.layers, self.inputs = layers, inputs
        self.of_input: dict[str, Curvature] = {}
        self.of_gradient: dict[str, Curvature] = {}
        for name, layer in layers.items():
            for factor in factors:
                rows, columns = layer.factor(factor).shape
                self.of_gradient[f"{name}.{factor}"] = Curvature(rows, limit)
                self.of_input[f"{name}.{factor}"] = Curvature(columns, limit)

    def add(self, model: nn.Module, batch: Mapping[str, Any], generator: torch.Generator) -> None:
        """Run the model forward and backward on a batch, with labels drawn from its own predictions.

        Such labels make ``g g^T`` an unbiased estimate of the Fisher matrix, which for a softmax is the generalised
        Gauss-Newton matrix; the given labels, which only say what counts, would make it the empirical one.
        """
        mask = batch.get("attention_mask")
        with evaluating(model), torch.enable_grad(), self._watching(mask):
            logits, _ = counted(logits_of(model(**model_inputs(model, batch))), batch["labels"])
            drawn = torch.multinomial(logits.detach().softmax(-1).cpu(), 1, generator=generator)[:, 0]
            loss = nn.functional.cross_entropy(logits, drawn.to(logits.device), reduction="sum")
            weights = [layer.factor("lora_B") for layer in self.layers.values()]
            torch.autograd.grad(loss, weights, allow_unused=True)

    @contextmanager
    def _watching(self, mask: Tensor | None) -> Iterator[None]:
        weights = [layer.factor("lora_B") for layer in self.layers.values()]
        before = [weight.requires_grad for weight in weights]
        with ExitStack() as stack:
            for name, layer in self.layers.items():
                stack.callback(layer.module.register_forward_hook(partial(self._seen, name, layer, mask)).remove)
            try:
                for weight in weights:
                    weight.requires_grad_(True)
                yield
            finally:
                for weight, trained in zip(weights, before, strict=True):
                    weight.requires_grad_(trained)

    def _seen(
        self, name: str, layer: AdaptedLayer, mask: Tensor | None, module: nn.Module, args: tuple, y: Tensor
    ) -> None:
        if self.inputs:
            x = _tokens(args[0].detach(), mask).to(layer.factor("lora_A").dtype)
            if f"{name}.lora_A" in self.of_input:
                self.of_input[f"{name}.lora_A"].add(x)
            if f"{name}.lora_B" in self.of_input:
                self.of_input[f"{name}.lora_B"].add(layer.scaling * (x @ layer.factor("lora_A").detach().T))
        y.register_hook(partial(self._flowed, name, layer, mask))

    def _flowed(self, name: str, layer: AdaptedLayer, mask: Tensor | None, gradient: Tensor) -> None:
        g = _tokens(gradient.detach(), mask)
        if f"{name}.lora_B" in self.of_gradient:
            self.of_gradient[f"{name}.lora_B"].add(g)
        if f"{name}.lora_A" in self.of_gradient:
            B = layer.factor("lora_B").detach()
            self.of_gradient[f"{name}.lora_A"].add(layer.scaling * (g.to(B.dtype) @ B))


def _tokens(x: Tensor, mask: Tensor | None) -> Tensor:
    """Return ``x (B, L, n)`` as rows, without padding where the mask ``(B, L)`` fits."""
    if mask is not None and x.shape[:-1] == mask.shape:
        return x[mask.to(x.device) != 0]
    return x.reshape(-1, x.shape[-1])


def _compressed(rows: Tensor, limit: int) -> Tensor:
    """Return ``limit`` rows whose Gram matrix is the best approximation of that of ``rows (n, side)``."""
    if rows.shape[0] <= limit:
        return rows
    if rows.shape[0] <= rows.shape[1]:
        _, vectors = torch.linalg.eigh((rows @ rows.T).double())
        return vectors[:, -limit:].T.float() @ rows
    values, vectors = torch.linalg.eigh((rows.T @ rows).double())
    return (values[-limit:].clamp_min(0).sqrt() * vectors[:, -limit:]).T.float()

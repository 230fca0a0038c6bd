"""What a method is without one of its parts: other directions, another rank, or sums as they were published."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

import lora_null

from .methods import Start

Sums = Callable[[Any, Start], lora_null.Covariances]


def varied(attach: Callable[[Any, Start], nn.Module], *, r: int | None = None, sums: Sums | None = None) -> Any:
    """Return ``attach`` with another rank, or on other covariances."""

    def attach_varied(model: Any, start: Start) -> nn.Module:
        covariances = start.covariances if sums is None else sums(model, start)
        return attach(model, replace(start, r=r or start.r, covariances=covariances))

    return attach_varied


def most_used(_: Any, start: Start) -> lora_null.Covariances:
    """Return ``tr(C) I - C``: the directions that C uses most are its least used ones."""
    matrices = start.covariances.items()
    return _with(start, {key: C.diagonal().sum() * torch.eye(len(C), dtype=C.dtype) - C for key, C in matrices})


def random(_: Any, start: Start) -> lora_null.Covariances:
    """Return ``X^T X`` of random X with the same trace: any directions."""

    def draw(C: Tensor, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * start.seed + number)
        X = torch.randn(2 * len(C), len(C), generator=generator)
        return X.T @ X * (C.diagonal().sum() / X.square().sum())

    return _with(start, {key: draw(C, number) for number, (key, C) in enumerate(start.covariances.items())})


@torch.no_grad()
def as_published(model: Any, start: Start) -> lora_null.Covariances:
    """Return the sums that the authors' code makes, whose eigenvalues count by their size.

    Each text is divided by its signed maximum; products, their division by 256 and the running sum are fp16. What
    rounding makes negative is mixed with the small by the singular value decomposition that follows.
    """
    modules = dict(model.named_modules())
    sums = {key: torch.zeros_like(C, dtype=torch.float16) for key, C in start.covariances.items()}

    def add(key: str, x: Tensor) -> None:
        x = x[0].half()
        x = (x / x.max().abs()).float()
        sums[key] += (x.T @ x).half() / 256

    hooks = [modules[key].register_forward_pre_hook(lambda _, inputs, key=key: add(key, inputs[0])) for key in sums]
    try:
        for batch in start.batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])
    finally:
        for hook in hooks:
            hook.remove()

    def by_size(matrix: Tensor) -> Tensor:
        values, vectors = torch.linalg.eigh(matrix.double())
        C = vectors * values.abs() @ vectors.T
        return (C + C.T) / 2

    return _with(start, {key: by_size(matrix) for key, matrix in sums.items()})


def _with(start: Start, matrices: dict[str, Tensor]) -> lora_null.Covariances:
    old = start.covariances
    return lora_null.Covariances(matrices, old.groups, old.tokens, old.metadata)

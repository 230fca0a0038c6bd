"""The differentiable operations in plain torch: definition, fallback and yardstick.

Same names and arguments as :mod:`lora_null.ops`. Autograd differentiates them, so they also say what the
gradients are; they run on anything that torch's own operators run on (CPU, float64, DTensor, tensor subclasses).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.functional import linear

from ..kernels.dropout import keep_mask


def dropped(x: Tensor, dropout: float, seed: int) -> Tensor:
    """Zero the entries of ``x (..., d)`` that the mask of ``seed`` drops and divide the others by ``1 - dropout``.

    The mask depends on ``seed`` and on an entry's row and column alone: whoever knows the seed can make it again,
    so nobody stores it.
    """
    T, d = x.shape[:-1].numel(), x.shape[-1]
    keep = keep_mask(T, d, dropout=dropout, seed=seed, device=x.device).view(x.shape)
    return torch.where(keep, x / (1.0 - dropout), 0.0)


def draw_seed() -> Tensor:
    """Draw a dropout seed from torch's CPU generator, as an int64 scalar tensor.

    A tensor rather than a number, so that a compiled graph draws anew at every call; from torch's generator,
    so that ``torch.manual_seed`` and the random state kept by gradient checkpointing govern it.
    """
    return torch.randint(0, 2**31 - 1, (), dtype=torch.int64, device="cpu")


def lora_up_linear(
    x: Tensor,
    weight: Tensor,
    projected: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    mixing: Tensor | None = None,
) -> Tensor:
    """Return ``x W^T + s P (B M)^T + bias`` with ``P = projected``; see :func:`lora_null.ops.lora_up_linear`."""
    if mixing is not None:
        lora_B = torch.mm(lora_B.to(mixing.dtype), mixing)
    return linear(x, weight, bias) + scaling * linear(projected, lora_B.to(projected.dtype))


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Return ``x W^T + s drop(x) A^T B^T + bias``; see :func:`lora_null.ops.lora_linear`."""
    return lora_linear_and_projection(
        x, weight, lora_A, lora_B, scaling=scaling, bias=bias, dropout=dropout if training else 0.0, seed=seed
    )[0]


def lora_linear_and_projection(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    mixing: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, drop(x) A^T)``; see :func:`lora_null.ops.lora_linear_and_projection`."""
    kept = dropped(x, dropout, int(draw_seed() if seed is None else seed)) if dropout else x
    projected = linear(kept, lora_A.to(x.dtype))
    return lora_up_linear(x, weight, projected, lora_B, scaling=scaling, bias=bias, mixing=mixing), projected


def covariance_update_reference(C: Tensor, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Compute the full ``C += x^T x`` in C's type, both triangles; see :func:`lora_null.ops.covariance_update`."""
    rows = x.detach().reshape(x.shape[:-1].numel(), x.shape[-1]).to(C.dtype)
    if mask is not None:
        rows = rows.masked_fill(~mask.reshape(-1, 1), 0)
    with full_precision():
        return C.addmm_(rows.t(), rows)


@contextmanager
def full_precision() -> Iterator[None]:
    """Keep fp32 products fp32: TF32 (or bf16 on the CPU) would lose the eigenvalues this sum exists for."""
    switches = (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul)  # type: ignore[attr-defined]
    before = [switch.fp32_precision for switch in switches]
    try:
        legacy = torch.get_float32_matmul_precision()
    except RuntimeError:  # the switches were set one by one, beside the legacy "highest"
        legacy = "highest"
    # while it and the switches disagree, torch raises where it asks whether cuBLAS may use TF32
    if legacy != "highest":
        torch.set_float32_matmul_precision("highest")
    for switch in switches:
        switch.fp32_precision = "ieee"
    try:
        yield
    finally:
        if legacy != "highest":
            torch.set_float32_matmul_precision(legacy)
        for switch, value in zip(switches, before, strict=True):
            switch.fp32_precision = value

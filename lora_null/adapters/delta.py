"""The change of a weight that a pair of factors stands for: stacked, padded to a rank, shifted out of the base."""

from __future__ import annotations

from contextlib import nullcontext

import torch
from torch import Tensor, nn

from ..models.layout import matrix_of
from ..models.refusals import DIVERGED
from ..models.weights import gathered, materialized
from ..ops.reference import full_precision


@torch.no_grad()
def stack(
    lora_A: Tensor,  # (r, d)
    lora_B: Tensor,  # (m, r)
    scaling: float,
    initial: tuple[Tensor, Tensor] | None,  # A0 (r, d), B0 (m, r)
) -> tuple[Tensor, Tensor]:
    """Write the change ``s B A`` or ``s (B A - B0 A0)`` of a weight as one product ``B' A'`` in at least fp32.

    Without ``initial`` that is ``A' = A``, ``B' = s B``. With it the rank is ``2 r``: ``A' = [A ; A - A0]``,
    ``B' = s [B - B0 | B0]``. The usual ``[A ; A0]``, ``[B | -B0]`` is the same product, but cancels when it is
    rounded: for an update of relative size 1e-3 the relative error in bf16 is 1.66 instead of 2e-3. Sharded factors
    are gathered.
    """
    lora_A, lora_B = (_widened(gathered(factor)) for factor in (lora_A, lora_B))
    if lora_A.ndim != 2 or lora_B.ndim != 2:
        raise ValueError(
            f"The factors are {tuple(lora_A.shape)} and {tuple(lora_B.shape)}; expected (r, d) and (m, r). FSDP1 has "
            "flattened them: call this inside FullyShardedDataParallel.summon_full_params(model)."
        )
    if initial is None:
        return lora_A.clone(), scaling * lora_B
    initial_A, initial_B = (gathered(factor).to(lora_A.device, lora_A.dtype) for factor in initial)
    return torch.cat([lora_A, lora_A - initial_A]), scaling * torch.cat([lora_B - initial_B, initial_B], dim=1)


def unstack(lora_A: Tensor, lora_B: Tensor, scaling: float, r: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Take the form that :func:`stack` gives to factors with a start apart, padded or not.

    Args:
        lora_A: ``A' (k, d)``, ``k >= 2 r``.
        lora_B: ``B' (m, k)``.
        scaling: ``s``.
        r: Rank of the factors.

    Returns:
        ``A (r, d)``, ``B - B0 (m, r)``, ``A0 (r, d)`` and ``B0 (m, r)``. ``B`` is left as its change, so that a
        caller who knows ``B0`` better than a rounded file adds that.
    """
    change, initial_B = lora_B[:, :r] / scaling, lora_B[:, r : 2 * r] / scaling
    return lora_A[:r], change, lora_A[:r] - lora_A[r : 2 * r], initial_B


def pad(lora_A: Tensor, lora_B: Tensor, r: int) -> tuple[Tensor, Tensor]:
    """Return the factors ``(r, d)`` and ``(m, r)`` with rows and columns of zeros, which change nothing.

    Readers such as vLLM know one rank for the whole adapter.
    """
    padding = r - lora_A.shape[0]
    return nn.functional.pad(lora_A, (0, 0, 0, padding)), nn.functional.pad(lora_B, (0, padding))


@torch.no_grad()
def shift_base(linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, factor: float) -> None:
    """Add ``factor * B A`` to the base weight in place: product and sum in fp32, one rounding at the end.

    An fp64 weight gets them in fp64.
    """
    with materialized(linear):
        weight = matrix_of(linear)
        weight.copy_(shifted(weight, lora_A, lora_B, factor))


@torch.no_grad()
def require_shift(name: str, linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, factor: float) -> None:
    """Refuse what :func:`shift_base` could not write: a weight beyond the range of its dtype; nothing is changed.

    A bound tells mostly, at the cost of reading: no entry of ``B A`` exceeds the norms of its row and column.
    """
    with materialized(linear):
        weight = matrix_of(linear)
        norms = _widened(lora_B).norm(dim=1).max(), _widened(lora_A).norm(dim=0).max(), weight.abs().max()
        rows, columns, largest = (float(gathered(norm)) for norm in norms)
        if largest + abs(factor) * rows * columns < torch.finfo(weight.dtype).max:
            return
        moved = shifted(weight, lora_A, lora_B, factor).to(weight.dtype)
        if not bool(gathered(torch.isfinite(moved).all())):
            raise ValueError(
                f"The weight of {name} would hold NaN or Inf in {weight.dtype} (its largest entry is {largest:.3g}), "
                f"so nothing was changed. {DIVERGED} Or load the model in a wider dtype."
            )


def shifted(weight: Tensor, lora_A: Tensor, lora_B: Tensor, factor: float) -> Tensor:
    """Return ``weight (m, d)`` plus ``factor * B A`` in fp32, or fp64 if it is."""
    dtype, kind = torch.promote_types(weight.dtype, torch.float32), weight.device.type
    plain = torch.autocast(kind, enabled=False) if torch.amp.is_autocast_available(kind) else nullcontext()
    # Whatever autocast or TF32 would make of the product.
    with full_precision(), plain:
        product = lora_B.to(weight.device, dtype) @ lora_A.to(weight.device, dtype)
    return product.mul_(factor).add_(weight)


def _widened(tensor: Tensor) -> Tensor:
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))

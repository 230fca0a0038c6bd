"""From a basis of the null space to the adapter's factors."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..models.refusals import require_floating
from ..models.weights import dense_weight, gathered, materialized


def factorize(
    weight: Tensor | nn.Linear, basis: Tensor, *, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Split the part of a weight that reads the null space into balanced factors.

    ``W U = P D R^T`` (thin SVD, singular values descending) gives ``B0 = P sqrt(D)`` and
    ``A0 = sqrt(D) (U R)^T``: the same factors as the SVD of the ``m x d`` matrix ``W U U^T`` (LoRA-Null,
    arXiv 2503.02659), at ``O(m d r)`` cost. Then ``B0 A0 = W U U^T``, ``B0^T B0 = A0 A0^T = D`` and the rows of
    ``A0`` lie in the span of the basis. Computed in float64 on the basis's device, whatever the input.

    Args:
        weight: ``W (m, d)``, floating point; a sharded ``DTensor`` is gathered. A linear layer is taken
            too: its weight is fetched if accelerate has offloaded it, dequantised if it is quantised, and the
            computation runs on its device.
        basis: ``U (d, r)`` with orthonormal columns, as :func:`lora_null.null_space` returns it.
        dtype: Type of the results.

    Returns:
        ``A0 (r, d)`` and ``B0 (m, r)``. The sign of each component is fixed by making the entry of largest
        magnitude in its column of ``P`` positive.

    Raises:
        TypeError: an argument is not a floating-point tensor.
        ValueError: the shapes do not fit, the weight is a placeholder without data, or it is not finite.
    """
    if isinstance(weight, nn.Module):
        with materialized(weight):
            W = dense_weight(weight)
            return factorize(W, basis.to(W.device), dtype=dtype)
    require_floating(dtype, "dtype")
    W = gathered(weight)
    _check(W, basis)
    U = basis.to(torch.float64)
    projected = W.detach().to(device=U.device, dtype=torch.float64) @ U  # (m, r)
    if not bool(torch.isfinite(projected).all()):
        raise ValueError(
            "factorize: the projected weight has NaN or infinite entries; expected a finite weight and basis. "
            "A half-precision overflow or a damaged checkpoint is the usual cause."
        )
    P, D, Rt = torch.linalg.svd(projected, full_matrices=False)  # (m, k), (k,), (k, r), k = min(m, r)
    largest = P.gather(0, P.abs().argmax(dim=0, keepdim=True))
    sign = torch.where(largest < 0, -1.0, 1.0)  # (1, k)
    root = D.sqrt()
    A0 = (Rt @ U.mT) * (root * sign[0]).unsqueeze(1)
    B0 = P * (root * sign[0])
    missing = U.shape[1] - root.shape[0]
    if missing:  # fewer out-features than rank: the remaining components carry nothing
        A0 = torch.cat([A0, A0.new_zeros(missing, A0.shape[1])])
        B0 = torch.cat([B0, B0.new_zeros(B0.shape[0], missing)], dim=1)
    factors = A0.to(dtype).contiguous(), B0.to(dtype).contiguous()
    if not all(bool(factor.isfinite().all()) for factor in factors):
        raise ValueError(
            f"factorize: the factors do not fit into {dtype}, their largest entry is "
            f"{float(max(A0.abs().max(), B0.abs().max())):.3g}; expected a dtype of wider range, such as float32."
        )
    return factors


def _check(W: Tensor, basis: Tensor) -> None:
    for name, tensor in (("weight", W), ("basis", basis)):
        if not isinstance(tensor, Tensor):
            raise TypeError(f"factorize: {name} is {type(tensor).__name__}; expected a tensor.")
        if not tensor.is_floating_point():
            raise TypeError(
                f"factorize: {name} has dtype {tensor.dtype}; expected a floating-point tensor. "
                "Dequantise a quantised weight first."
            )
        if tensor.dim() != 2:
            raise ValueError(f"factorize: {name} has shape {tuple(tensor.shape)}; expected two dimensions.")
    if W.device.type == "meta":
        raise ValueError(
            "factorize: the weight is on the meta device and has no data, as accelerate leaves it when it "
            "offloads. Pass the module instead of its weight, so that it can be fetched."
        )
    if W.shape[1] != basis.shape[0] or basis.shape[1] > basis.shape[0]:
        raise ValueError(
            f"factorize: weight {tuple(W.shape)} and basis {tuple(basis.shape)} do not fit; expected (m, d) and "
            "(d, r) with r <= d. Was the basis solved from another layer's covariance?"
        )


def factors_of(
    name: str, linear: nn.Linear, basis: Tensor, dtype: torch.dtype = torch.float32
) -> tuple[Tensor, Tensor]:
    """Call :func:`lora_null.factorize`, with the name of the layer in its errors."""
    try:
        return factorize(linear, basis, dtype=dtype)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error

"""What a factor deviates by from its mean, as distributions that are drawn with an explicit seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Protocol

import torch
from torch import Tensor


class Noise(Protocol):
    """What one factor deviates by from its mean.

    Attributes:
        kind: Its name in files.
        shape: Of the factor.
    """

    kind: ClassVar[str]

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the factor."""
        ...

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return one deviation, on the CPU, fp32."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file needs to hold."""
        ...


def require_fp32(tensors: dict[str, Tensor]) -> None:
    """Refuse what is no fp32, or not finite."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.float32 or not bool(tensor.isfinite().all()):
            raise ValueError(f"{name} is {tensor.dtype}, or holds a NaN or an Inf; expected finite fp32")


@dataclass(frozen=True)
class Gaussian:
    """Noise whose covariance is diagonal in a Kronecker basis, and isotropic outside of it.

    With ``E (rows, columns)`` standard normal and ``P = L^T E R``, a draw is
    ``rest E + L ((std - rest) * P) R^T``: standard deviations ``std`` along ``L_i R_j^T``, ``rest`` elsewhere.
    ``None`` for L or R stands for the identity.

    Attributes:
        size: ``(rows, columns)`` of the factor.
        std: ``(k, l)``, or broadcastable to it.
        left: ``L (rows, k)`` with orthonormal columns.
        right: ``R (columns, l)`` with orthonormal columns.
        rest: Standard deviation in the directions that neither L nor R spans.
    """

    kind: ClassVar[str] = "gaussian"

    size: tuple[int, int]
    std: Tensor
    left: Tensor | None = None
    right: Tensor | None = None
    rest: float = 0.0

    def __post_init__(self) -> None:
        # products round differently by layout, and a file knows one layout only
        for name in ("std", "left", "right"):
            side = getattr(self, name)
            object.__setattr__(self, name, None if side is None else side.contiguous())

    @property
    def shape(self) -> tuple[int, int]:
        """Shape of the factor."""
        return self.size

    def draw(self, generator: torch.Generator) -> Tensor:
        """Return one deviation, on the CPU, fp32."""
        E = torch.randn(self.size, generator=generator)
        P = E if self.left is None else self.left.T @ E
        P = P if self.right is None else P @ self.right
        P = (self.std - self.rest) * P
        P = P if self.left is None else self.left @ P
        P = P if self.right is None else P @ self.right.T
        return P.add_(E, alpha=self.rest) if self.rest else P

    def tensors(self) -> dict[str, Tensor]:
        """Return what a file needs to hold."""
        sides = {"left": self.left, "right": self.right}
        kept = {key: value for key, value in sides.items() if value is not None}
        return {
            "std": self.std,
            "size": torch.tensor(self.size),
            "rest": torch.tensor(self.rest, dtype=torch.float64),
            **kept,
        }

    @classmethod
    def of_tensors(cls, tensors: dict[str, Tensor]) -> Gaussian:
        """Invert :meth:`tensors`, without trust.

        Raises:
            ValueError: Names, shapes, dtypes or values do not fit one another.
        """
        expected = {"std", "size", "rest"}
        if not expected <= set(tensors) <= {*expected, "left", "right"}:
            raise ValueError(f"it holds {sorted(tensors)}; expected {sorted(expected)} and perhaps left and right")
        size, std, rest = tensors["size"], tensors["std"], tensors["rest"]
        if size.dtype != torch.int64 or size.shape != (2,) or rest.dtype != torch.float64 or rest.ndim:
            raise ValueError(f"size is {size.dtype} {tuple(size.shape)}; expected two int64, with rest one fp64 number")
        sides = []
        for name, rows in zip(("left", "right"), size.tolist(), strict=True):
            side = tensors.get(name)
            if side is not None and (side.dtype != torch.float32 or side.ndim != 2 or side.shape[0] != rows):
                raise ValueError(f"{name} is {side.dtype} {tuple(side.shape)}; expected fp32 ({rows}, k)")
            sides.append(rows if side is None else side.shape[1])
        fits = std.dtype == torch.float32 and std.ndim == 2
        if not fits or any(found not in (1, wanted) for found, wanted in zip(std.shape, sides, strict=True)):
            raise ValueError(f"std is {std.dtype} {tuple(std.shape)}; expected fp32, broadcastable to {tuple(sides)}")
        if not all(bool(t.isfinite().all()) for t in tensors.values()) or bool((std < 0).any()) or rest < 0:
            raise ValueError("it holds a NaN, an Inf or a negative standard deviation")
        rows, columns = size.tolist()
        return cls((rows, columns), std, tensors.get("left"), tensors.get("right"), float(rest))

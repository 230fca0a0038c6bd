"""Zero points of quantised weights, into which an adapter on pooled inputs can be merged (QA-LoRA, arXiv 2309.14717).

A weight quantised in groups is ``W[i, j] = scales[i, g] (q[i, j] - zeros[i, g])`` with integer codes ``q``, one scale
and zero point for each output ``i`` and group ``g`` of neighbouring inputs. A change ``D[i, g]`` that is equal for all
inputs of a group is ``zeros - D / scales``, and the codes stay as they are. That needs zero points that are no
integers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..config import LoraNullConfig
from .refusals import Target


@dataclass(frozen=True)
class ZeroPoints:
    """The zero points of one weight ``(m, d)``.

    Attributes:
        group_size: Number of inputs that share one.
        values: ``(m, d / group_size)``, floating point, as they are stored.
        per_unit: By what a value changes where the weight changes by 1, of the shape of ``values`` or one number.
        write: Stores other values of the same shape and dtype.
    """

    group_size: int
    values: Tensor
    per_unit: Tensor | float
    write: Callable[[Tensor], None]

    def shifted(self, change: Tensor) -> Tensor:
        """Return the values under which the weight has changed by ``change (m, d / group_size)``, in float64."""
        wide = change.to(self.values.device, torch.float64)
        return self.values.double() + self.per_unit * wide


def _hqq(layer: Any, d: int, m: int) -> ZeroPoints:
    meta: dict[str, Any] = layer.meta
    size, axis = meta.get("group_size"), meta.get("axis")
    if axis != 1 or not size or d % size or "zero" not in meta or "scale" not in meta:
        raise ValueError(
            f"HQQ has quantised it with axis={axis}, group_size={size}, {sorted(meta)}; expected axis=1, a group size "
            f"that divides d={d}, and scales and zero points that are neither quantised nor offloaded. Quantise the "
            "model so: BaseQuantizeConfig(nbits=4, group_size=64, axis=1)."
        )
    zero, scale = meta["zero"], meta["scale"]
    grouped = (m, d // size)
    if zero.numel() != m * (d // size) or scale.numel() != zero.numel():
        raise ValueError(f"HQQ has {zero.numel()} zero points for it; expected {grouped}, one for each group.")

    def write(values: Tensor) -> None:
        meta["zero"] = values.reshape(zero.shape)

    return ZeroPoints(size, zero.reshape(grouped), -1 / scale.double().reshape(grouped), write)


def _intx(weight: Any, d: int, m: int) -> ZeroPoints:
    """The zero points of torchao's unpacked integers, which may be floating point where they began as integers."""
    rows, size = weight.block_size
    if rows != 1:
        raise ValueError(f"torchao has quantised it in blocks of {tuple(weight.block_size)}; expected one output each.")

    def write(values: Tensor) -> None:
        weight.zero_point = values

    return ZeroPoints(int(size), weight.zero_point.to(weight.dtype), -1 / weight.scale.double(), write)


def _tinygemm(weight: Any, d: int, m: int) -> ZeroPoints:
    """The zero points of torchao's packed int4, which are added to the weight: ``W = scale (q - 8) + zero``."""
    if getattr(weight, "qzeros", None) is not None or weight.block_size[0] != 1:
        raise ValueError("torchao has packed it with integer zero points; expected int4 weights without activations'.")
    packed = weight.scale_and_zero

    def write(values: Tensor) -> None:
        packed[:, :m, 1].copy_(values.mT)

    return ZeroPoints(int(weight.block_size[1]), packed[: d // weight.block_size[1], :m, 1].mT, 1.0, write)


# By the name of the class of a layer or of its weight.
_KINDS: dict[str, Callable[[Any, int, int], ZeroPoints]] = {
    "HQQLinear": _hqq,
    "IntxUnpackedToInt8Tensor": _intx,
    "Int4OpaqueTensor": _tinygemm,
    "Int4TilePackedTo4dTensor": _tinygemm,
}


def zero_points(name: str, linear: Any) -> ZeroPoints | None:
    """Return the zero points of a layer; ``None`` where its weight is not quantised, or in a way without any to change.

    Integer zero points packed into words (GPTQ, AWQ) cannot be changed by a fraction, and bitsandbytes has none.

    Raises:
        ValueError: The library is known, but not this way of using it.
    """
    weight: Any = getattr(linear, "weight", None)
    holders = {kind.__name__: holder for holder in (weight, linear) for kind in type(holder).__mro__}
    known = next((kind for kind in _KINDS if kind in holders), None)
    if known is None or any(parameter.is_meta for parameter in linear.parameters()):
        return None
    try:
        return _KINDS[known](holders[known], linear.in_features, linear.out_features)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from None


def with_group_size(config: LoraNullConfig, targets: Mapping[str, Target]) -> LoraNullConfig:
    """Return ``config`` with a number for ``group_pooling="auto"``: the group size of the quantised base.

    Raises:
        ValueError: A layer is not quantised, has no zero points to merge into, or another group size.
    """
    if config.group_pooling != "auto":
        return config
    sizes: dict[int, str] = {}
    for name, target in targets.items():
        points = zero_points(name, target.linear)
        if points is None:
            kind = type(getattr(target.linear, "weight", None)).__name__
            raise ValueError(
                f"group_pooling='auto' takes the group size of a base with zero points in floating point, which {name} "
                f"({type(target.linear).__name__}, {kind}) has not; known are {', '.join(_KINDS)}. Give the number, "
                "the group size of the quantised base that the adapter shall be merged into."
            )
        sizes.setdefault(points.group_size, name)
    if len(sizes) > 1:
        raise ValueError(
            f"group_pooling='auto' found several group sizes, {sizes}; expected one. Give a common multiple that "
            "divides the inputs of all layers, or leave layers out through target_modules."
        )
    return replace(config, group_pooling=next(iter(sizes)))

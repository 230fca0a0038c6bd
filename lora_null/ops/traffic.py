"""DRAM bytes, FLOPs and kept activations of an adapted linear, from a written model.

The model of each way to compute the layer is the list of its passes over memory below. A pass reads each operand
once and writes its result once, as a kernel with a good cache does; whatever several kernels touch, each of them
pays for. Sizes: x, dx ``T d``; y, u, dy, du ``T m``; S, dS ``T r``; W ``m d``; A, dA ``r d``; B, dB ``m r``.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import NamedTuple

PATHS = ("base", "eager", "accumulate", "fused")


class Pass(NamedTuple):
    """One kernel: what it reads, what it writes, and the dimensions of its products (``"Tdm Trm"``)."""

    reads: str
    writes: str
    products: str = ""


_BASE = (Pass("x W", "y", "Tdm"),), (Pass("dy W", "dx", "Tdm"),)
# PEFT's layer in one dtype, without dropout. u is the adapter's output; autograd adds the two halves of dx.
_EAGER = (
    (Pass("x W", "y", "Tdm"), Pass("x A", "S", "Tdr"), Pass("S B", "u", "Trm"), Pass("u", "u"), Pass("y u", "y")),
    (
        Pass("dy", "du"),
        Pass("du B", "dS", "Trm"),
        Pass("du S", "dB", "Trm"),
        Pass("dS x", "dA", "Tdr"),
        Pass("dS A", "dx", "Tdr"),
        Pass("dy W", "dx", "Tdm"),
        Pass("dx dx", "dx"),
    ),
)
_ACCUMULATE = (
    (Pass("x A", "S", "Tdr"), Pass("x W", "y", "Tdm"), Pass("S B y", "y", "Trm")),
    (
        Pass("dy B", "dS", "Trm"),
        Pass("dy S", "dB", "Trm"),
        Pass("dS x", "dA", "Tdr"),
        Pass("dy W", "dx", "Tdm"),
        Pass("dS A dx", "dx", "Tdr"),
    ),
)
_FUSED = (
    (Pass("x A", "S", "Tdr"), Pass("x W S B", "y", "Tdm Trm")),
    (Pass("dy B S", "dS dB", "Trm Trm"), Pass("dS x", "dA", "Tdr"), Pass("dy W dS A", "dx", "Tdm Tdr")),
)
_STEPS = dict(zip(PATHS, (_BASE, _EAGER, _ACCUMULATE, _FUSED), strict=True))


@dataclass(frozen=True)
class Traffic:
    """What one layer costs.

    Attributes:
        forward_bytes: DRAM bytes read and written by the forward.
        backward_bytes: The same for the backward.
        flops: Multiplications and additions of both, ``2 M N K`` per product.
        kept_bytes: Activations kept from forward to backward; weights and factors are not counted.
    """

    forward_bytes: int
    backward_bytes: int
    flops: int
    kept_bytes: int

    @property
    def bytes(self) -> int:
        """DRAM bytes of forward and backward."""
        return self.forward_bytes + self.backward_bytes

    def __add__(self, other: Traffic) -> Traffic:
        return Traffic(*(getattr(self, name) + getattr(other, name) for name in self.__dataclass_fields__))


def linear_traffic(
    path: str, T: int, d: int, m: int, r: int, *, frozen_a: bool = True, itemsize: int = 2, projects: bool = True
) -> Traffic:
    """Return the cost of one layer, forward and backward, with W frozen and a gradient wanted for x.

    Args:
        path: ``"base"`` (no adapter), ``"eager"`` (PEFT), ``"accumulate"`` (the vendor's GEMM with ``beta = 1``) or
            ``"fused"`` (the Triton kernels).
        T: Tokens.
        d: In-features.
        m: Out-features.
        r: Rank.
        frozen_a: Without dA, and without keeping x.
        itemsize: Bytes per element, of every matrix.
        projects: ``False`` for a layer that takes S from another one of its group (``lora_up_linear``).
    """
    if path not in PATHS:
        raise ValueError(f"path is {path!r}; expected one of {', '.join(PATHS)}.")
    sizes = {"x": T * d, "y": T * m, "u": T * m, "S": T * r, "W": m * d, "A": r * d, "B": m * r}
    sizes |= {"d" + name: size for name, size in sizes.items()}
    dimensions = {"T": T, "d": d, "m": m, "r": r}

    def wanted(step: Pass) -> bool:
        return not (frozen_a and "dA" in step.writes) and (projects or step.writes != "S")

    def operands(step: Pass) -> list[str]:
        names = f"{step.reads} {step.writes}".split()
        return names if projects or "dx" not in step.writes else [name for name in names if name not in ("dS", "A")]

    def products(step: Pass) -> list[str]:
        return [p for p in step.products.split() if projects or not ("dx" in step.writes and p == "Tdr")]

    def trivial(step: Pass) -> bool:
        # Without its own projection, accumulating dS A into dx is left to the layer that has it.
        return not projects and step.reads.startswith("dS A")

    forward, backward = ([s for s in phase if wanted(s) and not trivial(s)] for phase in _STEPS[path])
    count = [itemsize * sum(sizes[name] for step in phase for name in operands(step)) for phase in (forward, backward)]
    flops = sum(2 * prod(dimensions[n] for n in p) for step in (*forward, *backward) for p in products(step))
    kept = 0 if path == "base" else itemsize * (sizes["S"] * projects + (0 if frozen_a else sizes["x"]))
    return Traffic(count[0], count[1], flops, kept)


def group_traffic(path: str, T: int, d: int, ms: Iterable[int], r: int, *, itemsize: int = 2) -> Traffic:
    """Return the cost of layers with out-features ``ms`` that read one x and share its projection (frozen A).

    ``"eager"`` layers share nothing. The ``r x r`` factors are folded into B ``(m, r)`` without touching anything
    of T rows, and not counted; nor is the sum of the layers' dx, which the base layers have as well.
    """
    total = Traffic(0, 0, 0, 0)
    for index, m in enumerate(ms):
        total += linear_traffic(path, T, d, m, r, itemsize=itemsize, projects=path == "eager" or index == 0)
    return total

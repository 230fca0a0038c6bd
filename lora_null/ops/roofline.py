"""What an adapted layer takes on a GPU by arithmetic: its large products, and the passes over memory that none hides.

One model for :func:`lora_null.ops.explain` and for the benchmarks' page of predictions. The rates are nominal: nothing
here is a measurement.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Card:
    """Rates of a GPU: bytes per second, operations per second."""

    bytes_per_s: float
    bf16_flops_per_s: float
    fp64_flops_per_s: float
    source: str


_SOURCE = (
    "bandwidth: data sheet; bf16: rate that public reports give for large cuBLAS products; fp64: three quarters of the "
    "data sheet's 67 TFLOP/s for the tensor cores"
)
# By the name that torch gives the device.
CARDS = {
    "NVIDIA H100 80GB HBM3": Card(3.35e12, 650e12, 50e12, _SOURCE),
    "NVIDIA H200": Card(4.8e12, 700e12, 50e12, _SOURCE),
}

# Passes over a (T, d) or (T, m) matrix that a product adds to the two large ones of forward and backward, with A
# frozen: x read; y read and written; dy read twice, or once; dx written, and read inside the large product. Fused
# products add the low-rank one while it is in registers.
PASSES = {
    "project": {"triton": 1, "cublas": 1},
    "forward": {"triton": 0, "cublas": 2},
    "backward_dy": {"triton": 1, "cublas": 2},
    "backward_dx": {"triton": 0, "cublas": 1},
}
# The same of separate operations, as PEFT's eager layer makes them.
SEPARATE_PASSES = 16


def passes(backends: dict[str, str]) -> int:
    """Return the passes over ``(T, d)`` matrices on a GPU beside the two large products, forward and backward."""
    return sum(ways[backends[product]] for product, ways in PASSES.items())


def linear_seconds(card: Card, T: int, d: int, m: int, passes: int) -> float:
    """Predict forward and backward of an adapted layer in 16 bits, with A frozen and small r.

    A pass is taken over the mean of the input's and the output's width. The low-rank products themselves are left out.
    """
    return 4 * T * d * m / card.bf16_flops_per_s + passes * T * (d + m) / card.bytes_per_s


def story(name: str, T: int, d: int, m: int, chosen: int) -> str:
    """Return in a sentence what ``chosen`` passes mean for a layer on the card ``name``; empty if it is not known.

    Empty for a layer of no tokens too, which takes no time by this arithmetic.
    """
    card = CARDS.get(name)
    if card is None or not T:
        return ""
    separate, ours = (linear_seconds(card, T, d, m, passes) for passes in (SEPARATE_PASSES, chosen))
    return (
        f"{separate / ours:.2f} of the speed of separate operations, at {card.bf16_flops_per_s / 1e12:.0f} TFLOP/s and "
        f"{card.bytes_per_s / 1e12:.2f} TB/s: arithmetic, not a measurement"
    )

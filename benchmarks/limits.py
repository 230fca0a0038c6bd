"""What a computation must cost: operations and bytes on one side, measured ceilings of the machine on the other.

``limit = max(bytes / copy rate, sum over dtypes of operations / matmul rate)``. The rates are those of one large
copy and one large matrix product on the same machine in the same run, not those of a data sheet. A result's
share of the limit is ``limit / time``; a method that needs fewer operations than the written model can exceed 1.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import torch

from .timing import Timed, Times, clock, interleave

DTYPES = {
    "fp64": torch.float64,
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
ITEM_BYTES = {"fp64": 8, "fp32": 4, "bf16": 2, "fp16": 2}


@dataclass(frozen=True)
class Work:
    """The least that a question's task costs.

    Attributes:
        bytes: Every input read once and every output written once.
        flops: Operations (a multiplication and an addition count as two) by the dtype they run in.
        model: The formula in words.
    """

    bytes: float
    flops: dict[str, float] = field(default_factory=dict)
    model: str = ""

    @property
    def total_flops(self) -> float:
        """Operations of all dtypes together."""
        return sum(self.flops.values())

    def __add__(self, other: Work) -> Work:
        flops = {k: self.flops.get(k, 0) + other.flops.get(k, 0) for k in {*self.flops, *other.flops}}
        return Work(self.bytes + other.bytes, flops, self.model or other.model)

    def __mul__(self, factor: float) -> Work:
        return Work(self.bytes * factor, {k: v * factor for k, v in self.flops.items()}, self.model)


@dataclass(frozen=True)
class Ceilings:
    """Rates of one machine: bytes per second of a copy (read plus written), operations per second by dtype."""

    copy: float
    matmul: dict[str, float]

    def limit_ms(self, work: Work) -> float | None:
        """Return the least time of ``work`` in milliseconds, or ``None`` where a rate is not known."""
        if not set(work.flops) <= set(self.matmul):
            return None
        arithmetic = sum(flops / self.matmul[dtype] for dtype, flops in work.flops.items())
        return 1e3 * max(work.bytes / self.copy, arithmetic)


def measure_ceilings(device: str, dtypes: tuple[str, ...], seconds: float = 1.0) -> tuple[Ceilings, dict[str, Times]]:
    """Measure the ceilings by one copy and one matrix product per dtype.

    Args:
        device: ``"cpu"`` or ``"cuda"``.
        dtypes: Names out of ``DTYPES``.
        seconds: Time for each of them.

    Returns:
        The ceilings, and the times of ``"copy"`` and ``"matmul-<dtype>"`` that they come from.
    """
    ticks = clock(device)
    count = 2**30 if device == "cuda" else 2**26
    source = torch.rand(count // 4, device=device)
    target = torch.empty_like(source)
    times = {"copy": _time(Timed(partial(target.copy_, source)), ticks, seconds)}
    copy = 2 * source.nbytes / (times["copy"].median_ms / 1e3)
    del source, target
    rates = {}
    for name in dtypes:
        n = 8192 if device == "cuda" and ITEM_BYTES[name] == 2 else 4096 if device == "cuda" else 2048
        a = torch.randn(n, n, device=device).to(DTYPES[name])
        b = torch.randn(n, n, device=device).to(DTYPES[name])
        times[f"matmul-{name}"] = _time(Timed(partial(torch.matmul, a, b)), ticks, seconds)
        rates[name] = 2 * n**3 / (times[f"matmul-{name}"].median_ms / 1e3)
    return Ceilings(copy, rates), times


def _time(timed: Timed, ticks, seconds: float) -> Times:
    timed()
    return Times.of(interleave({"it": timed}, ticks, seconds=seconds)["it"])


def covariance_work(T: int, d: int, dtype: str) -> Work:
    """``C += X^T X``, one triangle: ``T d (d + 1)`` operations; X read once, a triangle of fp32 read and written."""
    triangle = d * (d + 1) / 2
    return Work(
        bytes=T * d * ITEM_BYTES[dtype] + 2 * 4 * triangle,
        flops={dtype: T * d * (d + 1)},
        model="T d (d + 1) operations; X once, one fp32 triangle of C read and written",
    )


# Vectors of the Krylov space per vector wanted: the least that came within 1e-4 of the optimum on real spectra was
# 512 for r = 128 (d = 4096).
KRYLOV = 4
# Vectors of the last Rayleigh-Ritz step per vector wanted.
RITZ = 1.125


def null_space_work(d: int, r: int) -> Work:
    """One Cholesky factorisation, a Krylov space of ``4 r`` vectors of the inverse, one Rayleigh-Ritz step with C.

    A vector of the space costs a pair of triangular solves and its orthogonalisation against those before it.
    """
    space, block = min(d, KRYLOV * r), min(d, RITZ * r)
    solves, orthogonal = 2 * d * d * space, 2 * d * space**2
    return Work(
        bytes=8 * (d * d + d * r),
        flops={"fp64": d**3 / 3 + solves + orthogonal + 2 * d * d * block + 2 * d * space * block},
        model="d^3/3 (Cholesky) + 2 d K (d + K) (Krylov space) + 2 d b (d + K) (Ritz step), K = 4 r, b = 1.125 r, fp64",
    )


def factorize_work(m: int, d: int, r: int) -> Work:
    """``W U``, QR of ``(m, r)``, SVD of ``(r, r)``, and the two products that form the factors."""
    return Work(
        bytes=4 * m * d + 8 * d * r + 4 * r * (m + d),
        flops={"fp64": 2 * m * d * r + 4 * m * r**2 + 22 * r**3 + 2 * (m + d) * r**2},
        model="2 m d r + 4 m r^2 + 22 r^3 + 2 (m + d) r^2 in fp64; W and U once, factors once",
    )


def linear_work(T: int, m: int, d: int, r: int, dtype: str, mode: str, train_a: bool) -> Work:
    """The adapted linear with everything of rank ``r`` folded into the two large products.

    Forward reads x, W and writes y; backward reads dy and W and writes dx. ``S (T, r)`` is written and read once.
    With A trained the backward pass also reads x.
    """
    size = ITEM_BYTES[dtype]
    factors = r * (m + d)
    forward = Work(size * (T * d + T * m + m * d + T * r + factors), {dtype: 2.0 * T * m * d + 2.0 * T * r * (m + d)})
    backward = Work(
        size * (T * m + T * d + m * d + 2 * T * r + factors) + (size * T * d if train_a else 0),
        {dtype: 2.0 * T * m * d + 2.0 * T * r * (2 * m + d) + (2.0 * T * r * d if train_a else 0)},
    )
    chosen = {"forward": forward, "backward": backward, "both": forward + backward}[mode]
    model = "two products 2 T m d, all rank-r terms folded in; x, W, y once, dy, W, dx once"
    return Work(chosen.bytes, chosen.flops, model)


def decoder_work(shape, T: int, r: int, dtype: str, sequence: int, *, train_a: bool) -> Work:
    """One decoder layer, forward and backward, base frozen: its linears, and causal attention at half the square."""
    work = Work(0.0)
    for linear in shape.linears:
        work = work + linear_work(T, linear.m, linear.d, r, dtype, "both", train_a)
    width = shape.heads * shape.head_dim
    attention = 3.5 * 2 * T * sequence * width
    return work + Work(
        ITEM_BYTES[dtype] * 8 * T * shape.hidden_size,
        {dtype: attention},
        "all linears as in the linear question + causal attention, forward and backward; elementwise passes free",
    )


def training_work(shape, T: int, r: int, dtype: str, sequence: int, *, layers: int, vocab: int, train_a: bool) -> Work:
    """A training step: ``layers`` decoder layers and the output head, forward and input gradient."""
    head = Work(
        ITEM_BYTES[dtype] * (2 * vocab * shape.hidden_size + 2 * T * vocab),
        {dtype: 4.0 * T * vocab * shape.hidden_size},
    )
    return decoder_work(shape, T, r, dtype, sequence, train_a=train_a) * layers + head


def forward_work(shape, T: int, dtype: str, sequence: int) -> Work:
    """The forward pass of the decoder layers, as calibration runs it (no output head)."""
    flops = 2.0 * T * shape.layer_parameters + 2.0 * T * sequence * shape.heads * shape.head_dim
    bytes_ = ITEM_BYTES[dtype] * (shape.layer_parameters + T * sum(x.m + x.d for x in shape.linears))
    return Work(bytes_, {dtype: flops}) * shape.layers


def initialization_work(shape, tokens: int, r: int, dtype: str, sequence: int) -> Work:
    """Calibration forward, one symmetric covariance per distinct input, one null space each, thin factors."""
    work = forward_work(shape, tokens, dtype, sequence)
    for width in shape.covariance_widths:
        # The accumulation reads and writes C once per queue of 8192 tokens.
        launches = max(1, tokens // 8192)
        work = work + covariance_work(tokens // launches, width, dtype) * (launches * shape.layers)
        work = work + null_space_work(width, r) * shape.layers
    for linear in shape.linears:
        work = work + factorize_work(linear.m, linear.d, r) * shape.layers
    return Work(work.bytes, work.flops, "forward + 4 covariances, 4 null spaces, 7 thin factorisations per layer")

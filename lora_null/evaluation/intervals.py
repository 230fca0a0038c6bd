"""Means over documents with bootstrap intervals, and the same mean before and after, paired by document."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

LEVEL = 0.95
# Numbers that one block of resamples may gather at a time: 32 MiB of float64.
_BLOCK = 2**22
# Bias of the size of noise over that which its resamples show: sqrt(2 / pi) / (sqrt(4 / pi) - sqrt(2 / pi)).
_SIZE_BIAS = 2**0.5 + 1


@dataclass(frozen=True)
class Estimate:
    """A mean with its 95 % interval.

    Attributes:
        value: The mean over all documents.
        low: Lower end of the interval; None for a single document, which tells nothing about others.
        high: Upper end.
    """

    value: float
    low: float | None = None
    high: float | None = None

    def __str__(self) -> str:
        return f"{self.value:.4g}" + ("" if self.low is None else f" [{self.low:.3g}, {self.high:.3g}]")


@dataclass(frozen=True)
class Paired:
    """The same measure of the pre-trained and of the tuned model.

    Attributes:
        before: Of the pre-trained model.
        after: Of the tuned model.
        change: ``after - before``, with the interval of the difference: both are measured on the same documents, so
            that it is much narrower than those of its parts.
    """

    before: Estimate
    after: Estimate
    change: Estimate


def estimates(
    sums: Mapping[str, Tensor], counts: Tensor, *, resamples: int = 2000, seed: int = 0
) -> dict[str, Estimate]:
    """Return ``sum(sums) / sum(counts)`` of each name, with intervals from common resamples of the documents.

    The interval is the percentile bootstrap with the level widened for few documents as Hesterberg (2015, section
    4.2.2) proposes: of 12 documents it holds the mean in 95 % of normal samples (plain: 91 %), 90 % of
    exponential ones (87 %). A document is one unit: tokens of one document are not independent.

    An interval of width zero says that all documents agree, not that the value is certain: where none of ``n``
    questions changed, up to ``3 / n`` of all questions may (95 %, the rule of three).

    Args:
        sums: Name to ``(n,)``, summed over the tokens of each document.
        counts: ``(n,)``, tokens of each document; ones for questions.
        resamples: How many times the documents are drawn anew.
        seed: Of the draws.
    """
    counts = counts.double()
    columns = torch.stack([column.double() for column in sums.values()], dim=1)  # (n, k)
    values = (columns.sum(0) / counts.sum()).tolist()
    if len(counts) < 2:
        return {name: Estimate(value) for name, value in zip(sums, values, strict=True)}
    tail = _tail(len(counts))
    ends = torch.tensor([tail, 1 - tail], dtype=torch.float64)
    low, high = torch.quantile(_means(columns, counts, resamples, seed), ends, dim=0).tolist()
    return {name: Estimate(*row) for name, row in zip(sums, zip(values, low, high, strict=True), strict=True)}


def paired(before: Tensor, after: Tensor, counts: Tensor, *, resamples: int = 2000, seed: int = 0) -> Paired:
    """Return the means of ``before (n,)``, ``after (n,)`` and their difference; see :func:`estimates`."""
    columns = {"before": before.double(), "after": after.double(), "change": after.double() - before.double()}
    return Paired(**estimates(columns, counts, resamples=resamples, seed=seed))


def paired_sizes(before: Tensor, after: Tensor, *, resamples: int = 2000, seed: int = 0) -> Paired:
    """Return ``sum_b |mean of column b|`` of ``before (n, bins)``, ``after (n, bins)`` and the difference of both.

    That is the calibration error of :func:`~lora_null.evaluation.metrics.gaps`. It is no mean: sizes of noise add up,
    so that the value is too large, and its resamples are so once more. Percentiles of them would never hold the zero of
    honest probabilities. The intervals take the bias off, which lies between that of the resamples and 2.42 times
    it: of ``x`` with mean 0 and deviation ``s``, ``E|x| = 0.80 s``, and its resamples add ``0.33 s``; far from 0 both
    vanish.
    """
    n, columns = len(before), torch.cat([before, after], dim=1).double()

    def measures(means: Tensor) -> Tensor:
        first, second = (part.abs().sum(-1) for part in means.chunk(2, dim=-1))
        return torch.stack([first, second, second - first], dim=-1)

    values = measures(columns.mean(0))
    if n < 2:
        return Paired(*map(Estimate, values.tolist()))
    drawn = measures(_means(columns, torch.ones(n, dtype=torch.float64), resamples, seed))
    least = drawn.mean(0)[:2] - values[:2]
    most = _SIZE_BIAS * least
    # Of the change: that of after less that of before, whichever of their bounds they have.
    low_bias = torch.cat([least, (least[1] - most[0])[None]])
    high_bias = torch.cat([most, (most[1] - least[0])[None]])
    spread = -float(torch.special.ndtri(torch.tensor(_tail(n), dtype=torch.float64))) * drawn.std(0)
    floor = torch.tensor([0.0, 0.0, -math.inf], dtype=torch.float64)
    low = (values - high_bias - spread).maximum(floor)
    high = (values - low_bias + spread).maximum(floor)
    return Paired(*(Estimate(*row) for row in torch.stack([values, low, high], dim=1).tolist()))


def _means(columns: Tensor, counts: Tensor, resamples: int, seed: int) -> Tensor:
    """Return ``(resamples, k)``: ``sum(columns) / sum(counts)`` over ``n`` documents drawn anew each time."""
    n = len(counts)
    generator = torch.Generator().manual_seed(seed)
    block = max(1, _BLOCK // (n * columns.shape[1]))
    means = []
    for start in range(0, resamples, block):
        drawn = torch.randint(n, (min(block, resamples - start), n), generator=generator)
        means.append(columns[drawn].sum(1) / counts[drawn].sum(1, keepdim=True))
    return torch.cat(means)


def _tail(n: int) -> float:
    """Return the probability below the interval: ``Phi(-sqrt(n / (n - 1)) t)``, ``t`` of Student's ``n - 1``."""
    z = float(torch.special.ndtri(torch.tensor((1 + LEVEL) / 2, dtype=torch.float64)))
    # Student's quantile by its expansion in 1 / (n - 1) (Abramowitz and Stegun 26.7.5), good to 1 % from n = 4 on.
    v = n - 1
    t = z + (z**3 + z) / (4 * v) + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * v**2)
    return float(torch.special.ndtr(torch.tensor(-((n / v) ** 0.5) * t, dtype=torch.float64)))

"""How good, and how honest, probabilities are: accuracy, NLL, calibration error, Brier score."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..models.arguments import takes

BINS = 15


@dataclass(frozen=True)
class Scores:
    """Figures of ``N`` predictions; all but accuracy are better when lower.

    Attributes:
        accuracy: Share of predictions whose most probable class is right.
        nll: Mean negative log-likelihood of the right class, in nats.
        ece: Expected calibration error: the mean distance between confidence and accuracy over bins of confidence.
        brier: Mean of ``sum_c (p_c - [c right])^2``, from 0 to 2.
    """

    accuracy: float
    nll: float
    ece: float
    brier: float


@takes(probabilities=Tensor, labels=Tensor)
def scores(probabilities: Tensor, labels: Tensor, *, bins: int = BINS) -> Scores:
    """Judge predictions.

    Args:
        probabilities: ``(N, classes)``, rows summing to 1.
        labels: Right classes ``(N,)``, int.
        bins: Of :func:`calibration_error`.

    Raises:
        ValueError: Shapes do not fit, a row is no distribution, or a label is no class.
    """
    p, labels = _checked(probabilities, labels), labels.cpu()
    right = p.gather(1, labels[:, None])[:, 0]
    nll = -right.clamp_min(torch.finfo(torch.float64).tiny).log().mean()
    accuracy = (p.argmax(1) == labels).double().mean()
    return Scores(
        float(accuracy), float(nll), calibration_error(p, labels, bins=bins), float(brier_scores(p, labels).mean())
    )


def brier_scores(p: Tensor, labels: Tensor) -> Tensor:
    """Return ``sum_c (p_c - [c right])^2`` of each row of ``p (N, classes)``; ``labels (N,)``."""
    # sum_c (p_c - y_c)^2 = sum p^2 - 2 p_y + 1
    return (p**2).sum(1) - 2 * p.gather(1, labels[:, None])[:, 0] + 1


def gaps(p: Tensor, labels: Tensor, bins: int = BINS) -> Tensor:
    """Return ``(N, bins)``: confidence minus hit of each row of ``p (N, classes)`` in its bin, zero elsewhere.

    The calibration error of any of the rows is the sum of the sizes of the bins' means over them.
    """
    confidence, chosen = p.max(1)
    gap = confidence - (chosen == labels).double()
    return torch.zeros(len(p), bins, dtype=torch.float64).scatter(1, _bin_of(confidence, bins)[:, None], gap[:, None])


@takes(probabilities=Tensor, labels=Tensor)
def calibration_error(probabilities: Tensor, labels: Tensor, *, bins: int = BINS) -> float:
    """Return the expected calibration error (Guo et al., arXiv 1706.04599, equation 3).

    Args:
        probabilities: ``(N, classes)``, rows summing to 1.
        labels: Right classes ``(N,)``, int.
        bins: Number of bins ``(lower, upper]`` of equal width.

    Raises:
        ValueError: Shapes do not fit, a row is no distribution, or a label is no class.
    """
    _require_bins(bins)
    return float(gaps(_checked(probabilities, labels), labels.cpu(), bins).mean(0).abs().sum())


@dataclass(frozen=True)
class Bin:
    """One bar of a reliability diagram: mean confidence and accuracy of the predictions in a bin, and their share."""

    confidence: float
    accuracy: float
    share: float


@takes(probabilities=Tensor, labels=Tensor)
def reliability(probabilities: Tensor, labels: Tensor, *, bins: int = BINS) -> list[Bin]:
    """Return the bins that hold predictions, by ascending confidence; arguments as in :func:`calibration_error`."""
    _require_bins(bins)
    confidence, chosen = _checked(probabilities, labels).max(1)
    hit = (chosen == labels.cpu()).double()
    index = _bin_of(confidence, bins)
    found = []
    for number in index.unique().tolist():
        inside = index == number
        found.append(Bin(float(confidence[inside].mean()), float(hit[inside].mean()), float(inside.double().mean())))
    return found


def _bin_of(confidence: Tensor, bins: int) -> Tensor:
    return (confidence * bins).ceil().long().clamp(1, bins) - 1


def _require_bins(bins: int) -> None:
    if bins < 1:
        raise ValueError(f"bins={bins}; expected at least 1.")


def _checked(probabilities: Tensor, labels: Tensor) -> Tensor:
    if probabilities.ndim != 2 or labels.shape != probabilities.shape[:1] or not labels.numel():
        raise ValueError(
            f"probabilities are {tuple(probabilities.shape)} and labels {tuple(labels.shape)}; expected (N, classes) "
            "and (N,), with N at least 1."
        )
    if labels.is_floating_point() or bool(((labels < 0) | (labels >= probabilities.shape[1])).any()):
        raise ValueError(
            f"labels are {labels.dtype} from {labels.min().item()} to {labels.max().item()}; expected integers from 0 "
            f"to {probabilities.shape[1] - 1}. Leave ignored labels out."
        )
    p = probabilities.detach().cpu().double()
    # bf16 rows sum to 1 within 1e-2; logits, the likely mistake, are far away
    if not bool(((p >= 0).all(1) & ((p.sum(1) - 1).abs() < 2e-2)).all()):
        raise ValueError("A row of probabilities is no distribution; expected softmax(logits), not logits.")
    return p

"""Figures of predictions against values worked out by hand, and against their definitions."""

import math

import pytest
import torch

from lora_null.bayes import calibration_error, reliability, scores


def test_figures_of_two_predictions_by_hand():
    p, labels = torch.tensor([[0.8, 0.2], [0.6, 0.4]]), torch.tensor([0, 1])
    found = scores(p, labels)
    assert found.accuracy == 0.5
    assert found.nll == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert found.brier == pytest.approx((0.04 + 0.04 + 0.36 + 0.36) / 2)
    # 0.8 lies in the bin up to 12/15 and is right, 0.6 in the one up to 9/15 and is wrong
    assert found.ece == pytest.approx((0.2 + 0.6) / 2)


def test_honest_probabilities_have_no_calibration_error_and_inflated_ones_have_theirs():
    generator = torch.Generator().manual_seed(0)
    right = torch.rand(200_000, generator=generator, dtype=torch.float64) / 2 + 0.5
    p = torch.stack([right, 1 - right], 1)
    labels = (torch.rand(len(right), generator=generator, dtype=torch.float64) > right).long()
    assert calibration_error(p, labels) < 5e-3
    surer = torch.stack([right**0.25, 1 - right**0.25], 1)
    assert calibration_error(surer, labels) == pytest.approx(float((right**0.25 - right).mean()), abs=5e-3)


def test_bins_share_out_every_prediction_and_their_edges_belong_below():
    p = torch.tensor([[0.5, 0.5, 0.0], [1.0, 0.0, 0.0], [0.4, 0.3, 0.3]], dtype=torch.float64)
    found = reliability(p, torch.tensor([0, 0, 1]), bins=2)
    assert [(b.accuracy, b.share) for b in found] == [(0.5, pytest.approx(2 / 3)), (1.0, pytest.approx(1 / 3))]
    assert found[0].confidence == pytest.approx(0.45)


@pytest.mark.parametrize(
    ("p", "labels", "said"),
    [
        (torch.tensor([[2.0, -1.0]]), torch.tensor([0]), "not logits"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([-100]), "ignored labels"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0.0]), "expected integers"),
        (torch.tensor([[0.5, 0.5]]), torch.tensor([0, 1]), "expected \\(N, classes\\)"),
        (torch.zeros(0, 2), torch.zeros(0, dtype=torch.long), "at least 1"),
    ],
)
def test_what_is_no_prediction_is_refused(p, labels, said):
    with pytest.raises(ValueError, match=said):
        scores(p, labels)

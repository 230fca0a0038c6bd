"""Factors stacked, padded and shifted, and back again."""

import pytest
import torch
from torch import nn

from lora_null.adapters.delta import pad, shift_base, stack, unstack

M, D, R = 7, 11, 3


@pytest.fixture
def factors():
    """Return ``A, B, A0, B0``."""
    torch.manual_seed(0)
    return [torch.randn(shape) for shape in ((R, D), (M, R), (R, D), (M, R))]


@pytest.mark.parametrize("rank", [2 * R, 2 * R + 5], ids=["plain", "padded"])
def test_what_was_stacked_is_taken_apart(factors, rank):
    A, B, A0, B0 = factors
    stacked = pad(*stack(A, B, 0.75, (A0, B0)), rank)
    assert [tuple(factor.shape) for factor in stacked] == [(rank, D), (M, rank)]
    torch.testing.assert_close(stacked[1] @ stacked[0], 0.75 * (B @ A - B0 @ A0))
    for got, want in zip(unstack(*stacked, 0.75, R), (A, B - B0, A0, B0), strict=True):
        torch.testing.assert_close(got, want)


def test_without_a_start_the_scaling_moves_into_B(factors):
    A, B, _, _ = factors
    stacked_A, stacked_B = stack(A, B, 0.75, None)
    assert torch.equal(stacked_A, A) and torch.equal(stacked_B, 0.75 * B)
    assert stacked_A.data_ptr() != A.data_ptr()


def test_a_shift_is_undone_by_its_opposite(factors):
    A, B, _, _ = factors
    linear = nn.Linear(D, M)
    before, bias = linear.weight.detach().clone(), linear.bias.detach().clone()
    shift_base(linear, A, B, -0.75)
    torch.testing.assert_close(linear.weight.detach(), before - 0.75 * B @ A)
    shift_base(linear, A, B, 0.75)
    torch.testing.assert_close(linear.weight.detach(), before)
    assert torch.equal(linear.bias, bias)

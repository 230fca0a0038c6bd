"""factorize: the properties of the method, and weights in awkward places."""

import pytest
import spectra
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from lora_null import factorize, null_space

D, M, R = 60, 45, 9


def problem(d=D, m=M, r=R, seed=0, nullity=0):
    """Return ``W (m, d)``, ``C (d, d)`` and ``U (d, r)`` in float64."""
    C, _ = spectra.with_spectrum(spectra.null(d, nullity) if nullity else spectra.power(d, 1), seed=seed)
    generator = torch.Generator().manual_seed(seed)
    W = torch.randn(m, d, generator=generator, dtype=torch.float64)
    return W, C, null_space(C, r).basis


def assert_properties(W, U, A0, B0):
    r, size = U.shape[1], float(W.abs().max())
    projected = W @ U @ U.mT
    torch.testing.assert_close(B0 @ A0, projected, atol=1e-12 * size * len(W), rtol=0, msg="B0 A0 is not W U U^T")
    torch.testing.assert_close(A0 @ U @ U.mT, A0, atol=1e-12 * size * len(W), rtol=0, msg="A0 leaves the null space")
    rows, columns = A0 @ A0.mT, B0.mT @ B0
    singular = torch.linalg.svdvals(W @ U)
    expected = torch.diag(torch.cat([singular, singular.new_zeros(r - len(singular))]))
    for name, gram in (("A0 A0^T", rows), ("B0^T B0", columns)):
        torch.testing.assert_close(gram, expected, atol=1e-11 * float(singular[0]), rtol=0, msg=f"{name} is not D")


def test_containment_balance_and_product():
    W, _, U = problem()
    A0, B0 = factorize(W, U, dtype=torch.float64)
    assert A0.shape == (R, D) and B0.shape == (M, R)
    assert_properties(W, U, A0, B0)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(d=st.integers(1, 40), m=st.integers(1, 40), data=st.data())
def test_properties_at_any_shape(d, m, data):
    W, _, U = problem(d, m, data.draw(st.integers(1, d), "r"), seed=data.draw(st.integers(0, 3), "seed"))
    assert_properties(W, U, *factorize(W, U, dtype=torch.float64))


def test_thin_factorisation_equals_the_full_one():
    W, _, U = problem()
    A0, B0 = factorize(W, U, dtype=torch.float64)
    P, S, Qt = torch.linalg.svd(W @ U @ U.mT, full_matrices=False)  # the published procedure, m x d
    P, root, Qt = P[:, :R], S[:R].sqrt(), Qt[:R]
    signs = torch.sign((P * B0).sum(dim=0))
    torch.testing.assert_close(B0, P * root * signs, atol=1e-12, rtol=0)
    torch.testing.assert_close(A0, (root * signs)[:, None] * Qt, atol=1e-12, rtol=0)


def test_function_is_preserved():
    W, _, U = problem()
    A0, B0 = factorize(W, U, dtype=torch.float64)
    x = torch.randn(7, D, dtype=torch.float64)
    residual = W - B0 @ A0
    torch.testing.assert_close(x @ residual.mT + (x @ A0.mT) @ B0.mT, x @ W.mT, atol=1e-12, rtol=0)


@pytest.mark.parametrize("nullity", [0, R, R + 10])
def test_guarantee_with_a_frozen(nullity):
    # ||(B - B0) A0 X||_F <= ||B - B0||_2 sqrt(D_1) (sum of the r smallest eigenvalues)^(1/2), C = X X^T.
    W, C, U = problem(nullity=nullity)
    A0, _ = factorize(W, U, dtype=torch.float64)
    values, V = torch.linalg.eigh(C)
    X = V * values.clamp_min(0).sqrt()
    bound = float(torch.linalg.svdvals(W @ U)[0] * values[:R].clamp_min(0).sum()) ** 0.5
    for seed in range(10):
        change = torch.randn(M, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = float(torch.linalg.norm(change @ A0 @ X))
        limit = float(torch.linalg.matrix_norm(change, 2)) * bound
        assert moved <= limit * (1 + 1e-6) + 1e-6
        if nullity:
            assert moved < 1e-6


def test_signs_do_not_depend_on_the_basis_of_the_subspace():
    W, _, U = problem()
    rotation, _ = torch.linalg.qr(torch.randn(R, R, generator=torch.Generator().manual_seed(1), dtype=torch.float64))
    for A, B in zip(factorize(W, U), factorize(W, U @ rotation), strict=True):
        torch.testing.assert_close(A, B, atol=1e-6, rtol=0)
    _, B0 = factorize(W, U)
    assert bool((B0.gather(0, B0.abs().argmax(dim=0, keepdim=True)) > 0).all())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_computed_in_float64_whatever_the_weight(dtype):
    W, _, U = problem()
    W = W.to(dtype)
    expected = factorize(W.double(), U)
    for result, reference in zip(factorize(W, U), expected, strict=True):
        assert result.dtype == torch.float32 and torch.equal(result, reference)


def test_layer_and_parameter_are_taken_and_left_as_they_were():
    W, _, U = problem()
    linear = nn.Linear(D, M)
    linear.weight.data.copy_(W)
    before = linear.weight.detach().clone()
    for weight in (linear, linear.weight):
        A0, B0 = factorize(weight, U)
        assert not A0.requires_grad and not B0.requires_grad
        torch.testing.assert_close(A0, factorize(before, U)[0])
    assert torch.equal(linear.weight, before) and linear.weight.requires_grad


def test_offloaded_weight_is_fetched():
    from accelerate import cpu_offload

    W, _, U = problem()
    model = nn.Sequential(nn.Linear(D, M, bias=False))
    linear = model[0]
    linear.weight.data.copy_(W)
    expected = factorize(linear.weight, U)
    cpu_offload(model, execution_device="cpu")
    assert linear.weight.device.type == "meta"
    for result, reference in zip(factorize(linear, U), expected, strict=True):
        assert torch.equal(result, reference)
    assert linear.weight.device.type == "meta"
    with pytest.raises(ValueError, match="meta device"):
        factorize(linear.weight, U)


def test_bad_input_is_refused():
    W, _, U = problem()
    with pytest.raises(TypeError, match="int8"):
        factorize(W.to(torch.int8), U)
    with pytest.raises(ValueError, match="do not fit"):
        factorize(W.mT, U)
    with pytest.raises(ValueError, match="two dimensions"):
        factorize(W, U[:, 0])
    W[3, 4] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        factorize(W, U)

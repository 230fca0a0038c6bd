"""null_basis: what is free, held as the smaller of itself and its complement."""

import math
import re

import pytest
import spectra
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_null import NullBasis, null_basis

pytestmark = pytest.mark.usefixtures("one_thread")

FAMILIES = {
    "power-0.3": spectra.power(200, 0.3),
    "power-2": spectra.power(200, 2),
    "exponential-12": spectra.exponential(200, 12),
    "null": spectra.null(200, 120),
    "repeated": spectra.repeated(200, 60, 180),
    "smollm2-qkv": spectra.measured(200, "qkv"),
    "smollm2-down": spectra.measured(200, "down"),
}


def assert_null_basis(C, energy, found):
    values = torch.linalg.eigvalsh(C)
    d, k = len(C), found.k
    held = found.basis if found.basis is not None else found.complement
    assert (found.basis is None) != (found.complement is None) and held.shape == (d, min(k, d - k))
    assert found.basis is not None or 2 * k > d
    eye = torch.eye(held.shape[1], dtype=torch.float64)
    assert float((held.mT @ held - eye).norm()) < 1e-12
    # The fewest leading directions that hold the share: one fewer would not.
    total, protected = values.clamp_min(0).sum(), values[k:].sum()
    assert protected >= energy * total * (1 - 1e-10)
    assert k == d or protected - values[k] < energy * total
    torch.testing.assert_close(found.eigenvalues, values, atol=1e-13 * float(values[-1]), rtol=0)
    # What is held is invariant: C moves it nowhere else.
    inner = held.mT @ C @ held
    assert float((C @ held - held @ inner).norm()) < 1e-12 * float(C.norm()) * d**0.5
    end = values[:k] if found.basis is not None else values[k:]
    assert float(inner.trace()) == pytest.approx(float(end.sum()), rel=1e-9, abs=1e-13 * d * float(values[-1]))
    assert found.energy_left == pytest.approx(float(values[:k].sum()), rel=1e-9, abs=1e-13 * d * float(values[-1]))
    assert found.info["bound"] ** 2 <= 1 - energy + 1e-10


@pytest.mark.parametrize("energy", [0, 0.5, 0.9, 0.99])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_spectrum(family, energy):
    C, _ = spectra.with_spectrum(FAMILIES[family])
    found = null_basis(C, energy, certify=True)
    assert_null_basis(C, energy, found)
    assert found.info["certificate"]["proved"]
    assert found.info["certificate"]["edge"] <= 3 or family == "repeated"


@settings(max_examples=60, deadline=None, derandomize=True)
@given(d=st.integers(1, 60), exponent=st.floats(0, 3), energy=st.floats(0, 0.999), seed=st.integers(0, 3))
def test_any_size_and_share(d, exponent, energy, seed):
    C, _ = spectra.with_spectrum(spectra.power(d, exponent), seed=seed)
    try:
        found = null_basis(C, energy, certify=True)
    except ValueError as error:
        assert "leaves 0 of" in str(error)
        values = torch.linalg.eigvalsh(C)
        assert float(values[1:].sum()) < energy * float(values.sum())
    else:
        assert_null_basis(C, energy, found)
        assert found.info["certificate"]["proved"]


@pytest.mark.parametrize("energy", [0, 0.5, 0.99])
def test_projection(energy):
    C, _ = spectra.with_spectrum(spectra.power(80, 1))
    found = null_basis(C, energy)
    free = torch.linalg.eigh(C)[1][:, : found.k]
    A = torch.randn(7, 80, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    inside = found.project(A)
    torch.testing.assert_close(inside, A @ free @ free.mT, atol=1e-12, rtol=0)
    torch.testing.assert_close(found.project(inside), inside, atol=1e-13, rtol=0)
    # 2^-9 is the largest rounding of bf16; energy=0 protects nothing.
    assert found.leak(inside) < 1e-14
    rounded = found.leak(inside.bfloat16())
    assert rounded == 0 if energy == 0 else 2**-13 < rounded < 2**-8
    assert found.leak(A) == pytest.approx(float((A - inside).norm() / A.norm()), abs=1e-12)
    assert found.project(A.float()).dtype == torch.float64


def test_both_forms_are_reached():
    C, _ = spectra.with_spectrum(spectra.power(80, 1))
    forms = {energy: null_basis(C, energy) for energy in (0.3, 0.99)}
    assert forms[0.3].complement is not None and forms[0.99].basis is not None


def test_the_guarantee_holds_for_any_coefficients():
    # |B C N^T X|_F <= |B C|_2 (sum of the free eigenvalues)^(1/2)
    C, _ = spectra.with_spectrum(spectra.power(80, 1.5))
    values, V = torch.linalg.eigh(C)
    X = V * values.sqrt()
    found = null_basis(C, 0.99)
    for seed in range(10):
        M = torch.randn(50, found.k, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        moved = float((M @ found.basis.mT @ X).norm())
        assert moved <= float(torch.linalg.matrix_norm(M, 2)) * found.energy_left**0.5 * (1 + 1e-9)


@pytest.mark.parametrize("scale", [1e-305, 1e-300, 1e200, 1e300])
def test_any_scale(scale):
    C, _ = spectra.with_spectrum(spectra.power(80, 1))
    near, far = null_basis(C, 0.9, certify=True), null_basis(C * scale, 0.9, certify=True)
    assert (near.k, far.info["certificate"]["proved"]) == (far.k, True)
    assert far.energy_left == pytest.approx(near.energy_left * scale, rel=1e-6)
    threshold = far.info["certificate"]["threshold"]
    assert threshold == pytest.approx(near.info["certificate"]["threshold"] * scale, rel=1e-6)


def test_certificate_refuses_a_complement_that_misses_a_vector():
    from lora_null.solver.certificate import of_largest

    C, V = spectra.with_spectrum(spectra.power(80, 1))
    values = torch.linalg.eigvalsh(C)
    keep = [*range(70), *range(71, 76), *range(77, 80)]
    assert of_largest(C, V[:, torch.arange(79, -1, -1)][:, -8:].contiguous(), values)["proved"]
    assert not of_largest(C, V.flip(1)[:, keep][:, -8:].contiguous(), values[keep])["proved"]


def test_nothing_protected_is_proved_without_work():
    C, _ = spectra.with_spectrum(spectra.power(20, 1))
    found = null_basis(C, 0, certify=True)
    assert found.k == 20 and found.complement.shape == (20, 0)
    assert found.info["certificate"] == {"proved": True, "threshold": math.inf, "above": 0, "edge": 0}


def test_result_dtype_and_untouched_input():
    C, _ = spectra.with_spectrum(spectra.power(40, 1))
    kept = C.clone()
    found = null_basis(C.requires_grad_(), 0.5, dtype=torch.float32)
    assert isinstance(found, NullBasis) and found.complement.dtype == torch.float32
    assert torch.equal(C, kept) and not found.complement.requires_grad
    lower = null_basis(C.detach().tril(), 0.5, uplo="lower")
    assert lower.k == found.k and lower.energy_left == pytest.approx(found.energy_left, rel=1e-9)


def test_the_energy_that_a_refusal_names_is_enough():
    C, _ = spectra.with_spectrum(spectra.power(20, 0.2))
    with pytest.raises(
        ValueError, match=r"null_basis: energy=0\.999 leaves 0 of 20 directions free.*at least 1"
    ) as refused:
        null_basis(C, 0.999)
    named = float(re.search(r"lower it to energy=([0-9.]+)\.", str(refused.value))[1])
    assert 0.9 < named < 0.999 and null_basis(C, named).k == 1


BAD = {
    "energy": (lambda: null_basis(torch.eye(4), 1), ValueError, r"null_basis: energy is 1; expected a share"),
    "energy-none": (lambda: null_basis(torch.eye(4), None), TypeError, "null_basis: energy is None"),
    "dict": (lambda: null_basis({}, 0.9), TypeError, "null_basis: C is a dict"),
    "meta": (lambda: null_basis(torch.eye(4, device="meta"), 0.9), ValueError, "null_basis: C is on the meta device"),
    "indefinite": (lambda: null_basis(torch.diag(torch.linspace(-1, 1, 4)), 0.5), ValueError, "null_basis: C has"),
    "dtype": (lambda: null_basis(torch.eye(4), 0.5, dtype=torch.int64), TypeError, "null_basis: dtype"),
    "uplo": (lambda: null_basis(torch.eye(4), 0.5, uplo="U"), ValueError, "null_basis: uplo is 'U'"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("at_least", [1, 60, 61, 150, 200])
def test_so_many_are_free_whatever_the_energy(at_least):
    C, _ = spectra.with_spectrum(spectra.power(200, 0.3))
    alone = null_basis(C, 0.9).k
    found = null_basis(C, 0.9, at_least=at_least, certify=True)
    assert found.k == max(alone, at_least) and found.info["certificate"]["proved"]
    assert found.energy_left == pytest.approx(float(torch.linalg.eigvalsh(C)[: found.k].sum()))
    whole = torch.eye(200, dtype=torch.float64)
    assert float((C @ found.project(whole) - found.project(whole) @ C).norm()) < 1e-12 * float(C.norm())


def test_more_free_directions_than_there_are_is_refused():
    C = torch.eye(5)
    assert null_basis(C, 0.99, at_least=2).k == 2
    with pytest.raises(ValueError, match="at_least is 6 for a covariance of size 5"):
        null_basis(C, 0.5, at_least=6)
    with pytest.raises(TypeError, match="at_least is 'r'; expected an integer"):
        null_basis(C, 0.5, at_least="r")

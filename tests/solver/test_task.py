"""null_space with a task: the best of the free directions, between LoRA-Null and the task's own principal space."""

import pytest
import spectra
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_null import null_basis, null_space

pytestmark = pytest.mark.usefixtures("one_thread")


def pair(d, seed=0, exponent=1.5, task_exponent=1.0):
    """Return covariances to keep and of a task, with eigenvectors of their own, float64."""
    C, _ = spectra.with_spectrum(spectra.power(d, exponent), seed=seed)
    T, _ = spectra.with_spectrum(spectra.power(d, task_exponent), seed=seed + 100)
    return C, T


def share_for(C, k):
    """Return an energy that leaves ``k`` directions free: between the sums of k and of k + 1 protected ones."""
    values = torch.linalg.eigvalsh(C)
    held = values.flip(0).cumsum(0)
    protected = len(values) - k
    low = float(held[protected - 2]) if protected > 1 else 0.0
    return (low + float(held[protected - 1])) / 2 / float(held[-1]) if protected else 0.0


def energy_of(M, U):
    return float((U * (M @ U)).sum())


def same_span(U, V):
    return float((U @ U.mT - V @ V.mT).abs().max())


@st.composite
def problems(draw):
    d = draw(st.integers(2, 48), "d")
    k = draw(st.integers(1, d), "k")
    r = draw(st.one_of(st.integers(1, k), st.just(k)), "r")
    exponents = draw(st.floats(0.3, 2), "keep"), draw(st.floats(0.3, 2), "task")
    return *pair(d, draw(st.integers(0, 5), "seed"), *exponents), k, r


@settings(max_examples=60, deadline=None, derandomize=True)
@given(problem=problems())
def test_properties_at_any_shape(problem):
    C, T, k, r = problem
    d, energy = len(C), share_for(C, k)
    space = null_space(C, r, task=T, energy=energy)
    U, info = space.basis, space.info
    values, V = torch.linalg.eigh(C)
    N = V[:, :k]
    assert info["k"] == k and U.shape == (d, r)
    assert float((U.mT @ U - torch.eye(r, dtype=torch.float64)).abs().max()) < 1e-12
    assert float((U - N @ (N.mT @ U)).abs().max()) < 1e-10, "the basis leaves the free directions"
    # Ky Fan: no r directions in the span of N hold more of the task.
    best = torch.linalg.eigvalsh(N.mT @ T @ N)[-r:].sum()
    assert energy_of(T, U) == pytest.approx(float(best), rel=1e-10)
    assert info["task_share"] == pytest.approx(float(best / T.trace()), rel=1e-10)
    # and the energy of any r free directions lies between those of the least and of the most used.
    assert values[:r].sum() * (1 - 1e-9) - 1e-14 <= space.energy <= values[k - r : k].sum() * (1 + 1e-9)
    assert space.energy == pytest.approx(energy_of(C, U), rel=1e-9)
    assert info["bound"] ** 2 == pytest.approx(space.energy / float(C.trace()), rel=1e-9)
    assert info["bound"] ** 2 <= (1 - energy) * (1 + 1e-9)
    assert bool((space.eigenvalues.diff() >= 0).all())
    diagonal = torch.diag(space.eigenvalues)
    torch.testing.assert_close(U.mT @ C @ U, diagonal, atol=1e-12, rtol=0)


@pytest.mark.parametrize("r", [1, 12, 20, 33])
def test_as_many_free_as_wanted_is_the_null_space(r):
    C, T = pair(40)
    space = null_space(C, r, task=T, energy=share_for(C, r))
    plain = null_space(C, r)
    assert same_span(space.basis, plain.basis) < 1e-10
    assert space.energy == pytest.approx(plain.energy, rel=1e-10)


def test_all_free_is_the_principal_space_of_the_task():
    C, T = pair(40)
    space = null_space(C, 7, task=T, energy=0)
    assert space.info["k"] == 40
    assert same_span(space.basis, torch.linalg.eigh(T)[1][:, -7:]) < 1e-10


def test_more_energy_to_keep_costs_the_task_and_never_the_kept():
    C, T = pair(60)
    spaces = [null_space(C, 6, task=T, energy=share_for(C, k)) for k in (60, 40, 25, 12, 6)]
    shares = [space.info["task_share"] for space in spaces]
    assert shares == sorted(shares, reverse=True) and shares[0] > 2 * shares[-1]
    assert spaces[0].energy > 10 * spaces[-1].energy


@pytest.mark.parametrize("k", [8, 15, 25])
def test_a_rotation_of_the_inputs_rotates_the_choice(k):
    C, T = pair(30)
    Q, _ = torch.linalg.qr(torch.randn(30, 30, generator=torch.Generator().manual_seed(5), dtype=torch.float64))
    for options in ({"energy": share_for(C, k)}, {"damping": 0.1}):
        space = null_space(C, 4, task=T, **options)
        turned = null_space(Q @ C @ Q.mT, 4, task=Q @ T @ Q.mT, **options)
        assert same_span(Q @ space.basis, turned.basis) < 1e-9
        # Neither covariance's unit matters, nor how far from 1 it is.
        scaled = null_space(C * 1e250, 4, task=T * 1e-280, **options)
        assert same_span(space.basis, scaled.basis) < 1e-9
        assert scaled.info["task_share"] == pytest.approx(space.info["task_share"], rel=1e-9)
        assert scaled.energy == pytest.approx(space.energy * 1e250, rel=1e-9)


@settings(max_examples=30, deadline=None, derandomize=True)
@given(d=st.integers(2, 30), seed=st.integers(0, 5), damping=st.floats(1e-4, 10), data=st.data())
def test_generalised_vectors_lead_in_task_per_energy(d, seed, damping, data):
    r = data.draw(st.integers(1, d), "r")
    C, T = pair(d, seed)
    space = null_space(C, r, task=T, damping=damping)
    U = space.basis
    assert float((U.mT @ U - torch.eye(r, dtype=torch.float64)).abs().max()) < 1e-12
    damped = C + damping * C.trace() / d * torch.eye(d, dtype=torch.float64)
    L = torch.linalg.cholesky(damped)
    whitened = torch.linalg.inv(L) @ T @ torch.linalg.inv(L).mT
    reached = torch.linalg.eigvals(torch.linalg.solve(U.mT @ damped @ U, U.mT @ T @ U)).real.sum()
    # Ky Fan for the pencil: the trace of (U^T M U)^-1 (U^T T U) is at most the sum of its r largest eigenvalues.
    assert float(reached) == pytest.approx(float(torch.linalg.eigvalsh(whitened)[-r:].sum()), rel=1e-8)
    assert 0 < space.info["task_share"] <= 1 + 1e-12 and "k" not in space.info


def test_damping_leads_from_the_null_space_to_the_task():
    C, T = pair(40)
    assert same_span(null_space(C, 5, task=T, damping=1e9).basis, torch.linalg.eigh(T)[1][:, -5:]) < 1e-6
    even = torch.eye(40, dtype=torch.float64)
    assert same_span(null_space(C, 5, task=even).basis, null_space(C, 5).basis) < 1e-9
    assert same_span(null_space(C, 5, task=T).basis, null_space(C, 5, task=T, damping=0.01).basis) == 0


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"energy": 0.3}, {"energy": 0}, {}], ids=str)
def test_certificate(options):
    C, T = pair(120)
    proof = null_space(C, 5, task=T, certify=True, **options).info["certificate"]
    assert proof["proved"]
    if options.get("energy"):
        side = "below" if "below" in proof else "above"
        values = torch.linalg.eigvalsh(C)
        beyond = values < proof["threshold"] if side == "below" else values > proof["threshold"]
        k = null_basis(C, options["energy"]).k
        assert int(beyond.sum()) == proof[side] == (k if side == "below" else 120 - k) - proof["edge"]


def test_energy_without_a_task_counts_the_free():
    C, T = pair(40)
    space = null_space(C, 5, energy=0.9)
    assert space.info["k"] == null_basis(C, 0.9).k == null_space(C, 5, task=T, energy=0.9).info["k"]
    assert same_span(space.basis, null_space(C, 5).basis) < 1e-12 and space.info["gap"] > 0


def test_triangles_and_dtypes():
    C, T = pair(40)
    whole = null_space(C, 5, task=T, energy=0.9)
    for uplo, half in (("lower", torch.tril), ("upper", torch.triu)):
        space = null_space(half(C), 5, task=half(T), energy=0.9, uplo=uplo, dtype=torch.float32)
        assert space.basis.dtype == torch.float32 and space.energy == pytest.approx(whole.energy, rel=1e-9)
    assert null_space(C.float(), 5, task=T, energy=0.9).energy == pytest.approx(whole.energy, rel=1e-3)


C, T = pair(12)
BLIND = torch.linalg.eigh(C)[1][:, -3:] @ torch.linalg.eigh(C)[1][:, -3:].mT
BAD = {
    "energy-one": (lambda: null_space(C, 2, energy=1.0), ValueError, r"energy is 1.0; expected a share.*\[0, 1\)"),
    "energy-percent": (lambda: null_space(C, 2, task=T, energy=99), ValueError, "energy is 99; expected a share"),
    "energy-nan": (lambda: null_space(C, 2, energy=float("nan")), ValueError, "energy is nan"),
    "energy-string": (lambda: null_space(C, 2, energy="0.9"), TypeError, "energy is '0.9'"),
    "few-free": (lambda: null_space(C, 9, task=T, energy=0.9), ValueError, r"leaves (\d) of 12 .*at least 9.*r=\1\."),
    "none-free": (lambda: null_space(C, 9, energy=0.99), ValueError, r"leaves 0 of 12 .* free.*energy=0\.\d+\."),
    "size": (lambda: null_space(C, 2, task=T[:5, :5]), ValueError, "task has the size 5, C 12; expected.*different"),
    "blind": (lambda: null_space(C, 2, task=BLIND, energy=0.9), ValueError, "task sees nothing in the .* free.*lower"),
    "blind-float32": (lambda: null_space(C, 2, task=BLIND.float(), energy=0.9), ValueError, "task sees nothing"),
    "task-zero": (lambda: null_space(C, 2, task=0 * T), ValueError, "task: the diagonal is zero"),
    "task-none-like": (lambda: null_space(C, 2, task=[1.0]), TypeError, "task is a list; expected a torch tensor"),
    "task-indefinite": (lambda: null_space(C, 2, task=T - T.trace() * torch.eye(12) / 12), ValueError, "task has an"),
    "keep-indefinite": (lambda: null_space(C - torch.eye(12) / 2, 2, task=T), ValueError, "C is not positive definite"),
    "keep-indefinite-energy": (lambda: null_space(C - torch.eye(12) / 20, 2, task=T, energy=0.5), ValueError, "semi"),
    "filtered": (lambda: null_space(C, 2, task=T, method="filtered"), ValueError, '"filtered" with task'),
    "damping-zero": (lambda: null_space(C, 2, task=T, damping=0), ValueError, "damping is 0; expected a positive"),
    "damping-alone": (lambda: null_space(C, 2, damping=0.1), ValueError, "damping is 0.1 without a task"),
    "damping-energy": (lambda: null_space(C, 2, task=T, energy=0.5, damping=0.1), ValueError, "or with energy"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()

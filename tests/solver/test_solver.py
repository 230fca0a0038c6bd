"""null_space: right on every spectrum, by every method, compiled or not."""

import math
import sys

import pytest
import spectra
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lora_null import NullSpace, null_space
from lora_null.system import extension

# The matrices are small: on a busy machine two threads wait for each other longer than they compute.
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def compiled():
    if extension.load() is None:
        pytest.skip("the extension is not built here")


D, R = 320, 40
FAMILIES = {
    "power-1": spectra.power(D, 1),
    "power-3": spectra.power(D, 3),
    "exponential-6": spectra.exponential(D, 6),
    "exponential-12": spectra.exponential(D, 12),
    "one-isolated": spectra.isolated(D, 1, 6),
    "five-isolated": spectra.isolated(D, 5, 10),
    "nullity-below-r": spectra.null(D, 25),
    "nullity-r": spectra.null(D, R),
    "nullity-above-r": spectra.null(D, 100),
    "repeated-across-edge": spectra.repeated(D, R - 5, R + 20),
    "repeated-more-than-a-block": spectra.repeated(D, 0, 30),
    "repeated-everywhere": spectra.repeated(D, 0, 100),
    "identity": torch.ones(D),
    "two-levels": torch.cat([torch.full((30,), 0.5), torch.ones(D - 30)]),
    "smollm2-qkv": spectra.measured(D, "qkv"),
    "smollm2-o": spectra.measured(D, "o"),
    "smollm2-gate_up": spectra.measured(D, "gate_up"),
    "smollm2-down": spectra.measured(D, "down"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_filtered_is_within_tolerance(family, compiled):
    C, _ = spectra.with_spectrum(FAMILIES[family])
    result = null_space(C, R, method="filtered")
    spectra.assert_null_space(C, R, result, excess=2e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_exact_is_optimal(family):
    C, _ = spectra.with_spectrum(FAMILIES[family])
    spectra.assert_null_space(C, R, null_space(C, R, method="exact"), excess=1e-9)


@pytest.mark.parametrize("tokens", [30, 200, 290])
def test_fewer_tokens_than_features(tokens, compiled):
    C = spectra.few_tokens(D, tokens)
    for r in (8, 40):
        spectra.assert_null_space(C, r, null_space(C, r, method="filtered"))


@settings(max_examples=30, deadline=None, derandomize=True)
@given(data=st.data())
def test_any_size_and_rank(data):
    d = data.draw(st.integers(1, 90), "d")
    r = data.draw(st.one_of(st.integers(1, d), st.sampled_from([1, max(1, d - 1), d])), "r")
    values = data.draw(
        st.one_of(
            st.floats(0.3, 3).map(lambda e: spectra.power(d, e)),
            st.floats(6, 12).map(lambda e: spectra.exponential(d, e)),
            st.tuples(st.integers(1, 5), st.floats(3, 9)).map(lambda a: spectra.isolated(d, *a)),
            st.integers(0, d).map(lambda n: spectra.null(d, n)),
            st.tuples(st.integers(0, d), st.integers(0, d)).map(lambda a: spectra.repeated(d, min(a), max(a))),
        ),
        "spectrum",
    )
    C, _ = spectra.with_spectrum(values, seed=data.draw(st.integers(0, 3), "rotation"))
    for method in ("exact", "filtered", "auto"):
        spectra.assert_null_space(C, r, null_space(C, r, method=method, seed=data.draw(st.integers(0, 9))))


def test_no_random_subspace_has_less_energy():
    C, _ = spectra.with_spectrum(FAMILIES["smollm2-o"])
    energy = null_space(C, R, method="filtered").energy
    for seed in range(20):
        Q, _ = torch.linalg.qr(torch.randn(D, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64))
        assert energy < float((Q * (C @ Q)).sum())


def test_basis_lies_in_the_null_space():
    C, V = spectra.with_spectrum(spectra.null(D, 60))
    for method in ("exact", "filtered"):
        U = null_space(C, R, method=method).basis
        outside = U - V[:, :60] @ (V[:, :60].mT @ U)
        assert float(outside.abs().max()) < 1e-8


def test_without_the_extension_the_direct_solver_answers(monkeypatch):
    monkeypatch.setitem(extension._loaded, "module", None)
    C, _ = spectra.with_spectrum(FAMILIES["smollm2-gate_up"])
    result = null_space(C, R, method="filtered", seed=3)
    assert result.info["method"] == "exact" and "extension" in result.info["handed_over"]
    spectra.assert_null_space(C, R, result, excess=1e-9)


def test_deterministic_and_independent_of_threads():
    C, _ = spectra.with_spectrum(FAMILIES["smollm2-o"])
    first = null_space(C, R, method="filtered", seed=5)
    again = null_space(C, R, method="filtered", seed=5)
    assert torch.equal(first.basis, again.basis) and torch.equal(first.eigenvalues, again.eigenvalues)
    torch.set_num_threads(2)
    threaded = null_space(C, R, method="filtered", seed=5)
    assert abs(threaded.energy / first.energy - 1) < 1e-9
    projectors = [space.basis @ space.basis.mT for space in (first, threaded)]
    # Directions at the edge are as free as the tolerance on the energy leaves them.
    assert float((projectors[0] - projectors[1]).abs().max()) < 1e-6


def test_global_random_state_is_left_alone():
    C, _ = spectra.with_spectrum(FAMILIES["power-1"])
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    null_space(C, R, method="filtered")
    assert torch.equal(torch.rand(3), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("uplo", ["lower", "upper"])
def test_reads_one_triangle_and_writes_nothing(uplo, dtype):
    C, _ = spectra.with_spectrum(FAMILIES["smollm2-o"])
    C = C.to(dtype)
    half = C.clone()
    unused = torch.ones(D, D, dtype=torch.bool).triu(1)
    half[unused if uplo == "lower" else unused.mT] = torch.nan
    kept = half.clone()
    for method in ("exact", "filtered"):
        result = null_space(half, R, method=method, uplo=uplo)
        spectra.assert_null_space(C.double(), R, result)
        assert torch.equal(half.nan_to_num(7), kept.nan_to_num(7))


def test_strided_input():
    C, _ = spectra.with_spectrum(FAMILIES["smollm2-o"])
    large = torch.full((2 * D, 3 * D), torch.nan, dtype=torch.float64)
    view = large[::2, 1::3]
    view.copy_(C)
    assert not view.is_contiguous()
    spectra.assert_null_space(C, R, null_space(view, R, method="filtered"))


def test_requires_grad_and_result_dtype():
    C, _ = spectra.with_spectrum(FAMILIES["smollm2-o"])
    result = null_space(C.requires_grad_(), R, method="filtered", dtype=torch.float32)
    assert result.basis.dtype == torch.float32 and result.eigenvalues.dtype == torch.float64
    assert not result.basis.requires_grad


def test_hands_over_when_it_does_not_converge(compiled):
    C, _ = spectra.with_spectrum(spectra.power(D, 0.5))
    result = null_space(C, R, method="filtered", max_cycles=2)
    assert result.info["method"] == "exact" and "2 cycles" in result.info["handed_over"]
    spectra.assert_null_space(C, R, result, excess=1e-9)


def test_shift_grows_until_the_factorisation_succeeds(compiled):
    C, _ = spectra.with_spectrum(spectra.null(D, 60))
    C -= 1e-8 * torch.eye(D, dtype=torch.float64)  # rounding of a float32 sum, made definite in sign
    result = null_space(C, R, method="filtered")
    assert result.info["attempts"] > 1 and result.info["shift"] > 1e-8
    spectra.assert_null_space(C, R, result)


def test_info_of_the_filtered_solver():
    C, _ = spectra.with_spectrum(FAMILIES["smollm2-o"])
    result = null_space(C, R, method="filtered")
    assert isinstance(result, NullSpace)
    info, values = result.info, torch.linalg.eigvalsh(C)
    assert info["method"] == "filtered" and info["attempts"] == 1 and R <= info["columns"] <= D
    assert abs(info["shift"] - 1e-10 * float(values.mean())) < 1e-16
    assert abs(info["gap"] - float(values[R] / values[R - 1] - 1)) < 0.02
    assert 0 <= info["residual"] < 1e-4
    seconds = info["seconds"]
    assert set(seconds) == {"prepare", "factor", "iterate", "test", "finish", "total"}
    assert sum(seconds.values()) - seconds["total"] <= seconds["total"]


def test_auto_goes_by_size():
    small, _ = spectra.with_spectrum(spectra.measured(200, "o"))
    assert null_space(small, 8).info["method"] == "exact"
    large = torch.diag(torch.as_tensor(spectra.measured(1200, "o")))
    assert null_space(large, 16).info["method"] == "filtered"
    assert null_space(large, 61).info["method"] == "exact"


@pytest.mark.parametrize("method", ["exact", "filtered"])
def test_certificate_counts_the_eigenvalues(method):
    for family in ("smollm2-o", "repeated-across-edge", "identity", "five-isolated", "nullity-below-r"):
        C, _ = spectra.with_spectrum(FAMILIES[family])
        proof = null_space(C, R, method=method, certify=True).info["certificate"]
        assert proof["proved"], family
        assert int((torch.linalg.eigvalsh(C) < proof["threshold"]).sum()) == proof["below"] == R - proof["edge"]
    assert proof["edge"] <= 2  # nullity-below-r has a clear gap between most of its values


def test_certificate_refuses_a_basis_that_misses_a_vector():
    from lora_null.solver.certificate import certificate

    C, V = spectra.with_spectrum(spectra.isolated(D, 3, 6))
    values = torch.linalg.eigvalsh(C)
    keep = [0, 2, *range(3, R + 1)]  # all but the second smallest
    assert not certificate(C, V[:, keep], values[keep], R)["proved"]


def test_uncertified_result_is_solved_directly(monkeypatch):
    C, V = spectra.with_spectrum(spectra.isolated(D, 3, 6))
    values = torch.linalg.eigvalsh(C)

    def wrong(C, r, **options):
        keep = [0, 2, *range(3, R + 1)]
        return V[:, keep].contiguous(), values[keep], {"reason": "", "seconds": {}}

    monkeypatch.setattr(sys.modules["lora_null.solver.null_space"], "_filtered", wrong)
    result = null_space(C, R, method="filtered", certify=True)
    assert result.info["method"] == "exact" and result.info["certificate"]["proved"]
    spectra.assert_null_space(C, R, result, excess=1e-9)


@pytest.mark.parametrize("method", ["exact", "filtered"])
@pytest.mark.parametrize("exponent", [-1022, -999, -510, -300, 300, 511, 999, 1020])
def test_energies_are_right_at_any_scale(exponent, method):
    C, _ = spectra.with_spectrum(spectra.power(D, 2))
    # In two steps: the power itself is below the normal range.
    far = C * 2.0 ** (exponent // 2) * 2.0 ** (exponent - exponent // 2)
    near, result = (null_space(given, R, method=method, certify=True) for given in (C, far))
    spectra.assert_null_space(C, R, NullSpace(result.basis, near.eigenvalues, near.energy))
    # Entries below 2^-1022 have lost their last bits.
    assert math.ldexp(result.energy, -exponent) == pytest.approx(near.energy, rel=1e-3 if exponent < -1000 else 1e-9)
    assert result.info["certificate"]["proved"] and result.info["method"] == near.info["method"]
    threshold = math.ldexp(result.info["certificate"]["threshold"], -exponent)
    assert threshold == pytest.approx(near.info["certificate"]["threshold"], rel=1e-2)


def test_the_direct_solver_survives_a_failure_of_mrrr(monkeypatch):
    import scipy.linalg

    solve = scipy.linalg.eigh_tridiagonal
    drivers = []

    def fails(*args, lapack_driver, **options):
        drivers.append(lapack_driver)
        if lapack_driver == "stemr":
            raise scipy.linalg.LinAlgError("stemr failed")
        return solve(*args, lapack_driver=lapack_driver, **options)

    monkeypatch.setattr(scipy.linalg, "eigh_tridiagonal", fails)
    C, _ = spectra.with_spectrum(FAMILIES["smollm2-o"])
    spectra.assert_null_space(C, R, null_space(C, R, method="exact"), excess=1e-9)
    assert drivers == ["stemr", "stebz"]


def test_bound_holds_for_any_update():
    C, _ = spectra.with_spectrum(FAMILIES["smollm2-o"])
    values, V = torch.linalg.eigh(C)
    X = V * values.clamp_min(0).sqrt()
    space = null_space(C, R)
    for seed in range(5):
        update = torch.randn(30, R, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) @ space.basis.mT
        size = float(torch.linalg.matrix_norm(update, 2)) * float(X.norm())
        assert float((update @ X).norm()) <= space.info["bound"] * size * (1 + 1e-9)


IDENTITY = torch.eye(12, dtype=torch.float64)
# The four parts of a message: what was got, what was expected, the likely cause, the remedy.
BAD = {
    "not-a-tensor": (lambda: null_space([[1.0]], 1), TypeError, "C is a list; expected a torch tensor.*numpy"),
    "none": (lambda: null_space(None, 1), TypeError, "C is None; expected a torch tensor.*has the layer no covariance"),
    "dict": (lambda: null_space({"a": IDENTITY}, 1), TypeError, "C is a dict; expected .*null_spaces"),
    "swapped": (lambda: null_space(2, IDENTITY), TypeError, "C is 2; expected .*swapped"),
    "swapped-r": (lambda: null_space(IDENTITY, IDENTITY), TypeError, "r is a Tensor; expected an integer"),
    "meta": (lambda: null_space(IDENTITY.to("meta"), 2), ValueError, "meta device.*expected.*init_empty.*Calibrate"),
    "complex": (lambda: null_space(IDENTITY.cfloat(), 2), TypeError, "complex64; expected float32.*mask"),
    "bool": (lambda: null_space(IDENTITY.bool(), 2), TypeError, "torch.bool; expected float32.*mask"),
    "sparse": (lambda: null_space(IDENTITY.to_sparse(), 2), TypeError, "sparse_coo; expected a dense.*to_dense"),
    "result-dtype": (lambda: null_space(IDENTITY, 2, dtype=torch.int32), TypeError, "int32|dtype; expected a floating"),
    "tol-none": (lambda: null_space(IDENTITY, 2, tol=None), TypeError, "tol is None; expected a relative excess"),
    "seed": (lambda: null_space(IDENTITY, 2, seed=None), TypeError, "seed is None; expected an integer"),
    "cycles-float": (lambda: null_space(IDENTITY, 2, max_cycles=2.5), TypeError, "max_cycles is 2.5"),
    "half": (lambda: null_space(IDENTITY.half(), 2), TypeError, "float16"),
    "integer": (lambda: null_space(IDENTITY.long(), 2), TypeError, "int64"),
    "not-square": (lambda: null_space(IDENTITY[:5], 2), ValueError, r"\(5, 12\)"),
    "empty": (lambda: null_space(IDENTITY[:0, :0], 1), ValueError, r"\(0, 0\)"),
    "batched": (lambda: null_space(IDENTITY[None], 1), ValueError, r"\(1, 12, 12\)"),
    "r-zero": (lambda: null_space(IDENTITY, 0), ValueError, "1 <= r <= 12"),
    "r-above-d": (lambda: null_space(IDENTITY, 13), ValueError, "r is 13"),
    "r-float": (lambda: null_space(IDENTITY, 2.0), TypeError, "2.0"),
    "r-bool": (lambda: null_space(IDENTITY, True), TypeError, "True"),
    "zero": (lambda: null_space(0 * IDENTITY, 2), ValueError, "no activations"),
    "nan": (lambda: null_space(IDENTITY.index_fill(0, torch.tensor([3]), torch.nan), 2), ValueError, "NaN"),
    "one-inf": (lambda: null_space(IDENTITY + torch.zeros(12, 12).index_put_(
        (torch.tensor(2), torch.tensor(7)), torch.tensor(torch.inf)), 2), ValueError, "1 NaN or infinite"),
    "asymmetric": (lambda: null_space(IDENTITY + torch.ones(12, 12).tril(-1), 2), ValueError, "not symmetric"),
    "indefinite": (lambda: null_space(torch.diag(torch.linspace(-1, 1, 12)), 2), ValueError, "semidefinite"),
    "indefinite-filtered": (
        lambda: null_space(torch.diag(torch.linspace(-1, 1, 12)), 2, method="filtered"), ValueError, "semidefinite"),
    "method": (lambda: null_space(IDENTITY, 2, method="lanczos"), ValueError, "'exact'"),
    "uplo": (lambda: null_space(IDENTITY, 2, uplo="L"), ValueError, "'lower'"),
    "tol": (lambda: null_space(IDENTITY, 2, tol=0), ValueError, "tol is 0"),
    "oversample": (lambda: null_space(IDENTITY, 2, oversample=-1), ValueError, "oversample is -1"),
    "max_cycles": (lambda: null_space(IDENTITY, 2, max_cycles=0), ValueError, "max_cycles is 0"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_refused(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("family", FAMILIES)
def test_cuda_agrees_with_cpu(family):
    C, _ = spectra.with_spectrum(FAMILIES[family])
    result = null_space(C.cuda(), R, method="filtered")
    assert result.basis.is_cuda
    result = NullSpace(result.basis.cpu(), result.eigenvalues, result.energy)
    spectra.assert_null_space(C, R, result)
    assert abs(result.energy - null_space(C, R, method="filtered").energy) <= 1e-3 * result.energy + 1e-12

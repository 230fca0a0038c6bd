"""`covariance_update` against float64, whatever computes it, and the promises around it."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from kernel_tools import truncation, wide_product

from lora_null import ops
from lora_null.ops import covariance, dispatch
from lora_null.system import extension


def samples(T: int, d: int, dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Activation-like rows: a few outlier channels, correlated columns, a mean."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(T, d, generator=generator) + 0.3
    x = x + x.roll(1, 1) * torch.rand(d, generator=generator)
    x[:, :: max(d // 4, 1)] *= 20
    return x.to(dtype)


def lower_error(C: torch.Tensor, truth: torch.Tensor) -> float:
    """Of the entries in units of their channels: else the sums of a few outliers decide, and by luck."""
    scale = truth.diagonal().abs().sqrt().clamp_min(1e-300)
    unit = scale[:, None] * scale
    return (((C.double() - truth) / unit).tril().norm() / (truth / unit).tril().norm().clamp_min(1e-300)).item()


def assert_as_good_as_torch(x: torch.Tensor, start: torch.Tensor, got: torch.Tensor) -> None:
    truth = start.double() + x.double().t() @ x.double()
    own = lower_error(start + wide_product(x.t(), x), truth)
    error = lower_error(got, truth)
    assert torch.isfinite(got.tril()).all(), "NaN or infinity in the lower triangle"
    lucky = torch.finfo(torch.float32).eps / x.shape[1]  # with one element torch's own error may be zero
    most = 2 * own + lucky + truncation(x, x.shape[0])
    assert error <= most, f"relative error {error:.3g}, torch's own fp32 product {own:.3g}"


@pytest.fixture(params=["compiled", "blocks", "torch", "auto"])
def backend(request, monkeypatch):
    monkeypatch.setenv("LORA_NULL_COVARIANCE_BACKEND", request.param)
    return request.param


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T, d", [(1, 1), (63, 500), (500, 736), (300, 1504)], ids=lambda n: str(n))
def test_update_against_float64(backend, T, d, dtype):
    x = samples(T, d, dtype)
    start = torch.randn(d, d, generator=torch.Generator().manual_seed(1))
    start = (start + start.t()).float()
    got = start.clone()
    assert ops.covariance_update(got, x) is got
    assert_as_good_as_torch(x, start, got)


def test_upper_triangle_may_hold_anything(backend):
    x = samples(63, 500, torch.float32)
    C = torch.zeros(500, 500)
    C[torch.triu_indices(500, 500, 1).unbind()] = float("nan")
    ops.covariance_update(C, x)
    full = ops.symmetrize_(C)
    assert torch.equal(full, full.t())
    assert_as_good_as_torch(x, torch.zeros(500, 500), full)


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    shape=st.lists(st.integers(0, 9), min_size=0, max_size=3),
    d=st.integers(1, 40),
    data=st.data(),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_mask_counts_rows_once(shape, d, data, dtype):
    T = int(torch.tensor(shape).prod()) if shape else 1
    x = samples(T, d, dtype).reshape(*shape, d)
    bits = data.draw(st.lists(st.booleans(), min_size=T, max_size=T))
    mask = torch.tensor(bits, dtype=torch.bool).reshape(shape)
    poisoned = torch.where(mask[..., None], x, torch.full_like(x, float("nan")))
    masked, selected = torch.zeros(d, d), torch.zeros(d, d)
    ops.covariance_update(masked, poisoned, mask=mask)
    ops.covariance_update(selected, x.reshape(-1, d)[mask.reshape(-1)])
    assert torch.equal(masked.tril(), selected.tril())


def test_rows_may_be_strided(backend):
    wide = samples(500, 3 * 96, torch.float32)
    for x in (wide[::3, 96:192], wide[:, ::3], wide.t()[:90].t()):
        C = torch.zeros(x.shape[1], x.shape[1])
        ops.covariance_update(C, x)
        assert_as_good_as_torch(x, torch.zeros_like(C), C)


def test_C_may_be_a_slice_of_a_larger_buffer(backend):
    x = samples(100, 300, torch.float32)
    buffer = torch.full((300, 400), float("nan"))
    C = buffer[:, :300]
    C.zero_()
    ops.covariance_update(C, x)
    assert_as_good_as_torch(x, torch.zeros(300, 300), C)
    assert buffer[:, 300:].isnan().all()


def test_fp64_accumulator_keeps_what_fp32_loses():
    x = samples(400, 64, torch.bfloat16)
    exact = torch.zeros(64, 64, dtype=torch.float64)
    for piece in x.split(50):
        ops.covariance_update(exact, piece)
    truth = x.double().t() @ x.double()
    assert lower_error(exact, truth) < 1e-15


def test_conversion_in_chunks_changes_nothing(monkeypatch):
    x = samples(2000, 48, torch.bfloat16)
    monkeypatch.setattr(covariance, "_CHUNK", 48 * 300)
    C = torch.zeros(48, 48)
    ops.covariance_update(C, x)
    assert_as_good_as_torch(x, torch.zeros(48, 48), C)


compiled = pytest.mark.skipif(
    dispatch.reason_against_compiled_covariance(torch.zeros(1, 1), torch.float32) is not None,
    reason="no compiled kernel here",
)


@compiled
@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    T=st.integers(1, 300),
    d=st.integers(1, 330),
    stretch=st.sampled_from([(1, 1), (2, 1), (1, 2)]),
    padding=st.integers(0, 3),
    dtype=st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_compiled_kernel_on_any_shape(T, d, stretch, padding, dtype):
    """Ragged tiles, steps and strides; every buffer it is given, and every one it takes, held NaN before."""
    x = samples(T * stretch[0], d * stretch[1], dtype)[:: stretch[0], :: stretch[1]]
    buffer = torch.full((d, d + padding), float("nan"))
    C = buffer[:, :d]
    C[torch.tril_indices(d, d).unbind()] = 1.0
    torch.full((3_000_000,), float("nan"))
    covariance._compiled(C, x, None)
    assert_as_good_as_torch(x, torch.ones(d, d), C)
    assert C[torch.triu_indices(d, d, 1).unbind()].isnan().all() and buffer[:, d:].isnan().all()


@compiled
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_compiled_kernel_gives_the_same_bits_on_any_number_of_threads(dtype):
    x = samples(5000, 300, dtype)  # more than a slab, and no multiple of anything
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 16):
            torch.set_num_threads(threads)
            C = torch.zeros(300, 300)
            covariance._compiled(C, x, None)
            results.append(C)
    finally:
        torch.set_num_threads(before)
    assert_as_good_as_torch(x, torch.zeros(300, 300), results[0])
    assert all(torch.equal(C, results[0]) for C in results)


@compiled
def test_compiled_kernel_without_onednn():
    x = samples(100, 70, torch.bfloat16)
    C = torch.zeros(70, 70)
    with torch.backends.mkldnn.flags(enabled=False):
        covariance._compiled(C, x, None)
    assert_as_good_as_torch(x, torch.zeros(70, 70), C)


@compiled
def test_onednn_told_to_have_no_bf16_instructions():
    """On a CPU that has them: oneDNN then refuses the product with an exception of its own."""
    code = (
        "import torch; from lora_null import ops\n"
        "print(ops.covariance_update(torch.zeros(40, 40), torch.ones(30, 40, dtype=torch.bfloat16))[39, 0].item())"
    )
    environment = {**os.environ, "ONEDNN_MAX_CPU_ISA": "AVX512_CORE"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.strip() == "30.0", done.stderr


def test_without_the_extension_blas_computes_it(monkeypatch):
    monkeypatch.setattr(extension, "load", lambda: None)
    assert ops.covariance_update(torch.zeros(4, 4), torch.ones(3, 4))[0, 0] == 3
    assert ops.covariance_backend(torch.ones(3, 4)) == "blocks"
    monkeypatch.setenv("LORA_NULL_COVARIANCE_BACKEND", "compiled")
    monkeypatch.setenv("LORA_NULL_STRICT", "1")
    with pytest.raises(RuntimeError, match=r"no C\+\+ extension"):
        ops.covariance_update(torch.zeros(4, 4), torch.ones(3, 4))


def test_precision_switches_are_local():
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        x = samples(200, 300, torch.float32)
        C = torch.zeros(300, 300)
        ops.covariance_update(C, x)
        assert torch.get_float32_matmul_precision() == "medium"
        torch.set_float32_matmul_precision("highest")
        assert_as_good_as_torch(x, torch.zeros(300, 300), C)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("d", [1, 7, 1024, 1100])
def test_symmetrize_mirrors_the_lower_triangle(d):
    C = torch.randn(d, d)
    expected = C.tril() + C.tril(-1).t()
    assert ops.symmetrize_(C) is C
    assert torch.equal(C, expected)


@pytest.mark.parametrize(
    "C, x, mask, error",
    [
        (torch.zeros(4, 5), torch.zeros(3, 5), None, "square"),
        (torch.zeros(4, 4), torch.zeros(3, 5), None, "another width"),
        (torch.zeros(4, 4).half(), torch.zeros(3, 4), None, "smallest eigenvalues"),
        (torch.zeros(4, 4), torch.zeros(3, 4).double(), None, "float64 C"),
        (torch.zeros(4, 4), torch.zeros(3, 4, dtype=torch.int64), None, "bfloat16"),
        (torch.zeros(4, 4).expand(4, 4)[:, :], torch.zeros(3, 4), torch.ones(3), "bool"),
        (torch.zeros(4, 4), torch.zeros(3, 4), torch.ones(4, dtype=torch.bool), r"\(3,\)"),
        (torch.zeros(4, 8)[:, ::2], torch.zeros(3, 4), None, "stride"),
        (torch.zeros(4).expand(4, 4), torch.zeros(3, 4), None, "do not overlap"),
        (torch.zeros(10).as_strided((4, 4), (2, 1)), torch.zeros(3, 4), None, "do not overlap"),
        (torch.zeros(4, 4, device="meta"), torch.zeros(3, 4), None, "device"),
    ],
)
def test_wrong_calls_are_explained(C, x, mask, error):
    with pytest.raises((ValueError, TypeError), match=error):
        ops.covariance_update(C, x, mask=mask)


def one_memory(where):
    """C, and an x that lies in its memory or beside it."""
    numbers = np.arange(40, dtype=np.float32)
    C = torch.from_numpy(numbers)[:16].view(4, 4)
    x = {
        "C": C,
        "its rows": C[1:3],
        "its columns": C.t()[1:],
        "another storage": torch.from_numpy(numbers[12:20]).view(2, 4),
        "the next bytes": torch.from_numpy(numbers)[16:24].view(2, 4),
    }[where]
    return C, x


@pytest.mark.parametrize("where", ["C", "its rows", "its columns", "another storage"])
def test_x_in_the_memory_of_C_is_refused(backend, where):
    C, x = one_memory(where)
    before = C.clone()
    with pytest.raises(ValueError, match=r"x lies in the memory of C.*x\.clone"):
        ops.covariance_update(C, x)
    assert torch.equal(C, before)
    ops.covariance_update(C, x.clone())


def test_x_beside_C_is_taken(backend):
    C, x = one_memory("the next bytes")
    want = C + x.t() @ x
    assert torch.equal(ops.covariance_update(C, x).tril(), want.tril())


@pytest.mark.parametrize("shape", [(0,), (3, 0), (2, 3, 0), (0, 0)], ids=str)
def test_no_features_are_no_work(backend, shape):
    C, x = torch.zeros(0, 0), torch.zeros(shape)
    assert ops.covariance_update(C, x, mask=torch.ones(shape[:-1], dtype=torch.bool)) is C
    assert ops.covariance_update_reference(C, x).shape == ops.symmetrize_(C).shape == (0, 0)


def test_unknown_backend_is_named(monkeypatch):
    monkeypatch.setenv("LORA_NULL_COVARIANCE_BACKEND", "cuda")
    with pytest.raises(ValueError, match=r"cuda.*blocks"):
        ops.covariance_update(torch.zeros(4, 4), torch.zeros(3, 4))


def test_forced_kernel_falls_back_or_fails_in_strict_mode(monkeypatch, caplog):
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("the interpreter takes CPU tensors")
    monkeypatch.setenv("LORA_NULL_COVARIANCE_BACKEND", "triton")
    C = torch.zeros(4, 4)
    ops.covariance_update(C, torch.ones(3, 4))
    assert C[0, 0] == 3
    monkeypatch.setenv("LORA_NULL_STRICT", "1")
    with pytest.raises(RuntimeError, match="LORA_NULL_STRICT"):
        ops.covariance_update(C, torch.ones(3, 4))


@pytest.mark.parametrize("masked", [False, True])
def test_opcheck(masked):
    mask = torch.rand(12) > 0.5 if masked else None
    torch.library.opcheck(torch.ops.lora_null.covariance_update.default, (torch.zeros(8, 8), torch.randn(12, 8), mask))


def test_compiles_without_graph_breaks():
    def step(C, x):
        ops.covariance_update(C, x * 2)
        return C

    x = torch.randn(20, 16)
    C = torch.zeros(16, 16)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(C.clone(), x)
    assert torch.allclose(compiled.tril(), step(C, x).tril())


def test_gradient_inputs_are_accepted():
    x = torch.randn(20, 16, requires_grad=True)
    C = torch.zeros(16, 16)
    ops.covariance_update(C, x)
    assert not C.requires_grad and x.grad is None


@pytest.mark.parametrize("legacy", ["highest", "high", "medium"])
@pytest.mark.parametrize("switch", [None, "tf32"])
def test_both_ways_to_allow_tf32_agree_inside_and_come_back(legacy, switch):
    matmul = torch.backends.cuda.matmul
    before, own = torch.get_float32_matmul_precision(), matmul.fp32_precision
    try:
        torch.set_float32_matmul_precision(legacy)
        if switch:
            matmul.fp32_precision = switch
        wanted = matmul.fp32_precision
        with covariance.full_precision():
            # torch asks this before a product and raises where the two disagree
            assert matmul.allow_tf32 is False
        assert matmul.fp32_precision == wanted
        if switch is None or legacy != "highest":
            assert torch.get_float32_matmul_precision() == legacy
    finally:
        torch.set_float32_matmul_precision(before)
        matmul.fp32_precision = own


def test_fp64_sum_of_fp32_products_under_autocast():
    left, right = samples(60, 8, torch.float32), samples(60, 8, torch.float32, 1)
    block = torch.zeros(8, 8, dtype=torch.float64)
    with torch.autocast("cpu", torch.bfloat16):
        covariance._add_product(block, left, right)
    truth = left.double().t() @ right.double()
    assert (block - truth).norm() < 1e-6 * truth.norm()


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("name", ["blocks", "triton"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("T, d", [(63, 500), (2048, 1504), (4096, 2048)])
def test_update_on_cuda(monkeypatch, name, T, d, dtype):
    monkeypatch.setenv("LORA_NULL_COVARIANCE_BACKEND", name)
    monkeypatch.setenv("LORA_NULL_STRICT", "1")
    x = samples(T, d, dtype).cuda()
    mask = torch.rand(T, device="cuda") > 0.3
    for C_dtype in (torch.float32, torch.float64):
        start = torch.zeros(d, d, device="cuda", dtype=C_dtype)
        C = ops.covariance_update(start.clone(), x)
        assert_as_good_as_torch(x, start.float(), C)
        assert torch.equal(C, ops.covariance_update(start.clone(), x)), "not the same bits again"
        C = ops.covariance_update(start.clone(), x, mask=mask)
        assert_as_good_as_torch(x[mask], start.float(), C)

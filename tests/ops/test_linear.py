"""`lora_linear` and `lora_up_linear`: values and every gradient, and what they leave alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from linear_tools import NAMES, assert_as_good_as_torch, case, plain_torch, run
from torch import Tensor

from lora_null import ops
from lora_null.system import extension

# Matrices this small are slower on two threads, and much slower beside another process.
pytestmark = pytest.mark.usefixtures("one_thread")

BACKENDS = ("cublas", "python", "torch")  # python: cublas without the C++ extension


@pytest.fixture(params=BACKENDS)
def backend(request, monkeypatch):
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", request.param.replace("python", "cublas"))
    if request.param == "python":
        monkeypatch.setattr(extension, "ready", lambda: None)
    return request.param


@pytest.mark.parametrize("grad", [NAMES, ("x", "lora_B"), ("lora_A", "lora_B"), ("lora_B",)], ids=" ".join)
def test_gradcheck(backend, grad):
    tensors = case((2, 3), 7, 5, 3, torch.float64, grad=grad)

    def function(*values):
        return ops.lora_linear(**dict(zip(NAMES, values, strict=True)), scaling=0.7)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def test_gradcheck_up_linear(backend):
    tensors = case((2, 3), 7, 5, 3, torch.float64)

    def function(x, weight, lora_A, lora_B, bias):
        return ops.lora_up_linear(x, weight, x @ lora_A.t(), lora_B, scaling=0.7, bias=bias)

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("used", ["both", "y", "S"])
def test_gradcheck_of_y_and_projection(backend, used, mixed):
    tensors = case((5,), 7, 4, 3, torch.float64)
    mixing = mixing_of(2, 3) if mixed else None
    if mixed:
        tensors["lora_B"] = tensors["lora_B"].detach()[:, :2].requires_grad_()

    def function(*values):
        y, S = ops.lora_linear_and_projection(**dict(zip(NAMES, values, strict=True)), scaling=1.3, mixing=mixing)
        return {"both": (y, S), "y": y, "S": S}[used]

    assert torch.autograd.gradcheck(function, tuple(tensors.values()))


def mixing_of(r, p, dtype=torch.float64):
    return torch.randn(r, p, generator=torch.Generator().manual_seed(5), dtype=torch.float64).to(dtype)


@pytest.mark.parametrize("needed", [("x", "projected", "lora_B"), ("projected",), ("lora_B",)], ids=" ".join)
def test_gradcheck_of_a_mixed_projection(backend, needed):
    x, weight, _, _, bias = case((5,), 7, 4, 3, torch.float64, grad=()).values()
    projected, lora_B, mixing = mixing_of(5, 3), mixing_of(4, 2), mixing_of(2, 3)
    given = {"x": x, "projected": projected, "lora_B": lora_B}

    def function(*values):
        tensors = given | dict(zip(needed, values, strict=True))
        return ops.lora_up_linear(**tensors, weight=weight, bias=bias, scaling=0.7, mixing=mixing)

    assert torch.autograd.gradcheck(function, tuple(given[name].clone().requires_grad_() for name in needed))
    want = ops.lora_up_linear_reference(x, weight, projected, lora_B @ mixing, bias=bias)
    torch.testing.assert_close(ops.lora_up_linear(x, weight, projected, lora_B, bias=bias, mixing=mixing), want)


def test_a_mixed_projection_keeps_nothing_but_the_projection():
    x, weight, projected, lora_B, mixing = (mixing_of(*shape) for shape in ((9, 7), (4, 7), (9, 3), (4, 2), (2, 3)))
    x.requires_grad_(), projected.requires_grad_(), lora_B.requires_grad_()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        ops.lora_up_linear(x, weight, projected, lora_B, mixing=mixing)
    given = {t.data_ptr() for t in (weight, projected, lora_B, mixing)}
    assert kept and {t.data_ptr() for t in kept} <= given


def test_bad_mixings_are_refused():
    x, weight, projected, lora_B = (mixing_of(*shape) for shape in ((9, 7), (4, 7), (9, 3), (4, 2)))
    with pytest.raises(ValueError, match=r"mixing is \(2, 4\): expected \(r, 3\)"):
        ops.lora_up_linear(x, weight, projected, lora_B, mixing=mixing_of(2, 4))
    with pytest.raises(ValueError, match="mixing requires a gradient"):
        ops.lora_up_linear(x, weight, projected, lora_B, mixing=mixing_of(2, 3).requires_grad_())
    with pytest.raises(ValueError, match=r"lora_B is \(4, 2\): expected \(m, r\) = \(4, 3\)"):
        ops.lora_up_linear(x, weight, projected, lora_B, mixing=mixing_of(3, 3))


SHAPES = [
    ((63,), 500, 736, 3),
    ((2, 31), 64, 1504, 16),
    ((500,), 736, 64, 48),
    ((41,), 33, 17, 1),
    ((3, 1), 128, 63, 128),
]


@pytest.mark.parametrize("lead, d, m, r", SHAPES, ids=lambda v: str(v).replace(" ", ""))
@pytest.mark.parametrize(
    "dtype, factor_dtype",
    [
        (torch.float32, torch.float32),
        (torch.bfloat16, torch.bfloat16),
        (torch.bfloat16, torch.float32),
        (torch.float16, torch.float32),
    ],
    ids=lambda v: str(v).removeprefix("torch."),
)
def test_values_and_gradients_against_float64(backend, lead, d, m, r, dtype, factor_dtype):
    tensors = case(lead, d, m, r, dtype, factor_dtype=factor_dtype)
    dy = torch.randn(*lead, m, generator=torch.Generator().manual_seed(9), dtype=torch.float64).to(dtype)
    exact = {name: t.detach().double().requires_grad_() for name, t in tensors.items()}
    truth = run(plain_torch, exact, dy, scaling=0.3)
    own = run(plain_torch, tensors, dy, scaling=0.3)
    got = run(ops.lora_linear, tensors, dy, scaling=0.3)
    # The slack covers a yardstick that happens to round luckily.
    assert_as_good_as_torch(got, own, truth, slack=torch.finfo(dtype).eps / 8)


def test_non_contiguous_operands(backend):
    tensors = case((6, 5), 24, 18, 4, torch.float32)
    strided = dict(tensors)
    strided["x"] = tensors["x"].detach().transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    for name in ("weight", "lora_A", "lora_B"):
        strided[name] = tensors[name].detach().t().contiguous().t().requires_grad_()
    dy = torch.randn(5, 6, 18, generator=torch.Generator().manual_seed(1)).transpose(0, 1)
    for name, want in run(ops.lora_linear, tensors, dy.contiguous()).items():
        got = run(ops.lora_linear, strided, dy)[name]
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


@pytest.mark.parametrize("lead", [(0,), (2, 0)], ids=str)
def test_no_tokens(backend, lead):
    tensors = case(lead, 8, 6, 2, torch.float32)
    found = run(ops.lora_linear, tensors, torch.zeros(*lead, 6))
    assert found["y"].shape == (*lead, 6)
    assert all(found[name].abs().sum() == 0 for name in NAMES)


def test_results_do_not_read_uninitialised_memory():
    """Deterministic mode fills fresh memory with NaN."""
    tensors = case((9,), 10, 12, 3, torch.float32)
    want = run(ops.lora_linear, tensors, torch.ones(9, 12), scaling=0.5)
    torch.use_deterministic_algorithms(True)
    try:
        got = run(ops.lora_linear, tensors, torch.ones(9, 12), scaling=0.5)
        again = run(ops.lora_linear, tensors, torch.ones(9, 12), scaling=0.5)
    finally:
        torch.use_deterministic_algorithms(False)
    for name in want:
        assert torch.equal(got[name], want[name]), name
        assert torch.equal(got[name], again[name]), name


@settings(max_examples=25, deadline=None, derandomize=True)
@given(
    T=st.integers(0, 9), d=st.integers(1, 12), m=st.integers(1, 12), r=st.integers(1, 12),
    scaling=st.sampled_from([0.0, 1.0, -2.5]), grad=st.sets(st.sampled_from(NAMES), min_size=1),
)  # fmt: skip
def test_any_shape_and_any_set_of_gradients(T, d, m, r, scaling, grad):
    tensors = case((T,), d, m, r, torch.float64, grad=tuple(grad))
    dy = torch.randn(T, m, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    want = run(ops.lora_linear_reference, tensors, dy, scaling=scaling)
    got = run(ops.lora_linear, tensors, dy, scaling=scaling)
    assert set(got) == {"y", *grad}
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-12, atol=1e-12)


def saved_by(function) -> list[Tensor]:
    saved: list[Tensor] = []

    def pack(tensor):
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        function()
    return saved


@pytest.mark.parametrize(
    "grad, kept",
    [
        (("x", "lora_B"), {"weight", "lora_A", "lora_B", "S"}),
        (("lora_B",), {"S"}),
        (("lora_A", "lora_B"), {"x", "lora_B", "S"}),
        (("x", "lora_A", "lora_B"), {"x", "weight", "lora_A", "lora_B", "S"}),
        (("x", "bias"), {"weight", "lora_A", "lora_B"}),
        (("weight",), {"x"}),
    ],
    ids=lambda v: "+".join(sorted(v)),
)
def test_only_what_the_gradients_need_is_saved(grad, kept):
    tensors = case((11,), 13, 17, 5, torch.float32, grad=grad)
    saved = saved_by(lambda: ops.lora_linear(**tensors))
    names = {tuple(t.shape): name for name, t in tensors.items()} | {(11, 5): "S"}
    assert sorted(names[tuple(t.shape)] for t in saved) == sorted(kept)
    for tensor in saved:
        if tuple(tensor.shape) != (11, 5):
            assert any(tensor.data_ptr() == t.data_ptr() for t in tensors.values()), "a copy was saved"


def test_results_may_be_changed_in_place():
    tensors = case((2, 3), 8, 6, 2, torch.float32)
    for options in ({}, {"bias": None}):
        y = ops.lora_linear(**(tensors | options))
        y[:1].mul_(2)
        y.add_(1).sum().backward()
    with torch.no_grad():
        y = ops.lora_linear(**tensors)
    y.add_(tensors["bias"]).sum().backward()


def test_x_used_twice_and_a_repeated_backward():
    tensors = case((4,), 8, 8, 2, torch.float64)

    def loss(function):
        first = function(**tensors)
        return (function(**(tensors | {"x": first + tensors["x"]})) * tensors["x"]).sum()

    want = torch.autograd.grad(loss(ops.lora_linear_reference), list(tensors.values()))
    value = loss(ops.lora_linear)
    for _ in range(2):
        got = torch.autograd.grad(value, list(tensors.values()), retain_graph=True)
        for name, g, w in zip(NAMES, got, want, strict=True):
            torch.testing.assert_close(g, w, msg=lambda text, name=name: f"{name}: {text}")
    torch.autograd.grad(value, list(tensors.values()))
    with pytest.raises(RuntimeError, match="second time"):
        torch.autograd.grad(value, list(tensors.values()))


def test_second_derivative_raises_clearly():
    tensors = case((4,), 8, 8, 2, torch.float64)
    (gradient,) = torch.autograd.grad(ops.lora_linear(**tensors).square().sum(), tensors["x"], create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiable once.*LORA_NULL_LINEAR_BACKEND=torch"):
        gradient.sum().backward()


def test_changing_a_saved_tensor_is_noticed():
    tensors = case((4,), 8, 8, 2, torch.float32)
    y = ops.lora_linear(**tensors)
    with torch.no_grad():
        tensors["lora_B"].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(
    "change, error, text",
    [
        ({"x": torch.zeros(3, 9)}, ValueError, r"weight \(4, 8\).*same d.*Conv1D"),
        ({"x": torch.zeros(3, 8, dtype=torch.bfloat16)}, TypeError, "autocast"),
        ({"lora_A": torch.zeros(2, 7)}, ValueError, r"expected \(r, 8\)"),
        ({"lora_B": torch.zeros(2, 4)}, ValueError, r"expected \(m, r\) = \(4, 2\)"),
        ({"bias": torch.zeros(5)}, ValueError, r"expected \(m,\) = \(4,\)"),
        ({"bias": [0.0] * 4}, TypeError, r"an operand is a list"),
        ({"x": torch.zeros(())}, ValueError, r"x is \(\)"),
        ({"weight": torch.zeros(8)}, ValueError, r"weight is \(8,\); expected a matrix"),
        ({"weight": torch.zeros(4, 8, dtype=torch.int8)}, TypeError, "autocast"),
        ({"weight": torch.zeros(4, 8, device="meta")}, ValueError, "weight on meta, .* expected one device"),
        ({"lora_A": torch.zeros(8)}, ValueError, r"lora_A, or the projection, is \(8,\); expected \(r, d\)"),
        ({"lora_A": torch.zeros(2, 2, 8)}, ValueError, r"expected \(r, d\)"),
        ({"lora_B": torch.zeros(4)}, ValueError, r"lora_B is \(4,\)"),
        ({"dropout": 1.0}, ValueError, "probability"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else "",
)
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_errors_say_what_to_do(monkeypatch, backend, change, error, text):
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", backend)
    tensors = {name: t.detach() for name, t in case((3,), 8, 4, 2, torch.float32).items()}
    with pytest.raises(error, match=text):
        ops.lora_linear(**(tensors | change))


def test_projection_of_another_x_is_refused():
    tensors = {name: t.detach() for name, t in case((3,), 8, 4, 2, torch.float32).items()}
    with pytest.raises(ValueError, match="another x"):
        ops.lora_up_linear(tensors["x"], tensors["weight"], torch.zeros(4, 2), tensors["lora_B"])


def test_dropout_is_refused_in_a_captured_graph(monkeypatch):
    """Replays would drop the same entries every time, and nobody would notice."""
    tensors = {name: t.detach() for name, t in case((3,), 8, 4, 2, torch.float32).items()}
    ops.lora_linear(**tensors, dropout=0.5)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    ops.lora_linear(**tensors)
    with pytest.raises(RuntimeError, match="every replay"):
        ops.lora_linear(**tensors, dropout=0.5)

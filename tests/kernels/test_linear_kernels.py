"""The differentiable operations through the Triton kernels, from end to end.

Where they run is said in ``kernel_tools.py``.
"""

import json
import time

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, needs_device
from lora_null.kernels import config, lora

from lora_null import ops
from lora_null.ops import dispatch, tune

pytestmark = needs_device
NAMES = ("x", "lora_A", "lora_B")


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """Ask for the kernels, without fallback, and record which launchers were used."""
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", "triton")
    monkeypatch.setenv("LORA_NULL_STRICT", "1")
    monkeypatch.setattr(dispatch, "_uniform", dispatch._uniform.__wrapped__)
    used = []
    for name in dispatch.PRODUCTS:
        launcher = getattr(lora, name)
        monkeypatch.setattr(lora, name, lambda *a, _f=launcher, _n=name, **k: (used.append(_n), _f(*a, **k))[1])
    return used


def case(dtype, lead=(3, 11), d=40, m=23, r=5):
    g = torch.Generator().manual_seed(0)
    make = [((*lead, d), 1.0, dtype), ((m, d), d**-0.5, dtype), ((r, d), d**-0.5, torch.float32)]
    make += [((m, r), r**-0.5, torch.float32), ((m,), 1.0, dtype), ((*lead, m), 1.0, dtype)]
    x, W, A, B, bias, dy = ((torch.randn(s, generator=g) * scale).to(DEVICE, kind) for s, scale, kind in make)
    return {"x": x.requires_grad_(), "weight": W, "lora_A": A.requires_grad_(), "lora_B": B.requires_grad_(),
            "bias": bias}, dy  # fmt: skip


def gradients(function, tensors, dy, dtype=None, **options):
    leaves = {k: t.detach().to(dtype or t.dtype).requires_grad_(t.requires_grad) for k, t in tensors.items()}
    y = function(**leaves, **options)
    wanted = [leaves[name] for name in NAMES if leaves[name].requires_grad]
    found = torch.autograd.grad(y, wanted, dy.to(y.dtype))
    names = [name for name in NAMES if leaves[name].requires_grad]
    return {"y": y.detach().double()} | {n: g.double() for n, g in zip(names, found, strict=True)}


@pytest.mark.parametrize("dropout", [0.0, 0.25])
@pytest.mark.parametrize("frozen_a", [True, False])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_values_and_gradients(calls, dtype, frozen_a, dropout):
    tensors, dy = case(dtype)
    tensors["lora_A"].requires_grad_(not frozen_a)
    options = {"scaling": 0.7, "dropout": dropout, "seed": 12345}
    truth = gradients(ops.lora_linear_reference, tensors, dy, torch.float64, **options)
    own = gradients(ops.lora_linear_reference, tensors, dy, **options)
    assert not calls
    got = gradients(ops.lora_linear, tensors, dy, **options)
    assert set(calls) == set(dispatch.PRODUCTS) - ({"backward_dA"} if frozen_a else set())
    for name, want in truth.items():
        error, torch_error = ((found[name] - want).norm() / want.norm() for found in (got, own))
        assert error <= 2 * torch_error + torch.finfo(dtype).eps / 8, f"{name}: {error:.3g}, torch {torch_error:.3g}"


def test_shared_projection(calls):
    tensors, dy = case(torch.float32)
    x, W, A, B = (tensors[name] for name in ("x", "weight", "lora_A", "lora_B"))

    mixing = torch.linalg.qr(torch.randn(len(A), len(A)))[0]

    def loss(first, up):
        y, S = first(x, W, A, B, scaling=0.7)
        z = up(x, W.flip(0), S, B.flip(1), scaling=0.3) + up(x, W, S, B, scaling=0.2, mixing=mixing)
        return ((y + z) * dy).sum()

    want = torch.autograd.grad(loss(ops.reference.lora_linear_and_projection, ops.lora_up_linear_reference), (x, A, B))
    got = torch.autograd.grad(loss(ops.lora_linear_and_projection, ops.lora_up_linear), (x, A, B))
    assert calls.count("project") == 1
    for name, g, w in zip(NAMES, got, want, strict=True):
        torch.testing.assert_close(g, w, rtol=1e-4, atol=1e-4, msg=lambda text, name=name: f"{name}: {text}")


def test_opcheck():
    tensors, _ = case(torch.float32, lead=(9,))
    x, W, A, B, bias = tensors.values()
    torch.library.opcheck(torch.ops.lora_null.lora_linear.default, (x, W, A, B, bias, None, 0.7, 0.0, None))
    torch.library.opcheck(torch.ops.lora_null.lora_up_linear.default, (x, W, x[:, :5].detach(), B, bias, None, 0.7))


def test_compiled(calls):
    tensors, dy = case(torch.float32)
    want = gradients(ops.lora_linear_reference, tensors, dy, scaling=0.7)
    got = gradients(torch.compile(ops.lora_linear, fullgraph=True, backend="aot_eager"), tensors, dy, scaling=0.7)
    assert "forward" in calls and "backward_dx" in calls
    for name in want:
        torch.testing.assert_close(got[name], want[name], rtol=1e-4, atol=1e-4)


def test_strict_mode_refuses_what_the_kernels_cannot_do():
    tensors, _ = case(torch.float32)
    with pytest.raises(RuntimeError, match=r"float64.*LORA_NULL_STRICT"):
        ops.lora_linear(**{name: t.double() for name, t in tensors.items()})


def test_measured_times_decide(monkeypatch, tmp_path):
    """Tuning on this device, then the choice between the ways from what it wrote."""
    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path))
    monkeypatch.setattr(dispatch, "LAUNCH_BOUND", 0)  # below it nothing measured is asked
    ticks = iter(range(1, 100))

    def pretend(call):
        start = time.perf_counter()
        call()
        assert time.perf_counter() > start
        return next(ticks) * 1e-3

    entries = list(tune.measure_linear([(8, 16, 16, 4), (64, 16, 16, 4)], torch.float32, DEVICE, pretend))
    assert len(entries) == 10 and entries[3]["product"] == "backward_dx"
    entries[3]["triton_us"], entries[3]["cublas_us"] = 5.0, 4.0
    path = tune.save_linear(config.architecture(DEVICE), entries)
    tune.save_linear(config.architecture(DEVICE), [{**entries[0], "dtype": "float16"}])
    assert len(json.load(open(path))["dispatch"]["linear"]) == 11
    dispatch._choose.cache_clear()
    chosen = dispatch._choose(config.architecture(DEVICE), 9, 16, 16, 4, torch.float32, False)
    assert chosen.backends["backward_dx"] == "cublas" and chosen.backends["forward"] == "triton"
    assert "triton 5 us, cublas 4 us" in chosen.reasons["backward_dx"]
    chosen = dispatch._choose(config.architecture(DEVICE), 60, 16, 16, 4, torch.float32, False)
    assert chosen.backends["backward_dx"] == "triton"
    dispatch._choose.cache_clear()

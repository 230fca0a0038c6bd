"""The choice between implementations, its overrides, and what a user is told about it."""

import logging
from contextlib import suppress

import pytest
import torch
import torch.distributed as dist
from lora_null.kernels import config
from torch import nn

from lora_null import ops
from lora_null.ops import dispatch, roofline
from lora_null.system import extension, log


def operands(dtype=torch.float32, T=5, d=8, m=6, r=2):
    g = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=g).to(dtype) for shape in ((T, d), (m, d), (r, d), (m, r))]


@pytest.fixture(autouse=True)
def fresh(monkeypatch):
    """No override from outside, no memory of earlier warnings or choices."""
    monkeypatch.delenv("LORA_NULL_LINEAR_BACKEND", raising=False)
    monkeypatch.delenv("LORA_NULL_STRICT", raising=False)
    monkeypatch.setattr(log, "_given", set())
    dispatch._choose.cache_clear()
    yield
    dispatch._choose.cache_clear()


def test_cpu_goes_to_the_vendor():
    *products, caller = ops.explain(*operands()).splitlines()
    assert [line.split()[:2] for line in products] == [[name, "cublas"] for name in dispatch.PRODUCTS]
    assert all("CPU" in line for line in products) and caller.startswith("called from")


@pytest.mark.skipif(extension.load() is None, reason="no C++ extension")
@pytest.mark.parametrize(
    "change, reason",
    [
        ({}, "C++     no interpreter"),
        ({"dropout": 0.5}, "Python  the dropout mask"),
        ({"bias": torch.zeros(7)}, "Python  the shapes do not fit"),
        ({"weight": torch.zeros(6, 8, requires_grad=True)}, "Python  the weight requires a gradient"),
        ({"lora_B": torch.zeros(6, 2, dtype=torch.float8_e4m3fn)}, "Python  a tensor is not a dense one of bf16"),
        ({"x": torch.zeros(5, 8, dtype=torch.float64)}, "Python  x, the weight and the bias differ in type"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_explain_says_whether_cpp_calls(monkeypatch, change, reason):
    """And the call goes where it says."""
    x, weight, lora_A, lora_B = operands()
    arguments = {"x": x, "weight": weight, "lora_A": lora_A, "lora_B": lora_B} | change
    assert reason in ops.explain(**arguments)
    by_python = []
    monkeypatch.setattr(dispatch, "choose", lambda *a, **k: by_python.append(1) or "torch")
    with suppress(RuntimeError, ValueError, TypeError):
        ops.lora_linear(**arguments)
    assert bool(by_python) == ("Python" in reason)


def test_explain_counts_the_passes_over_memory(monkeypatch):
    assert "memory" not in ops.explain(*operands())
    monkeypatch.setattr(dispatch.config, "architecture", lambda device: "sm_90 a card")
    assert "6 passes over (T, d)" in ops.explain(*operands()).splitlines()[-1]
    way = dict.fromkeys(dispatch.PRODUCTS, "cublas")
    assert roofline.passes(way | {"backward_dy": "triton"}) == 5
    assert roofline.passes(dict.fromkeys(way, "triton")) == 2


def test_explain_predicts_for_a_known_card(monkeypatch):
    """In the numbers of the page of predictions."""
    x, W = torch.empty(2, 4096, 4096, dtype=torch.bfloat16, device="meta"), torch.empty(4096, 4096, device="meta")
    A, B = torch.empty(16, 4096, device="meta"), torch.empty(4096, 16, device="meta")
    monkeypatch.setattr(dispatch.config, "architecture", lambda device: "sm_90 NVIDIA H200")
    last = ops.explain(x, W.bfloat16(), A, B).splitlines()[-1]
    assert last.startswith("predicted    1.16 of the speed of separate operations, at 700 TFLOP/s and 4.80 TB/s")
    assert "predicted" not in ops.explain(x.float(), W, A, B)
    assert "predicted" not in ops.explain(x[:, :0], W.bfloat16(), A, B)


def test_explain_without_cpp(monkeypatch):
    monkeypatch.setattr(extension, "ready", lambda: None)
    assert "Python  there is no C++ extension" in ops.explain(*operands())
    monkeypatch.setattr(extension, "ready", extension.load)
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", "triton")
    assert "Python  LORA_NULL_LINEAR_BACKEND asks" in ops.explain(*operands())


def test_override_to_plain_torch(monkeypatch):
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", "torch")
    assert ops.explain(*operands()) == "torch: LORA_NULL_LINEAR_BACKEND=torch"
    x, W, A, B = operands()
    y = ops.lora_linear(x, W.requires_grad_(), A, B)
    assert "lora_null" not in y.grad_fn.name().lower()


def test_override_with_a_wrong_value(monkeypatch):
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", "cutlass")
    with pytest.raises(ValueError, match=r"'cutlass'; expected one of auto, triton"):
        ops.lora_linear(*operands())


def test_unavailable_kernels_fall_back_once_or_raise(monkeypatch, caplog):
    monkeypatch.setenv("LORA_NULL_LINEAR_BACKEND", "triton")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    x, W, A, B = operands()
    with caplog.at_level(logging.WARNING, "lora_null"):
        for _ in range(3):
            torch.testing.assert_close(ops.lora_linear(x, W, A, B), ops.lora_linear_reference(x, W, A, B))
    assert len(caplog.records) == 1 and "falls back" in caplog.text
    monkeypatch.setenv("LORA_NULL_STRICT", "1")
    with pytest.raises(RuntimeError, match="LORA_NULL_STRICT=1 turns this fallback into an error"):
        ops.lora_linear(x, W, A, B)


class Quantised(nn.Parameter):
    pass


@pytest.mark.parametrize(
    "weight, reason",
    [
        (lambda W: Quantised(W, requires_grad=False), "a Quantised is sharded, quantised"),
        (lambda W: W.to(torch.int8), "torch.int8 tensor is no plain weight"),
        (lambda W: W.flatten(), "not a matrix is a shard"),
        (lambda W: W.to("meta"), "a weight or factor on meta"),
    ],
    ids=["subclass", "int8", "flat", "elsewhere"],
)
def test_reasons_against_the_custom_operations(monkeypatch, weight, reason):
    x, W, A, B = operands()
    assert reason in ops.explain(x, weight(W), A, B)
    monkeypatch.setenv("LORA_NULL_STRICT", "1")
    with pytest.raises(RuntimeError, match=reason):
        ops.lora_linear(x, weight(W), A, B)


def test_dtensors_take_plain_torch(tmp_path, caplog):
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        x, W, A, B = operands()
        want = ops.lora_linear_reference(x, W, A, B)
        placed = [
            distribute_tensor(x, mesh, [Replicate()]),
            *(distribute_tensor(t, mesh, [Shard(0)]) for t in (W, A, B)),
        ]
        with caplog.at_level(logging.WARNING, "lora_null"):
            y = ops.lora_linear(*placed)
        assert isinstance(y, DTensor)
        torch.testing.assert_close(y.full_tensor(), want)
        assert "a DTensor is sharded" in caplog.text
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("inside", ["base_layer", "lora_A", "lora_B"])
def test_hooks_inside_a_peft_layer_are_still_called(caplog, inside):
    import peft

    from lora_null.peft import use_fused_kernels

    model = peft.get_peft_model(nn.Sequential(nn.Linear(8, 6)), peft.LoraConfig(r=2, target_modules=["0"]))
    assert use_fused_kernels(model).patched == 1
    layer = model.base_model.model[0]
    x, seen = operands()[0], []
    assert "lora_null" in layer(x).grad_fn.name().lower()
    module = getattr(layer, inside)
    module = module if inside == "base_layer" else module["default"]
    handle = module.register_forward_hook(lambda *_: seen.append(1))
    with caplog.at_level(logging.WARNING, "lora_null"):
        layer(x)
        layer(x)
    assert seen == [1, 1] and caplog.text.count("hooks on a layer inside it") == 1
    handle.remove()
    assert "lora_null" in layer(x).grad_fn.name().lower()


def test_defaults_without_measurements(monkeypatch):
    chosen = dispatch._choose("sm_00", 8192, 4096, 4096, 16, torch.bfloat16, False)
    assert set(chosen.backends.values()) == {"cublas"}
    assert "sm_00 is unmeasured" in str(chosen)
    masked = dispatch._choose("sm_00", 8192, 4096, 4096, 16, torch.bfloat16, True)
    assert masked.backends["project"] == masked.backends["backward_dx"] == "triton"
    assert masked.backends["forward"] == "cublas"


def entry(product, T, d, triton, cublas, dtype="bfloat16"):
    return {"product": product, "dtype": dtype, "T": T, "d": d, "m": d, "r": 16,
            "triton_us": triton, "cublas_us": cublas}  # fmt: skip


def test_the_nearest_measured_shape_decides(monkeypatch):
    times = [
        entry("forward", 8192, 4096, 10, 20),
        entry("forward", 512, 4096, 20, 10),
        entry("forward", 8192, 1024, 30, 10),
        entry("forward", 8192, 4096, 99, 1, dtype="float16"),
        entry("project", 8192, 4096, 2, 1),
    ]
    monkeypatch.setattr(dispatch, "measured_times", lambda arch: times if arch == "sm_90" else [])

    def choose(T, d, dtype=torch.bfloat16):
        dispatch._choose.cache_clear()
        return dispatch._choose("sm_90", T, d, d, 16, dtype, False).backends

    assert choose(8192, 4096)["forward"] == "triton"
    assert choose(16384, 8192)["forward"] == "triton"
    assert choose(1024, 4096)["forward"] == "cublas"
    assert choose(8192, 1500)["forward"] == "cublas"
    assert choose(8192, 4096, torch.float16)["forward"] == "cublas"
    assert choose(8192, 4096)["project"] == "cublas"
    assert choose(0, 4096)["forward"] == "cublas"


def test_measurements_ship_in_the_documented_form():
    for path in config.FOLDER.glob("*.json"):
        for measured in dispatch.measured_times(path.stem):
            assert measured["product"] in dispatch.PRODUCTS
            assert min(measured["triton_us"], measured["cublas_us"]) > 0
            assert hasattr(torch, measured["dtype"]) and {"T", "d", "m", "r"} <= set(measured)


def test_explain_tells_what_a_compiled_model_does():
    assert "torch.compile traces plain operations" in ops.explain(*operands())
    assert "torch.compile" not in ops.explain(*operands(), dropout=0.5)

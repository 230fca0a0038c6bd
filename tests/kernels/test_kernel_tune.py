"""What the tuning commands time, what they pass over, and what they write."""

import json

import pytest
import torch
from lora_null.kernels import config, lora, runtime, syrk, tune

from lora_null.ops import dispatch, vendor
from lora_null.ops import tune as ops_tune

pytestmark = pytest.mark.usefixtures("own_tables")


def launched_with(monkeypatch):
    """Replace launches by nothing; return the options of the last one."""
    last = {}
    monkeypatch.setattr(runtime, "launch", lambda kernel, grid, device, *args, **options: last.update(options))
    return last


UNTIMED = {"device": "meta", "verified": lambda work, dtype: lambda: None, "prepare": lambda *arguments: None}


def test_tuning_keeps_the_fastest_and_passes_over_failures(monkeypatch):
    last = launched_with(monkeypatch)
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 132)

    def fake(call):
        last.clear()
        call()
        if last["num_stages"] == 4:
            raise RuntimeError("out of shared memory")
        return 2.0 - (last["BLOCK_T"] == 128 and last["BLOCK_K"] == 128)

    *parts, overlay = tune.measure(["project"], torch.bfloat16, "sm_80", fake, **UNTIMED)
    entries = overlay["kernels"]["project"]["16"]
    lengths = [len(part["kernels"]["project"]["16"]) for part in (*parts, overlay)]
    assert lengths == list(range(len(entries) - 5, len(entries) + 1)), "what is known is not yielded after every size"
    winners = entries[: 2 * len(tune.SIZES["project"][1])]
    assert all((e["BLOCK_T"], e["BLOCK_K"], e["num_stages"]) == (128, 128, 3) for e in winners)
    assert [e["when"].get("r_max") for e in winners] == [32, 32, 91, 91, None, None]
    assert [("dropout_max" in e["when"]) + 2 * ("dropout_min" in e["when"]) for e in winners] == [1, 2] * 3
    assert entries[len(winners) :] == config.shipped("sm_80")["kernels"]["project"]["16"]


def test_tuning_passes_over_what_computes_something_else(monkeypatch):
    x = torch.randn(300, 8)
    entries = [{"factor": 1.05}, {"factor": 1.0}, {"factor": float("nan")}]

    def workload(*arguments):
        call = lambda: (config._forced["outer"]["factor"] * x,)  # noqa: E731
        return tune.Workload(call, call, lambda wide: (x.to(wide),))

    monkeypatch.setattr(tune, "workload", workload)
    monkeypatch.setattr(tune, "candidates", lambda *arguments: entries)
    options = {"device": "cpu", "prepare": lambda *arguments: None}
    timed = []
    *_, overlay = tune.measure(["outer"], torch.bfloat16, "sm_80", lambda call: timed.append(call()) or 1.0, **options)
    assert [entry.get("factor") for entry in overlay["kernels"]["outer"]["16"][:6]] == [1.0] * 6
    assert len(timed) == 6, "something wrong was timed"
    assert not list(tune.measure(["outer"], torch.bfloat16, "sm_80", None, deadline=0.0, **options))
    # a kernel that nothing runs of costs the ones after it nothing
    monkeypatch.setattr(tune, "candidates", lambda kernel, *_: entries if kernel == "outer" else entries[:1])
    monkeypatch.setattr(config, "_forced", Either())
    found = list(tune.measure(["dy", "outer"], torch.bfloat16, "sm_80", lambda call: 1.0, **options))
    assert {kernel for part in found for kernel in part["kernels"]} == {"outer"}


class Either(dict):
    """What is forced, under any kernel's name."""

    def __getitem__(self, kernel):
        return next(iter(self.values()))


@pytest.mark.parametrize("kernel, size", [("syrk", 48), ("linear", 32), ("project", 16), ("outer", 16), ("dy", 16)])
def test_what_tuning_calls_true(monkeypatch, kernel, size):
    """The plain form of every workload is what the kernel's stand-in computes."""
    monkeypatch.setattr(tune, "TOKENS", 40)
    monkeypatch.setattr(tune, "WIDTH", 64)

    def masked(t, dropout=0.0, seed=0):
        return t * lora.keep_mask(*t.shape, dropout=dropout, seed=seed, device="cpu") / (1 - dropout)

    stand_in = {
        "project": lambda x, A, **drop: masked(x, **drop) @ A.t(),
        "forward": lambda x, w, s, b, scaling: x @ w.t() + s @ b.t(),
        "backward_dx": lambda dy, w, ds, a, **drop: dy @ w + masked(ds @ a, **drop),
        "backward_dy": lambda dy, s, b, scaling: (dy @ b, dy.t() @ s),
        "backward_dA": lambda ds, x, **drop: ds.t() @ masked(x, **drop),
    }
    for name, function in stand_in.items():
        monkeypatch.setattr(lora, name, function)
    monkeypatch.setattr(syrk, "covariance_update", lambda C, x: C.add_(x.t() @ x))
    for dropout in tune.DROPOUT.get(kernel, (0.0,)):
        tune.verifier(tune.workload(kernel, size, torch.float32, "cpu", dropout), torch.float32)()


def test_every_workload_runs_its_own_kernel(monkeypatch):
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 132)
    for kernel, (_, sizes) in tune.SIZES.items():
        for arch in ("sm_80", "sm_90"):
            chosen = list(tune.candidates(kernel, torch.bfloat16, arch, sizes[0]))
            names = []
            monkeypatch.setattr(runtime, "launch", lambda k, *a, names=names, **o: names.append(k.fn.__name__))
            with config.forced(kernel, chosen[-1]):
                tune.workload(kernel, sizes[0], torch.bfloat16, "meta").call()
            assert any(name.startswith(kernel) for name in names), f"{kernel} launched {names}"


def test_covariance_choice_follows_the_times(monkeypatch):
    launched_with(monkeypatch)
    monkeypatch.setattr(ops_tune, "WIDTHS", (64, 256))
    monkeypatch.setattr(ops_tune, "TOKENS", (32, 128))
    calls = []
    monkeypatch.setattr(syrk, "covariance_update", lambda C, x: calls.append("triton") or C.addmm_(x.t(), x))

    def fake(call):
        calls.clear()
        call()
        return 1.0 if calls else 2.0

    overlay = ops_tune.measure_covariance(torch.float32, "cpu", fake)
    entries = overlay["dispatch"]["covariance"]["32"]
    assert [entry["backend"] for entry in entries] == ["triton"] * 4
    monkeypatch.setattr(syrk, "covariance_update", lambda C, x: calls.append("triton") or C.addmm_(x.t(), x.abs()))
    wrong = ops_tune.measure_covariance(torch.float32, "cpu", fake)["dispatch"]["covariance"]["32"]
    assert [entry["backend"] for entry in wrong] == ["blocks"] * 4, "the faster one is wrong"
    config.save_tuned("sm_90", overlay)
    assert config.backend("covariance", torch.float32, "sm_90", d=100000, T=100000) == "triton"


@pytest.mark.parametrize("broken", ["fails", "wrong"])
def test_a_broken_kernel_is_not_chosen_for_the_linear(monkeypatch, broken):
    if broken == "wrong":
        for product in dispatch.PRODUCTS:
            plain = getattr(vendor, product)
            monkeypatch.setattr(lora, product, lambda *a, plain=plain, **k: doubled(plain(*a, **k)))
    else:
        for product in dispatch.PRODUCTS:
            monkeypatch.delattr(lora, product)
    entries = list(ops_tune.measure_linear([(16, 24, 8, 4)], torch.float32, "cpu", lambda call: 1.0))
    assert [entry["product"] for entry in entries] == list(dispatch.PRODUCTS)
    assert {(entry["triton_us"], entry["cublas_us"]) for entry in entries} == {(1e3 * ops_tune.ENDLESS, 1000.0)}


def doubled(result):
    return tuple(map(doubled, result)) if isinstance(result, tuple) else 2 * result


@pytest.mark.parametrize("only", [("kernels",), ("covariance",), ("linear",), ("kernels", "covariance", "linear")])
def test_one_command_tunes_what_it_is_asked_for(monkeypatch, only):
    pytest.importorskip("triton")
    overlays = {
        "kernels": {"kernels": {"outer": {"16": [{"BLOCK_T": 1}]}}},
        "covariance": {"dispatch": {"covariance": {"16": [{"backend": "triton"}]}}},
    }
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a card")
    monkeypatch.setattr(config, "architecture", lambda device: "sm_90")
    monkeypatch.setattr(tune, "measure", lambda *a, **k: iter([overlays["kernels"]]))
    monkeypatch.setattr(ops_tune, "measure_covariance", lambda *a: overlays["covariance"])

    def measure_linear(shapes, *arguments):
        sizes = dict(zip("Tdmr", shapes[0], strict=True))
        return [{"product": "forward", "dtype": "bfloat16", **sizes}]

    monkeypatch.setattr(ops_tune, "measure_linear", measure_linear)
    assert ops_tune.tune(only, tokens=[8], ranks=[4]) == config.tuned_path("sm_90")
    written = json.loads(config.tuned_path("sm_90").read_text())
    assert set(written["kernels"]) == ({"outer"} if "kernels" in only else set())
    assert ("source" in written) == ("kernels" in only)
    assert set(written["dispatch"]) == {part for part in ("covariance", "linear") if part in only}
    if "linear" in only:
        assert [entry["m"] for entry in written["dispatch"]["linear"]] == [m for m, _ in ops_tune.LAYERS]


def test_without_a_device_or_by_another_name_nothing_is_tuned(monkeypatch):
    with pytest.raises(ValueError, match="only is layers; expected some of kernels, covariance, linear"):
        ops_tune.tune(["layers"])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ValueError, match="no CUDA device"):
        ops_tune.tune()

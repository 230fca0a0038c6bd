"""Every question of the suite on tiny shapes: our providers and the peers agree with the truth and are recorded."""

import math

import pytest
import torch
from benchmark_suite import suite

harness = suite("harness")
Case = harness.Case

TINY_MODEL = {"model": "tiny", "r": 4, "dtype": "fp32"}
CASES = {
    "linear": [
        {"T": 63, "m": 48, "d": 40, "r": 3, "dtype": "fp32", "adapter": "fp32", "train_a": False},
        {"T": 64, "m": 64, "d": 32, "r": 16, "dtype": "bf16", "adapter": "bf16", "train_a": True},
        {"T": 64, "m": 64, "d": 32, "r": 16, "dtype": "bf16", "adapter": "fp32", "train_a": False},
    ],
    "training": [TINY_MODEL | {"layers": 2, "vocab": 300, "batch": 2, "sequence": 16, "train_a": False}],
    "initialization": [TINY_MODEL | {"samples": 8, "sequence": 48}],
    "covariance": [{"d": 65, "T": 130, "dtype": "fp32"}, {"d": 200, "T": 96, "dtype": "bf16"}],
    "null-space": [{"d": 96, "r": 8, "spectrum": "o"}, {"d": 96, "r": 8, "spectrum": "gate_up"}],
    "linear-group": [{"model": "tiny", "group": "qkv", "T": 40, "r": 4, "dtype": "fp32"}],
    "layer": [TINY_MODEL | {"T": 24, "train_a": True}],
    "factorize": [{"m": 80, "d": 96, "r": 8, "stage": stage} for stage in ("solve", "factors")],
    "growth": [{"d": d, "r": 8, "spectrum": "o"} for d in (32, 48, 64)],
}


@pytest.fixture(autouse=True)
def tiny(monkeypatch):
    shapes = suite("shapes")
    shape = shapes.ModelShape("tiny", 64, 96, 2, 4, 2, 16, 300, True, "made for the tests")
    monkeypatch.setitem(shapes.shapes(), "tiny", shape)
    # On a busy machine two threads wait for each other longer than these shapes take.
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def run(question, cases, output, **options):
    """Ask a question on other cases than its own."""

    class Asked(type(question)):
        def cases(self, device, full):
            return [Case(params) for params in cases]

    it = harness.Run(harness.Options(output=output, seconds_scale=0.001, **options))
    it.ceilings = suite("limits").Ceilings(1e10, dict.fromkeys(("fp64", "fp32", "bf16"), 1e11))
    it.ask(Asked())
    return it


def questions():
    return suite("questions").registry()


def test_every_question_has_a_case_here():
    assert set(CASES) == set(questions())


@pytest.mark.parametrize("name", list(CASES))
def test_every_provider_agrees_with_the_truth(name, tmp_path):
    question = questions()[name]
    # The compiler takes its time; what it compiles is the eager provider beside it.
    chosen = tuple(p.name for p in question.providers() if not p.name.endswith("compiled"))
    it = run(question, CASES[name], tmp_path / "results.jsonl", providers=chosen)
    wrong = {r["provider"]: r["reason"] for r in it.records if r["status"] != "ok"}
    assert not wrong
    for case in CASES[name]:
        asked = {p.name for p in question.providers() if p.only(Case(case)) and not p.missing("cpu")} & set(chosen)
        answered = {r["provider"] for r in it.records if r["case"] == case}
        assert answered == asked
    for record in it.records:
        assert record["q20_ms"] <= record["median_ms"] <= record["q80_ms"]
        assert record["role"] == "floor" or math.isfinite(record["error"])
        assert record["share_of_limit"] > 0


@pytest.mark.parametrize("name", list(CASES))
def test_a_wrong_provider_is_refused(name, tmp_path):
    """Ours with its output off by one part in fifty is not timed; neither is one that returns NaN."""
    question = questions()[name]
    ours = next(p for p in question.providers() if p.role == "ours")

    def spoiled(factor):
        def build(case, inputs):
            call = ours.build(case, inputs)
            output = call.output

            def wrong():
                return spoil(output(), factor, question.name)

            call.output = wrong
            return call

        return build

    class Spoiled(type(question)):
        def providers(self):
            return [
                harness.Provider("off", spoiled(1.02), role="ours"),
                harness.Provider("nan", spoiled(float("nan")), role="ours"),
            ]

    it = run(Spoiled(), CASES[name][:1], tmp_path / "results.jsonl")
    assert [(r["provider"], r["status"]) for r in it.records] == [("off", "refused"), ("nan", "refused")]
    assert all("at most" in r["reason"] and "median_ms" not in r for r in it.records)


def spoil(output, factor, name):
    """Damage the last tensor of an output."""
    if isinstance(output, dict):
        *_, last = output
        return output | {last: spoil(output[last], factor, name)}
    if isinstance(output, tuple):
        return (*output[:-1], spoil(output[-1], factor, name))
    damaged = output.clone()
    if factor == factor and name in ("null-space", "growth", "initialization"):
        # A basis may be scaled; it must not be another subspace.
        return torch.randn(damaged.shape, generator=torch.Generator().manual_seed(0), dtype=damaged.dtype)
    return damaged * factor


def test_inputs_are_never_zeros():
    for name, cases in CASES.items():
        inputs = questions()[name].setup(Case(cases[0]), "cpu")
        tensors = [value for value in vars(inputs).values() if isinstance(value, torch.Tensor)]
        assert all(tensor.count_nonzero() > 0.9 * tensor.numel() for tensor in tensors), name


@pytest.mark.parametrize("name", ["layer", "training"])
def test_models_are_timed_in_the_dtype_of_the_case(name):
    """The fp64 truth once turned the shared parameters themselves into fp64."""
    inputs = questions()[name].setup(Case(CASES[name][0] | {"dtype": "bf16"}), "cpu")
    found = [value for value in vars(inputs).values() if isinstance(value, torch.nn.Module)]
    assert found
    assert {parameter.dtype for module in found for parameter in module.parameters()} == {torch.bfloat16}


def test_a_compiled_provider_leaves_the_programs_of_others(monkeypatch):
    compile_, programs = torch.compile, []

    def backend(graph, inputs):
        programs.append(graph)
        return graph.forward

    monkeypatch.setattr(torch, "compile", lambda function, **options: compile_(function, backend=backend, **options))
    layer, layers = suite("questions.layer"), suite("peers.layers")
    case = Case(CASES["layer"][0])
    inputs = layer.DecoderLayer().setup(case, "cpu")
    calls = []
    for attach in (layers.attach_plain, layers.attach_accumulated):
        calls.append(layer._build("compiled", attach)(case, inputs))
        calls[-1].output()
    assert programs
    programs.clear()
    for call in calls:
        call.modes["both"]()
    assert not programs, "compiled again, inside a sample"

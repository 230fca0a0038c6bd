"""The harness: fair turns, refusals, messages, comparisons."""

import json
import time

import pytest
import torch
from benchmark_suite import suite

records = suite("records")
timing = suite("timing")
limits = suite("limits")
report = suite("report")
harness = suite("harness")


def test_a_run_goes_on_when_the_file_is_full(monkeypatch, tmp_path, caplog):
    def full(path, entry):
        raise records.ResultsError("no space left")

    monkeypatch.setattr(records, "append", full)
    it = harness.Run(harness.Options(output=tmp_path / "r.jsonl", seconds_scale=0.001))
    it.ask(Addition())
    assert it.unwritten == len(it.records) == 2
    assert "no space left" in caplog.text


def test_quantiles():
    times = timing.Times.of([5.0, 1.0, 2.0, 4.0, 3.0, 6.0])
    assert (times.median_ms, times.q20_ms, times.q80_ms, times.samples) == (3.5, 2.0, 5.0, 6)


def test_calls_take_turns():
    order = []

    class Clock:
        def sample(self, timed):
            timed.run()
            return 1.0

    calls = {name: timing.Timed(lambda name=name: order.append(name)) for name in "abc"}
    samples = timing.interleave(calls, Clock(), seconds=0, at_least=4)
    assert [order[i : i + 3] for i in range(0, 12, 3)] == [list("abc"), list("bca"), list("cab"), list("abc")]
    assert {name: len(values) for name, values in samples.items()} == {"a": 4, "b": 4, "c": 4}


def test_preparation_is_not_timed():
    clock = timing.HostClock()
    slow = timing.Timed(lambda ready: ready, prepare=lambda: time.sleep(0.05))
    assert clock.sample(slow) < 25


def test_a_call_does_not_inherit_the_repeats_of_one_that_is_gone():
    clock, runs = timing.HostClock(), []
    for _ in range(5):
        quick = timing.Timed(lambda: None)
        clock.sample(quick)
        del quick  # the next object takes its address
        runs.clear()
        clock.sample(timing.Timed(lambda: runs.append(1)))
        assert len(runs) == 1


def test_memory_of_a_call_is_seen():
    size = 64 * 2**20
    peak, total = timing.peak_bytes(lambda: torch.ones(size // 4).sum(), "cpu")
    assert total == size // 4
    if peak is None:
        pytest.skip("this system does not say how much memory a process had")
    assert 0.98 * size <= peak < 2 * size
    assert timing.peak_bytes(lambda: None, "cpu")[0] < size // 4


def test_saved_bytes_count_storages_once_and_parameters_never():
    weight = torch.randn(8, 8, requires_grad=True)
    x = torch.randn(100, 8)
    with timing.SavedBytes([weight]) as saved:
        x @ weight + x @ weight.T
    assert saved.bytes == x.nbytes


class Addition(harness.Question):
    """A question about nothing, with one provider that is right and one that is wrong."""

    name, title, seconds = "addition", "x + x", 0.01

    def cases(self, device, full):
        return [harness.Case({"n": 1000})]

    def providers(self):
        def build(factor):
            return lambda case, x: harness.Call({"run": timing.Timed(lambda: factor * x)}, lambda: factor * x)

        return [
            harness.Provider("lora_null", build(2.0), role="ours"),
            harness.Provider("wrong", build(2.1)),
            harness.Provider("absent", build(2.0), requires=("no_such_module_anywhere",)),
            harness.Provider("elsewhere", build(2.0), devices=("cuda",)),
        ]

    def setup(self, case, device):
        return torch.rand(case["n"])

    def verify(self, case, x, output):
        return harness.Verdict(float((output - 2 * x).abs().max()), 1e-6, "error")

    def work(self, case, mode):
        return limits.Work(bytes=8 * case["n"], flops={"fp32": case["n"]})


def test_a_wrong_provider_is_refused_and_an_absent_one_vanishes(tmp_path):
    path = tmp_path / "results.jsonl"
    it = harness.Run(harness.Options(output=path, seconds_scale=0.001))
    it.ceilings = limits.Ceilings(1e9, {"fp32": 1e9})
    it.ask(Addition())
    assert [(r["provider"], r["status"]) for r in it.records] == [("wrong", "refused"), ("lora_null", "ok")]
    assert set(it.vanished) == {"addition/absent", "addition/elsewhere"}
    assert "no_such_module_anywhere" in it.vanished["addition/absent"]
    found, _ = records.read(path)
    assert found == json.loads(json.dumps(it.records))
    good = found[1]
    assert good["limit_ms"] == pytest.approx(8e-3)
    assert good["share_of_limit"] == pytest.approx(8e-3 / good["median_ms"], rel=1e-2)
    for known in ("device", "threads", "torch", "commit"):
        assert good["environment"][known]
    table = report.table(it.records)
    assert "refused" in table and "1.00x" in table and "at most 1e-06" in table


def test_a_failing_provider_does_not_stop_the_run(tmp_path):
    class Failing(Addition):
        def providers(self):
            def broken(case, x):
                raise RuntimeError("out of luck")

            return [harness.Provider("broken", broken), super().providers()[0]]

    it = harness.Run(harness.Options(output=tmp_path / "r.jsonl", seconds_scale=0.001))
    it.ask(Failing())
    assert [(r["provider"], r["status"]) for r in it.records] == [("broken", "failed"), ("lora_null", "ok")]
    assert "out of luck" in it.records[0]["reason"]


def test_what_fails_late_stops_nothing_else(tmp_path):
    class Late(Addition):
        def cases(self, device, full):
            return [harness.Case({"n": n}) for n in (-1, 0, 1000)]

        def setup(self, case, device):
            return torch.rand(case["n"])

        def verify(self, case, x, output):
            return harness.Verdict(float((output - 2 * x).abs().max()), 1e-6, "error")  # raises where x is empty

        def providers(self):
            def fragile(case, x):
                def run():
                    raise RuntimeError("out of memory")

                return harness.Call({"run": timing.Timed(run)}, lambda: 2 * x)

            return [harness.Provider("fragile", fragile), super().providers()[0]]

    path = tmp_path / "r.jsonl"
    it = harness.Run(harness.Options(output=path, seconds_scale=0.001))
    it.ask(Late())
    found = [(r["case"]["n"], r["provider"], r.get("mode"), r["status"]) for r in it.records]
    assert found == [
        (-1, "every provider", None, "failed"),
        (0, "fragile", None, "failed"), (0, "lora_null", None, "failed"),
        (1000, "fragile", "run", "failed"), (1000, "lora_null", "run", "ok"),
    ]  # fmt: skip
    assert "out of memory" in it.records[3]["reason"]
    assert "every provider" in report.table(it.records)


def test_no_case_starts_after_the_deadline(tmp_path):
    it = harness.Run(harness.Options(output=tmp_path / "r.jsonl", deadline=0.0))
    it.ask(Addition())
    assert it.records == [] and it.skipped == ["addition n=1000"]


def test_cases_can_be_chosen(tmp_path, capsys):
    it = harness.Run(harness.Options(output=tmp_path / "r.jsonl", where={"n": "999"}))
    it.ask(Addition())
    assert it.records == []
    assert suite("__main__").main(["--where", "nonsense"]) == 2
    assert "KEY=VALUE" in capsys.readouterr().err


def test_a_very_slow_call_is_not_repeated():
    calls = {"slow": timing.Timed(lambda: time.sleep(0.6)), "fast": timing.Timed(lambda: None)}
    samples = timing.interleave(calls, timing.HostClock(), seconds=0, at_least=5, patience=0.5)
    assert {name: len(values) for name, values in samples.items()} == {"slow": 1, "fast": 5}


def test_the_verified_run_of_a_very_slow_call_is_its_sample(tmp_path, monkeypatch):
    runs = []

    class Slow(Addition):
        def providers(self):
            def build(case, x):
                def run():
                    runs.append(1)
                    time.sleep(0.01)
                    return 2 * x

                return harness.Call({"run": timing.Timed(run)}, run)

            return [harness.Provider("lora_null", build, role="ours")]

    monkeypatch.setattr(harness.Run, "patient_ms", 5.0)
    monkeypatch.setattr(harness.Run, "slow_ms", 5.0)
    it = harness.Run(harness.Options(output=tmp_path / "r.jsonl"))
    it.ask(Slow())
    assert len(runs) == it.records[0]["samples"] == 1
    assert it.records[0]["median_ms"] >= 10


def test_a_self_timed_run_of_minutes_is_not_repeated(tmp_path, monkeypatch):
    runs = []

    class Minutes(Addition):
        memory = False

        def providers(self):
            def build(case, x):
                def run():
                    runs.append(time.sleep(0.01))
                    return 70_000.0

                kept = []
                timed = timing.Timed(lambda: kept.pop() if kept else run(), self_timed=True)
                return harness.Call({"run": timed}, lambda: (kept.append(run()), 2 * x)[1])

            return [harness.Provider("lora_null", build, role="ours")]

    monkeypatch.setattr(harness.Run, "minutes_ms", 5.0)
    it = harness.Run(harness.Options(output=tmp_path / "r.jsonl"))
    it.ask(Minutes())
    assert len(runs) == it.records[0]["samples"] == 1
    assert it.records[0]["median_ms"] == 70_000.0


@pytest.mark.parametrize("option", ["--only", "--provider"])
def test_unknown_names_list_the_known_ones(option, capsys):
    main = suite("__main__").main
    assert main([option, "nonsense"]) == 2
    message = capsys.readouterr().err
    assert "'nonsense'" in message
    assert ("null-space" if option == "--only" else "PEFT eager") in message


def test_shapes_of_real_models():
    shapes = suite("shapes").shapes()
    # Published parameter counts: all linears of the decoder, in billions.
    expected = {"llama-3-8b": 6.98, "llama-3.2-1b": 0.973, "llama-3.2-3b": 2.82, "llama-3-70b": 68.5}
    for name, billions in expected.items():
        assert shapes[name].layer_parameters * shapes[name].layers / 1e9 == pytest.approx(billions, rel=0.01)
    assert shapes["llama-3-8b"].covariance_widths == (4096, 4096, 4096, 14336)


def test_spectra_are_those_of_the_matrix():
    spectra = suite("spectra")
    for kind in ("qkv", "o", "gate_up", "down"):
        C, eigenvalues = spectra.covariance(96, kind)
        assert torch.equal(C, C.T)
        assert (torch.linalg.eigvalsh(C) / eigenvalues - 1).abs().max() < 1e-6
    # The ratio from index r to 2 r that was measured on real activations.
    values = spectra.spectrum(4096, "o")
    assert 1.3 < values[255] / values[127] < 1.9
    assert spectra.spectrum(4096, "gate_up")[2] / spectra.spectrum(4096, "gate_up")[0] > 1e3


def test_a_regression_of_five_percent_is_flagged():
    verdict = suite("compare").verdict
    # The clock halves its speed on the way; only the pairs tell the truth.
    drift = [1.0, 1.2, 1.5, 1.8, 2.0]
    assert verdict(drift, [1.04 * t for t in drift]) == (pytest.approx(1.04), False)
    assert verdict(drift, [1.06 * t for t in drift]) == (pytest.approx(1.06), True)
    assert verdict([1.0] * 5, [1.08, 0.9, 1.07, 0.9, 1.2]) == (pytest.approx(1.07), False)


def test_comparing_with_an_unknown_commit_says_so(capsys):
    assert suite("__main__").main(["--compare", "no-such-ref", "--only", "covariance"]) == 2
    assert "no-such-ref" in capsys.readouterr().err


def test_a_worker_measures_the_library_of_its_tree(tmp_path):
    """A tree with a library of its own: its answer, not the installed one's, is verified and timed."""
    package = tmp_path / "lora_null"
    package.mkdir()
    (package / "__init__.py").write_text("from . import ops\n")
    (package / "ops.py").write_text("def covariance_update(C, x, *, mask=None):\n    return C.addmm_(x.T, x)\n")
    case = {"d": 32, "T": 64, "dtype": "fp32"}
    with suite("compare").Worker(tmp_path, "cpu") as worker:
        assert worker.ask(open={"question": "covariance", "case": case}) == {"modes": ["run"]}
        assert worker.ask(sample="run")["ms"] > 0
        answer = worker.ask(open={"question": "null-space", "case": {"d": 32, "r": 2, "spectrum": "o"}})
        assert "null_space" in answer["error"]
        small = {"T": 4, "m": 8, "d": 8, "r": 2, "dtype": "fp32", "adapter": "fp32", "train_a": False}
        # A module that this tree has not is not taken from the installed library either.
        answer = worker.ask(open={"question": "linear", "case": small})
        assert "has no module lora_null.adapters" in answer["error"]

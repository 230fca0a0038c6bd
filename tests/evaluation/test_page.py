"""The report as a user sees it: whole, self-contained, readable on a phone; and what it refuses to write."""

import html
import json
import re

import browser
import pytest
import torch
from evaluation_tools import questions, texts

import lora_null
from lora_null.evaluation import write_report
from lora_null.evaluation.metrics import Bin

SECTIONS = ["What was done", "Evaluation", "After training", "Spectra", "Energy and effective rank", "Times and memory"]


@pytest.fixture
def trained(calibrated, tmp_path):
    """Return ``(folder, covariances, model)`` of an adapter whose B has moved."""
    model, covariances = calibrated
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=4, train="b"), progress=False)
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B.weight"):
            torch.nn.init.normal_(parameter, std=0.3)
    lora_null.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter", covariances, model


@pytest.fixture
def judged(trained, tokenizer):
    _, _, model = trained
    return lora_null.evaluate(
        model, tokenizer, keep=texts(), task=texts(4), questions=questions(), resamples=50, progress=False
    )


@pytest.fixture
def full(trained, judged, tmp_path):
    """A report on everything, from a file as the command line writes it."""
    folder, covariances, _ = trained
    stages = [{"name": "evaluate adapter", "seconds": 12.5, "peak_bytes": 3 * 2**20}]
    values = {"model": "/home/me/tiny-llama", "evaluations": {str(folder): judged.to_dict()}, "stages": stages}
    (tmp_path / "eval.json").write_text(json.dumps(values))
    return write_report(
        folder,
        tmp_path / "out" / "report.html",
        covariances=covariances,
        evaluation=tmp_path / "eval.json",
        progress=False,
    )


def words(page):
    """The text of a page as it is read."""
    text = re.sub(r"<style>.*?</style>", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def test_says_what_was_done_and_found(full, judged, trained):
    page, raw = words(full), full.read_text(encoding="utf-8")
    assert re.findall(r"<h2>(.*?)</h2>", raw) == SECTIONS
    for said in (
        "Report on adapter",
        "A is frozen in the null space",
        "768 Calibration text fingerprint",
        "tiny-llama",
        "rank 4",
        f"Forgetting, nats per token {judged.forgetting:.4g}",
        "questions: ECE",
        "questions, a: Brier score",
        "evaluate adapter 12.5 3",
        "layer 1: 4 of 80",
        "q, k, v",
        f"lora_null {lora_null.__version__} with torch",
    ):
        assert said in page, said
    assert "/home/me" not in raw and str(full.parent) not in raw
    assert raw.count("<svg") == raw.count("</svg>") and raw.count('role="img"') == raw.count('role="img" aria-label="')
    assert len(re.findall(r'role="img"', raw)) == 8 + 4 + 1
    assert "<script" not in raw and not re.findall(r"(?:src|href)=\"(?!#)", raw) and "url(" not in raw


def test_what_is_missing_is_named(trained, tmp_path):
    folder, _, _ = trained
    page = words(write_report(folder, tmp_path / "bare.html", progress=False))
    assert "not given; pass covariances" in page and "lora-null eval --json writes it" in page
    assert "Leakage was not measured" in page and "Not recorded" in page
    # What lora_null.json holds is shown without covariances too.
    assert "Share of the activations' energy" in page


def test_plain_adapters_of_other_programs(llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(r=4, target_modules=["q_proj"]))
    model.save_pretrained(tmp_path / "plain")
    page = words(write_report(tmp_path / "plain", tmp_path / "plain.html", progress=False))
    assert "made by another program" in page and "has not been trained" in page


def test_free_directions_are_the_edge(calibrated, tmp_path):
    model, covariances = calibrated
    config = lora_null.LoraNullConfig(r=4, train="b_in_basis", energy=0.9)
    lora_null.initialize(model, covariances, config, progress=False)
    lora_null.save_adapter(model, tmp_path / "adapter")
    free = model.lora_null_state.free
    page = words(write_report(tmp_path / "adapter", tmp_path / "r.html", covariances=covariances, progress=False))
    assert "beyond 90 % of the energy" in page and len(free) == 8 and len(set(free.values())) > 1
    for key, count in free.items():
        assert f"layer {key.split('.')[2]}: {count} of {covariances.size(key)}" in page


def test_the_marks_of_a_reliability_diagram_lie_where_their_bins_are():
    from lora_null.evaluation import drawings

    picture = drawings.reliability({"before": [Bin(0.5, 0.25, 0.1), Bin(1.0, 1.0, 0.9)]}, "t")
    marks = [tuple(map(float, found)) for found in re.findall(r'cx="([\d.]+)" cy="([\d.]+)"', picture)]
    (x, y), (right, top) = marks
    assert right - x == pytest.approx(0.5 * 208, abs=0.1) and y - top == pytest.approx(0.75 * 208, abs=0.1)


@pytest.mark.parametrize("values", [[1e-12, 1.0], [0.3, 0.31], [5.0], [0.0, float("inf"), 2.0], [7e4, 7e-3, 3.0]])
def test_pictures_of_any_range_stay_inside(values):
    from lora_null.evaluation import drawings

    picture = drawings.by_depth({"a": list(enumerate(values)), "b": [(0, 1.0)]}, "t", guide=1.0)
    assert "nan" not in picture and "inf" not in picture
    heights = [float(y) for y in re.findall(r' y="([\d.-]+)"', picture)]
    assert heights and all(0 <= y <= 200 for y in heights)
    labels = re.findall(r'text-anchor="end">([^<]+)<', picture)
    assert 1 <= len(labels) <= 7 and len(set(labels)) == len(labels)
    assert drawings.by_depth({"a": [(0, 0.0)]}, "t") == ""


@pytest.mark.parametrize(
    ("value", "text"),
    [(0.0, "0"), (1e-4, "1e-4"), (2.346e-12, "2.35e-12"), (0.00123, "0.00123"), (1e5, "1e5"), (70, "70")],
)
def test_numbers_are_short(value, text):
    from lora_null.evaluation import drawings

    assert drawings.number(value) == text


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [380, 1280])
def test_a_browser_shows_it_without_complaint_or_overflow(full, width, dark):
    if browser.executable() is None:
        pytest.skip("needs Chromium")
    with browser.Browser() as tab:
        tab.open(full, width, dark=dark)
        tab.evaluate("document.querySelectorAll('details').forEach(part => part.open = true)")
        assert tab.evaluate("[...document.querySelectorAll('h2')].map(each => each.textContent)") == SECTIONS
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        outside = (
            "[...document.querySelectorAll('body *')].map(each => [each.getBoundingClientRect().right, each.outerHTML])"
            ".filter(([right, text]) => right > innerWidth + 1).map(([_, text]) => text.slice(0, 80))"
        )
        assert tab.evaluate(outside) == []
        empty = "[...document.querySelectorAll('svg')].filter(each => each.getBoundingClientRect().height < 5).length"
        assert tab.evaluate(empty) == 0
        ground = tab.evaluate("getComputedStyle(document.body).backgroundColor")
        assert (sum(map(int, re.findall(r"\d+", ground)[:3])) < 200) == dark
        assert tab.complaints() == [] and tab.requests() == [full.resolve().as_uri()]


class TestRefusals:
    def test_an_output_that_is_there(self, trained, tmp_path):
        folder = trained[0]
        path = write_report(folder, tmp_path / "r.html", progress=False)
        with pytest.raises(FileExistsError, match="overwrite=True"):
            write_report(folder, path, progress=False)
        write_report(folder, path, overwrite=True, progress=False)
        path.write_text("my own page")
        with pytest.raises(FileExistsError, match="is no report"):
            write_report(folder, path, overwrite=True, progress=False)
        assert path.read_text() == "my own page"

    def test_an_evaluation_of_other_adapters(self, trained, judged, tmp_path):
        entries = {"a": judged.to_dict(), "b": judged.to_dict()}
        (tmp_path / "e.json").write_text(json.dumps({"evaluations": entries}))
        with pytest.raises(ValueError, match="expected one of this adapter"):
            write_report(trained[0], tmp_path / "r.html", evaluation=tmp_path / "e.json", progress=False)
        assert not (tmp_path / "r.html").exists()

    @pytest.mark.parametrize("change", [{"keep": {"documents": "many"}}, {"questions": {"questions": 3}}, {"other": 1}])
    def test_a_file_that_is_no_evaluation(self, trained, judged, tmp_path, change):
        (tmp_path / "e.json").write_text(json.dumps({**judged.to_dict(), **change}))
        with pytest.raises(ValueError, match="holds no evaluation of this version"):
            write_report(trained[0], tmp_path / "r.html", evaluation=tmp_path / "e.json", progress=False)

    def test_covariances_of_another_model(self, trained, llama, token_batches, tmp_path, monkeypatch):
        other = lora_null.calibrate(llama(hidden_size=64), token_batches(), progress=False)
        # Eigenvalues of a real model take minutes: what does not fit is said before.
        monkeypatch.setattr(type(other), "__getitem__", lambda *_: pytest.fail("a matrix was read"))
        with pytest.raises(ValueError, match="another model"):
            write_report(trained[0], tmp_path / "r.html", covariances=other, progress=False)


def test_an_evaluation_comes_back_from_json(judged):
    from lora_null.evaluation import Evaluation

    assert Evaluation.from_dict(json.loads(json.dumps(judged.to_dict())), "it") == judged

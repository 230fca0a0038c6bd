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


def task(folder, **settings):
    """A task on local files; nothing is downloaded."""
    rows = [{**question, "id": index} for index, question in enumerate(questions())]
    path = folder / "rows.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return {
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(path)}},
        "test_split": "test",
        **settings,
    }


@pytest.mark.parametrize("kind", ["frozen A", "peft trained A", "base"])
def test_agrees_with_our_questions(harness, kind, tokenizer, tmp_path):
    model, base, _ = tuned(kind)
    choice = task(
        tmp_path,
        task="local_choice",
        output_type="multiple_choice",
        doc_to_text="{{question}}",
        doc_to_choice="{{choices}}",
        doc_to_target="{{answer}}",
        metric_list=[{"metric": "acc"}],
    )
    found = lora_null.evaluate(
        model, tokenizer, questions=questions(), lm_eval_tasks=[choice], base=base, batch_size=4, progress=False
    )
    # The same documents, right and wrong on the same ones, resampled alike: equal with their intervals.
    assert found.lm_eval == {"local_choice": {"acc,none": found.questions.accuracy}}
    json.dumps(found.to_dict(), allow_nan=False)


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

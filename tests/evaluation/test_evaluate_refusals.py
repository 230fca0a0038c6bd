"""What ``evaluate`` refuses, in one clear sentence each, before a model has run."""

import json

import peft
import pytest
import torch
from tiny_models import make_llama

import lora_null
from lora_null.evaluation import questions as module


@pytest.fixture
def model(calibrated):
    model, covariances = calibrated
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=4), progress=False)
    # Nothing may run before everything is checked.
    model.register_forward_pre_hook(lambda *_: pytest.fail("the model was run"))
    return model


def question(**changes):
    return {"question": "w1 w2", "choices": ["w3", "w4"], "answer": "w3", **changes}


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({}, ValueError, "nothing to evaluate"),
        ({"keep": []}, ValueError, "keep holds no text"),
        ({"keep": ["w1 w2", "  "]}, ValueError, "keep: entry 2 is empty"),
        ({"keep": ["w1"]}, ValueError, "keep has no document of two tokens"),
        ({"keep": [3]}, TypeError, "keep: entry 1 is a int"),
        ({"task": [{"prompt": "w1"}]}, TypeError, "entry 1 is a mapping with .'prompt'."),
        ({"task": [{"prompt": "w1", "completion": ""}]}, ValueError, "task: entry 1 is empty"),
        ({"keep": "missing.txt"}, FileNotFoundError, "missing.txt"),
        ({"questions": "missing.jsonl"}, FileNotFoundError, "missing.jsonl is not a file"),
        ({"questions": []}, ValueError, "questions is empty"),
        ({"questions": [question(), question(answer="w5")]}, ValueError, "Question 2: the answer 'w5' is not among"),
        ({"questions": [question(answer=2)]}, ValueError, "Question 1: the answer 2 is not among"),
        ({"questions": [question(answer=True)]}, ValueError, "Question 1: the answer True is not among"),
        ({"questions": [question(choices=["w3"])]}, ValueError, "at least two, all different"),
        ({"questions": [question(choices=["w3", "w3"])]}, ValueError, "at least two, all different"),
        ({"questions": [question(choices="w3 w4")]}, ValueError, "expected a list of texts"),
        ({"questions": [question(question=" ")]}, ValueError, "expected a text that the choices can follow"),
        ({"questions": [{"question": "w1"}]}, ValueError, r"Question 1 has \['question'\]; expected question, choices"),
        ({"keep": ["w1 w2"], "batch_size": 0}, ValueError, "batch_size is 0"),
        ({"keep": ["w1 w2"], "sequence_length": 1}, ValueError, "sequence_length is 0"),
    ],
)
def test_bad_input(model, tokenizer, given, error, message):
    with pytest.raises(error, match=message):
        lora_null.evaluate(model, tokenizer, progress=False, **given)


def test_tokenizer_that_splits_differently_at_the_choice(model, tokenizer):
    def appending(text):
        return {"input_ids": [*tokenizer(text)["input_ids"], 0]}

    with pytest.raises(ValueError, match=r"splits 'w1 w2' differently when ' w3' follows.*add_eos_token=False"):
        lora_null.evaluate(model, appending, questions=[question()], progress=False)
    # "w1" and "w12" are words; a completion that continues one leaves the prompt without its own tokens.
    with pytest.raises(ValueError, match="splits 'w1' differently when '2 w3' follows"):
        lora_null.evaluate(model, tokenizer, task=[{"prompt": "w1", "completion": "2 w3"}], progress=False)


def test_tokenizer_of_another_model(model):
    def larger(text):
        return {"input_ids": [5, 97]}

    with pytest.raises(ValueError, match="gives the token 97, but the model knows 97 tokens"):
        lora_null.evaluate(model, larger, keep=["w1 w2"], progress=False)


def test_models_without_a_before(tokenizer):
    with pytest.raises(ValueError, match=r"carries no adapter.*pass base="):
        lora_null.evaluate(make_llama(), tokenizer, keep=["w1 w2"], progress=False)
    model = make_llama()
    with pytest.raises(ValueError, match="base is the model itself"):
        lora_null.evaluate(model, tokenizer, keep=["w1 w2"], base=model, progress=False)
    shifted = peft.get_peft_model(make_llama(), peft.LoraConfig(r=4, init_lora_weights="pissa"))
    with pytest.raises(ValueError, match="init_lora_weights='pissa', by which PEFT changes the base"):
        lora_null.evaluate(shifted, tokenizer, keep=["w1 w2"], progress=False)
    found = lora_null.evaluate(shifted, tokenizer, keep=["w1 w2 w3"], base=make_llama(), progress=False)
    assert found.keep.kl.value < 1e-6
    merged = peft.get_peft_model(make_llama(), peft.LoraConfig(r=4))
    merged.merge_adapter()
    with pytest.raises(ValueError, match="has its adapter merged"):
        lora_null.evaluate(merged, tokenizer, keep=["w1 w2"], progress=False)


def test_base_of_another_vocabulary(tokenizer):
    with pytest.raises(ValueError, match="vocabulary of 101 tokens, the tuned one of 97"):
        lora_null.evaluate(make_llama(), tokenizer, keep=["w1 w2"], base=make_llama(vocab_size=101), progress=False)


@pytest.mark.parametrize("asked", [{"keep": ["w1 w2 w3"]}, {"questions": [question()]}])
def test_diverged_model(calibrated, tokenizer, asked):
    model, covariances = calibrated
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=4), progress=False)
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.lora_B.weight.fill_(float("nan"))
    with pytest.raises(ValueError, match="logits are not a number"):
        lora_null.evaluate(model, tokenizer, progress=False, **asked)
    assert all(module.adapter_enabled for module in model.modules() if hasattr(module, "adapter_enabled"))


def test_files_of_questions_name_the_line(tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps(question()) + "\n{nonsense\n")
    with pytest.raises(ValueError, match="line 2 is not JSON"):
        module.read_questions(path)


def test_answers_may_be_positions_and_kinds_are_optional():
    (read,) = module.read_questions([question(answer=1)])
    assert read == module.Question("w1 w2", ("w3", "w4"), "w4", "")


def test_a_logit_of_minus_infinity_is_no_nan():
    from lora_null.evaluation.compare import compare_logits

    before = torch.tensor([[[0.0, 1.0, float("-inf")], [0.0, 0.0, 0.0]]])
    found = compare_logits(before, before + 0.0, torch.tensor([0]), torch.tensor([0]), torch.tensor([1]))
    assert found[0, 2] == 0 and found[0, 3] == 1

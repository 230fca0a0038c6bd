"""``lora-null eval``: the figures are those of plain torch for every kind of folder, and mistakes end in a sentence."""

import json

import peft
import pytest
import torch
from evaluation_tools import questions, texts
from transformers import AutoModelForCausalLM

import lora_null


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder / "model")


def stirred(model):
    generator = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3 * torch.randn(parameter.shape, generator=generator))
    return model


@pytest.fixture
def inputs(folder):
    (folder / "keep.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts()))
    pairs = [{"prompt": "w1 w2", "completion": f" w{i} w{i + 1}"} for i in range(5)]
    (folder / "task.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "questions.jsonl").write_text("\n".join(map(json.dumps, questions())))
    return folder


@pytest.fixture
def tuned(inputs, tokenizer):
    """Return a function that writes a tuned model of one kind and returns its folder and the model."""

    def make(kind):
        model, path = load(inputs), inputs / kind
        if kind in ("ours", "merged"):
            batches = [tokenizer(text, return_tensors="pt") for text in texts()]
            covariances = lora_null.calibrate(model, batches, progress=False)
            lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=4), progress=False)
            stirred(model)
            if kind == "ours":
                lora_null.save_adapter(model, path)
                return path, model
            model = lora_null.merge(model)
        else:
            options = {"use_dora": True} if kind == "dora" else {}
            config = (
                peft.OFTConfig(r=0, oft_block_size=4, target_modules="all-linear")
                if kind == "oft"
                else peft.LoraConfig(r=4, target_modules="all-linear", **options)
            )
            model = stirred(peft.get_peft_model(model, config)).eval()
        model.save_pretrained(path)
        return path, model

    return make


@pytest.mark.parametrize("kind", ["ours", "lora", "dora", "oft", "merged"])
def test_figures_are_those_of_plain_torch(kind, inputs, tuned, tokenizer, run):
    path, model = tuned(kind)
    code, out, err = run("eval", inputs / "model", path, "--keep", inputs / "keep.jsonl", "--json", "--no-progress")
    assert code == 0, err
    found = json.loads(out)["evaluations"][str(path)]["keep"]
    sums = torch.zeros(4, dtype=torch.float64)
    for text in texts():
        ids = torch.tensor([tokenizer(text)["input_ids"]])
        with torch.no_grad():
            p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (load(inputs), model))
        truth = ids[0, 1:, None]
        kl = (p.exp() * (p - q)).sum()
        sums += torch.stack([-p.gather(1, truth).sum(), -q.gather(1, truth).sum(), kl, torch.tensor(len(truth))])
    before, after, kl, _ = (sums / sums[-1]).tolist()
    assert found["cross_entropy"]["before"]["value"] == pytest.approx(before, abs=1e-6)
    assert found["cross_entropy"]["after"]["value"] == pytest.approx(after, abs=1e-6)
    assert found["kl"]["value"] == pytest.approx(kl, abs=1e-6) and kl > 1e-4


def test_the_table_has_every_adapter_and_measure(inputs, tuned, run):
    ours, plain = tuned("ours")[0], tuned("lora")[0]
    files = [
        "--keep",
        inputs / "keep.jsonl",
        "--task",
        inputs / "task.jsonl",
        "--questions",
        inputs / "questions.jsonl",
    ]
    code, out, err = run("eval", inputs / "model", ours, plain, *files, "--no-progress")
    assert code == 0, err
    for words in ("keep: cross-entropy", "task: KL", "questions: accuracy", "questions, a: log-likelihood"):
        assert sum(f" {words} " in line for line in out.splitlines() if "nats per" not in line) == 2, words
    assert str(ours) in out and str(plain) in out


def test_report_shows_what_eval_found(inputs, tuned, run):
    path = tuned("ours")[0]
    code, out, err = run("eval", inputs / "model", path, "--keep", inputs / "keep.jsonl", "--json", "--no-progress")
    assert code == 0, err
    (inputs / "e.json").write_text(out)
    change = json.loads(out)["evaluations"][str(path)]["keep"]["cross_entropy"]["change"]["value"]
    code, out, err = run("report", path, "--eval", inputs / "e.json", "--output", inputs / "r.html", "--no-progress")
    assert code == 0 and "r.html: report on" in out, err
    page = (inputs / "r.html").read_text()
    assert f"<b>{change:.4g}</b>" in page and "evaluate ours" in page and "load ours" in page
    code, out, err = run("report", path, "--output", inputs / "r.html", "--no-progress")
    assert code == 2 and "--overwrite" in err


class TestRefusals:
    def refused(self, run, *arguments):
        code, out, err = run("eval", *arguments, "--no-progress")
        # transformers draws its bars before.
        message = err.splitlines()[-1]
        assert code == 2 and out == "" and message.startswith("error: ") and err.count("error: ") == 1, err
        return message

    def test_nothing_to_evaluate(self, inputs, tuned, run):
        assert "nothing to evaluate" in self.refused(run, inputs / "model", tuned("lora")[0])

    def test_empty_text(self, inputs, tuned, run):
        (inputs / "empty.txt").write_text(" \n\n ")
        path = tuned("lora")[0]
        assert "holds no text" in self.refused(run, inputs / "model", path, "--keep", inputs / "empty.txt")

    def test_an_answer_that_is_no_choice(self, inputs, tuned, run):
        (inputs / "bad.jsonl").write_text(json.dumps({"question": "w1", "choices": ["w2", "w3"], "answer": "w4"}))
        path = tuned("lora")[0]
        assert "is not among the choices" in self.refused(
            run, inputs / "model", path, "--questions", inputs / "bad.jsonl"
        )

    def test_no_adapter(self, inputs, run):
        assert "neither adapter_config.json nor config.json" in self.refused(
            run, inputs / "model", inputs / "nowhere", "--keep", inputs / "keep.jsonl"
        )

    @pytest.mark.parametrize("kind", ["ours", "oft"])
    def test_adapter_of_another_model(self, kind, inputs, tuned, tokenizer, llama, run):
        path = tuned(kind)[0]
        llama(hidden_size=64, seed=3).save_pretrained(inputs / "other")
        tokenizer.save_pretrained(inputs / "other")
        err = self.refused(run, inputs / "other", path, "--keep", inputs / "keep.jsonl")
        assert str(path) in err and ("another model" in err or "this model" in err)

    def test_a_tokenizer_that_splits_differently(self, inputs, tuned, run):
        pair = {"prompt": "w1 w", "completion": "2 w3"}
        (inputs / "split.jsonl").write_text(json.dumps(pair))
        path = tuned("lora")[0]
        assert "splits" in self.refused(run, inputs / "model", path, "--task", inputs / "split.jsonl")

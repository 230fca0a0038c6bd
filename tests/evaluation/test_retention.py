"""The callback in real runs of a small model that forgets: it logs, stops, marks the best, and changes nothing else."""

import json
import math
from pathlib import Path

import peft
import pytest
import torch
from evaluation_tools import questions, texts
from tiny_models import make_llama
from transformers import Trainer, TrainerCallback, TrainingArguments

import lora_null

KEEP = texts(count=5)


def prepared(kind="peft"):
    model = make_llama()
    if kind == "peft":
        config = peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.1)
        return peft.get_peft_model(model, config), None
    ids = list(torch.randint(97, (6, 4, 32), generator=torch.Generator().manual_seed(1)))
    covariances = lora_null.calibrate(model, ids, progress=False)
    config = lora_null.LoraNullConfig(r=4, lora_alpha=8, freeze_a=kind == "frozen A")
    return lora_null.initialize(model, covariances, config, progress=False), covariances


def run(folder, model, tokenizer, *callbacks, **options):
    """Train on one sentence over and over, which makes the model forget every other one."""
    torch.manual_seed(0)
    sentence = torch.arange(1, 17)
    data = [{"input_ids": sentence, "labels": sentence}] * 64
    settings = {
        "per_device_train_batch_size": 4,
        "max_steps": 8,
        "learning_rate": 3e-2,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "disable_tqdm": True,
        "use_cpu": True,
    }
    arguments = TrainingArguments(str(folder), **{**settings, **options})
    trainer = Trainer(
        model=model, args=arguments, train_dataset=data, processing_class=tokenizer, callbacks=list(callbacks)
    )
    for callback in callbacks:
        if isinstance(callback, lora_null.RetentionCallback):
            callback.set_trainer(trainer)
    trainer.train()
    return trainer


def logged(trainer):
    return [entry for entry in trainer.state.log_history if "retention_kl" in entry]


@pytest.mark.parametrize("kind", ["peft", "frozen A", "trained A"])
def test_logs_what_evaluate_finds(kind, tokenizer, tmp_path):
    model, covariances = prepared(kind)
    callback = lora_null.RetentionCallback(KEEP, every=3, questions=questions(), covariances=covariances)
    trainer = run(tmp_path, model, tokenizer, callback)
    entries = logged(trainer)
    assert [entry["step"] for entry in entries] == [3, 6, 8] == [step for step, _ in callback.history]
    found = lora_null.evaluate(model, tokenizer, keep=KEEP, questions=questions(), progress=False)
    assert callback.history[-1][1] == found
    last = entries[-1]
    assert last["retention_forgetting"] == found.forgetting
    assert last["retention_forgetting_low"] < last["retention_forgetting"] < last["retention_forgetting_high"]
    assert last["retention_kl"] == found.keep.kl.value > 0
    assert last["retention_agreement"] == found.keep.agreement.value
    assert last["retention_accuracy"] == found.questions.accuracy.after.value
    assert ("retention_leakage" in last) == (covariances is not None)
    if covariances is not None:
        from lora_null.evaluation.report import adapter_report

        lora_null.save_adapter(model, tmp_path / "adapter")
        _, layers = adapter_report(tmp_path / "adapter", covariances, progress=False)
        responses = sorted(layer.response for layer in layers)
        assert last["retention_leakage"] == pytest.approx((responses[6] + responses[7]) / 2, rel=1e-4)


def test_reaches_what_the_trainer_reports_to(tokenizer, tmp_path):
    seen = []

    class Report(TrainerCallback):
        def on_log(self, args, state, control, logs=None, **kwargs):
            seen.append(dict(logs))

    run(tmp_path, prepared()[0], tokenizer, Report(), lora_null.RetentionCallback(KEEP, every=4))
    assert sum("retention_kl" in logs for logs in seen) == 2


def test_stops_a_run_that_forgets(tokenizer, tmp_path):
    free = lora_null.RetentionCallback(KEEP, every=2)
    run(tmp_path / "free", prepared()[0], tokenizer, free)
    path = [found.forgetting for _, found in free.history]
    bound = (path[1] + path[2]) / 2
    assert max(path[:2]) < bound < path[2], path

    callback = lora_null.RetentionCallback(KEEP, every=2, stop_above=bound)
    trainer = run(tmp_path / "bound", prepared()[0], tokenizer, callback)
    assert trainer.state.global_step == 6 and callback.kept_step == 4
    assert [found.forgetting for _, found in callback.history] == path[:3]


def test_the_last_checkpoint_within_the_bound_is_the_best(tokenizer, tmp_path):
    free = lora_null.RetentionCallback(KEEP, every=2)
    run(tmp_path / "free", prepared()[0], tokenizer, free)
    path = [found.forgetting for _, found in free.history]
    bound = (path[1] + path[2]) / 2
    assert path[1] < bound < path[2], path
    saving = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1}
    callback = lora_null.RetentionCallback(KEEP, every=2, stop_above=bound, stop=False)
    trainer = run(tmp_path / "marked", prepared()[0], tokenizer, callback, **saving)
    assert trainer.state.global_step == 8
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-4"
    assert (tmp_path / "marked" / "checkpoint-4").is_dir() and not (tmp_path / "marked" / "checkpoint-6").exists()
    json.dumps(logged(trainer), allow_nan=False)


def test_a_run_is_the_same_with_it(tokenizer, tmp_path):
    """Dropout draws from the global generator, and PEFT's switch unfreezes: neither may show."""
    finals = []
    for callbacks in ((), (lora_null.RetentionCallback(KEEP, every=2),)):
        model, _ = prepared()
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)
        run(tmp_path, model, tokenizer, *callbacks)
        finals.append({name: tensor.clone() for name, tensor in model.state_dict().items()})
    assert all(torch.equal(tensor, finals[1][name]) for name, tensor in finals[0].items())


@pytest.mark.parametrize(
    ("options", "message"),
    [({"every": 0}, "every is 0"), ({"stop_above": -1.0}, "not negative"), ({"stop_above": math.nan}, "not negative")],
)
def test_refusals(options, message):
    with pytest.raises(ValueError, match=message):
        lora_null.RetentionCallback(KEEP, **options)


def test_empty_text_is_refused_before_the_run():
    with pytest.raises(ValueError, match="keep: entry 1 is empty"):
        lora_null.RetentionCallback([" "])

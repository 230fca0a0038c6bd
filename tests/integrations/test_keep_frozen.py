"""A trainer that has loaded an adapter as trainable leaves A alone, from the first step on and after a resume."""

import pytest
import torch
from adapter_tools import ids
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainingArguments

import lora_null
from lora_null.integrations import KeepFrozen


@pytest.fixture
def adapter(calibrated, tmp_path):
    """The folder of an adapter that was started with A frozen."""
    model, covariances = calibrated
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    lora_null.peft.initialize_lora_null_weights(model, covariances, progress=False)
    lora_null.peft.save_adapter(model, tmp_path / "adapter")
    return tmp_path / "adapter"


def trainer(model, folder, **options):
    arguments = TrainingArguments(
        str(folder), max_steps=4, save_steps=2, learning_rate=1e-2, weight_decay=0.1, report_to=[], disable_tqdm=True,
        use_cpu=True, lr_scheduler_type="constant",
    )  # fmt: skip
    data = [{"input_ids": row, "labels": row} for row in torch.randint(97, (16, 24))]
    return Trainer(model, arguments, train_dataset=data, **options)


def factors(model, letter):
    return {name: p.detach().clone() for name, p in model.named_parameters() if f".lora_{letter}." in name}


def unmoved(before, after):
    return all(torch.equal(before[name], after[name]) for name in before)


def test_a_is_trained_without_the_callback_and_not_with_it(adapter, llama, tmp_path):
    for callbacks, kept in (([], False), ([KeepFrozen()], True)):
        model = PeftModel.from_pretrained(llama(), str(adapter), is_trainable=True)
        before_A, before_B = factors(model, "A"), factors(model, "B")
        run = trainer(model, tmp_path / f"run{kept}", callbacks=callbacks)
        run.train()
        assert unmoved(before_A, factors(model, "A")) == kept
        assert not unmoved(before_B, factors(model, "B"))
        held = {id(p) for group in run.optimizer.param_groups for p in group["params"]}
        assert any(id(p) in held for name, p in model.named_parameters() if ".lora_A." in name) != kept


def test_a_resumed_run_ends_where_the_whole_one_does(adapter, llama, tmp_path):
    def run():
        torch.manual_seed(0)
        model = PeftModel.from_pretrained(llama(), str(adapter), is_trainable=True)
        return trainer(model, tmp_path / "run", callbacks=[KeepFrozen()])

    whole = run()
    before = factors(whole.model, "A")
    whole.train()
    resumed = run()
    resumed.train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-2"))
    assert unmoved(before, factors(resumed.model, "A"))
    whole_logits, resumed_logits = (r.model.eval()(input_ids=ids()).logits for r in (whole, resumed))
    assert torch.equal(whole_logits, resumed_logits)


def test_a_callback_that_comes_late_still_freezes(adapter, llama, tmp_path):
    model = PeftModel.from_pretrained(llama(), str(adapter), is_trainable=True)
    run = trainer(model, tmp_path / "run")
    run.add_callback(KeepFrozen())
    before = factors(model, "A")
    run.train()
    assert unmoved(before, factors(model, "A"))


def test_a_model_of_ours_is_left_in_its_mode(calibrated, tmp_path):
    model, covariances = calibrated
    config = lora_null.LoraNullConfig(r=4, freeze_a=False)
    lora_null.initialize(model, covariances, config, progress=False)
    trainer(model, tmp_path, callbacks=[KeepFrozen()])
    assert all(p.requires_grad for name, p in model.named_parameters() if ".lora_A." in name)


def test_refusals(calibrated, llama, tmp_path):
    with pytest.raises(ValueError, match="has no LoRA layer with an adapter named 'default'"):
        trainer(llama(), tmp_path, callbacks=[KeepFrozen()])
    model, covariances = calibrated
    model = get_peft_model(model, LoraConfig(r=4, lora_alpha=4, target_modules="all-linear"))
    lora_null.peft.initialize_lora_null_weights(model, covariances, freeze_a=False, progress=False)
    with pytest.raises(ValueError, match=r"q_proj was initialised with freeze_a=False"):
        trainer(model, tmp_path, callbacks=[KeepFrozen()])

"""``load_best_model_at_end`` and ``resume_from_checkpoint`` of transformers' Trainer, in all modes and both routes."""

import pytest
import torch
from adapter_tools import ids
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

import lora_null
from lora_null import LoraNullConfig
from lora_null import peft as lora_null_peft

RECIPE = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"], "use_rslora": True, "lora_dropout": 0.1}
TRAIN = pytest.mark.parametrize("train", ["b", "b_in_basis", "ab"])


@torch.no_grad()
def logits(model):
    training = model.training
    found = model.eval()(input_ids=ids()).logits
    model.train(training)
    return found


@pytest.fixture
def start(llama, calibrated):
    def make(train, route="peft", second=None):
        energy = {"energy": 0.9} if train == "b_in_basis" else {}
        torch.manual_seed(0)
        if route == "own":
            config = LoraNullConfig(**RECIPE, train=train, **energy)
            return lora_null.initialize(llama(), calibrated[1], config, progress=False)
        model = get_peft_model(llama(), LoraConfig(**RECIPE))
        lora_null_peft.initialize_lora_null_weights(model, calibrated[1], train=train, progress=False, **energy)
        if second is not None:
            model.add_adapter("second", LoraConfig(**RECIPE | second))
        if route == "fused":
            lora_null_peft.use_fused_kernels(model)
        return model

    return make


class Watch(TrainerCallback):
    """Keep what the model gave at every checkpoint, and have the fourth step be the best."""

    def __init__(self):
        self.at = {}

    def on_evaluate(self, args, state, control, metrics, **_):
        metrics["eval_loss"] = abs(state.global_step - 4)

    def on_save(self, args, state, control, model, **_):
        self.at[state.global_step] = logits(model)


def trained(model, folder, **resume):
    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=8, save_steps=2, eval_steps=2, eval_strategy="steps", learning_rate=1e-2,
        report_to=[], disable_tqdm=True, per_device_train_batch_size=4, lr_scheduler_type="constant",
        load_best_model_at_end=not resume, metric_for_best_model="eval_loss", greater_is_better=False,
    )  # fmt: skip
    rows = torch.randint(97, (24, 16), generator=torch.Generator().manual_seed(5))
    rows = [{"input_ids": row, "labels": row} for row in rows]
    watch = Watch()
    trainer = Trainer(model, arguments, train_dataset=rows[:16], eval_dataset=rows[16:])
    trainer.callback_handler.callbacks.insert(0, watch)
    trainer.train(**resume)
    return watch.at


def off(got, want, llama):
    return float((got - want).norm() / (want - logits(llama())).norm())


@TRAIN
@pytest.mark.parametrize("route", ["peft", "fused", "own"])
def test_the_best_model_comes_back_and_is_saved(start, llama, tmp_path, train, route):
    model = start(train, route)
    at = trained(model, tmp_path)
    assert off(at[8], at[4], llama) > 0.1
    assert off(logits(model), at[4], llama) <= 1e-5
    save = lora_null.save_adapter if route == "own" else lora_null_peft.save_adapter
    save(model, tmp_path / "best")
    assert off(logits(PeftModel.from_pretrained(llama(), str(tmp_path / "best"))), at[4], llama) <= 1e-5


@TRAIN
@pytest.mark.parametrize("active", ["default", "second"])
@pytest.mark.parametrize("second", [{}, {"r": 3, "lora_alpha": 5}], ids=["alike", "other"])
def test_one_of_several(start, llama, tmp_path, train, active, second):
    def made():
        model = start(train, second=second)
        model.set_adapter(active)
        return model

    model = made()
    at = trained(model, tmp_path)
    assert off(logits(model), at[4], llama) <= 1e-5
    resumed = made()
    trained(resumed, tmp_path, resume_from_checkpoint=str(tmp_path / "checkpoint-4"))
    assert off(logits(resumed), at[8], llama) <= 1e-4

"""Null-Basis LoRA in PEFT's layers: the same start, the same files, PEFT's own switches, and going on."""

import json

import pytest
import torch
from adapter_tools import optimise
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lora_null
from lora_null import null_basis
from lora_null import peft as lora_null_peft
from lora_null.adapters.layer import adapter_layers

R = 6


def ids(seed=3):
    return torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def found(llama, token_batches):
    return lora_null.calibrate(llama(), token_batches(vocab_size=8), progress=False)


def started(llama, found, **options):
    model = get_peft_model(llama(), LoraConfig(r=R, lora_alpha=9, target_modules="all-linear"))
    options = {"train": "b_in_basis", "energy": 0.99, **options}
    return lora_null_peft.initialize_lora_null_weights(model, found, progress=False, **options)


def learn(model, steps=3, first=0):
    return optimise(model, map(ids, range(first, first + steps)))


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


def most_leaked(model, found, energy=0.99):
    layers = lora_null_peft.lora_layers(model)
    return max(null_basis(found[n], energy).leak(layer.lora_A["default"].weight) for n, layer in layers.items())


def test_starts_and_learns_as_a_patched_plain_model(llama, found):
    model = started(llama, found)
    assert torch.equal(logits(model), logits(llama()))
    config = lora_null.LoraNullConfig(r=R, lora_alpha=9, train="b_in_basis", energy=0.99)
    plain = lora_null.initialize(llama(), found, config, progress=False)
    for part in (model, plain):
        learn(part)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    assert most_leaked(model, found) < 1e-6
    lora_null_peft.use_fused_kernels(model)
    torch.testing.assert_close(logits(model), logits(plain), rtol=0, atol=1e-5)
    layers = zip(lora_null_peft.lora_layers(model).values(), adapter_layers(plain).values(), strict=True)
    assert all(a.lora_A["default"].coefficients.shape == b.lora_A.coefficients.shape for a, b in layers)


@pytest.mark.parametrize("by", ["save_pretrained", "save_adapter"])
def test_files_have_the_same_names_and_fit_stock_peft(llama, found, tmp_path, by):
    model = learn(started(llama, found))
    if by == "save_pretrained":
        model.save_pretrained(tmp_path / "adapter")
    else:
        lora_null_peft.save_adapter(model, tmp_path / "adapter")
    keys = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {key.rsplit(".", 2)[-2] + "." + key.rsplit(".", 1)[-1] for key in keys} == {"lora_A.weight", "lora_B.weight"}
    torch.testing.assert_close(
        logits(PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))), logits(model), rtol=0, atol=1e-5
    )
    kept = json.loads((tmp_path / "adapter" / "lora_null.json").read_text())
    assert kept["config"]["train"] == "b_in_basis" and kept["free"]
    merged = model.merge_and_unload()
    torch.testing.assert_close(
        logits(merged), logits(lora_null.load_adapter(llama(), tmp_path / "adapter")), rtol=0, atol=1e-5
    )


def test_pefts_switches_leave_it_learning(llama, found):
    model = started(llama, found)
    with model.disable_adapter():
        assert torch.equal(logits(model), logits(llama()))
    model.set_adapter("default")
    names = {name.rsplit(".", 1)[-1] for name, p in model.named_parameters() if p.requires_grad and "lora_A" in name}
    assert names == {"coefficients"}
    learn(model)
    assert most_leaked(model, found) < 1e-6


def test_resumes_in_a_model_that_was_initialised_alike(llama, found, tmp_path):
    model = learn(started(llama, found))
    model.save_pretrained(tmp_path / "adapter")
    again = started(llama, found)
    again.load_adapter(str(tmp_path / "adapter"), "default", is_trainable=True)
    for part in (model, again):
        learn(part.train(), first=3)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-4)
    assert most_leaked(again, found) < 1e-6


def test_goes_on_from_its_folder_with_the_covariances(llama, found, tmp_path):
    model = learn(started(llama, found))
    lora_null_peft.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"train='b_in_basis'.*Pass covariances="):
        lora_null_peft.load_trainable(llama(), tmp_path / "adapter")
    again = lora_null_peft.load_trainable(llama(), tmp_path / "adapter", covariances=found)
    torch.testing.assert_close(logits(again), logits(model), rtol=0, atol=1e-5)
    learn(again.train())
    assert most_leaked(again, found) < 1e-6


def test_another_start_takes_its_place(llama, found):
    model = started(llama, found)
    lora_null_peft.initialize_lora_null_weights(model, found, train="b", progress=False)
    assert not any("coefficients" in name for name, _ in model.named_parameters())
    assert torch.equal(logits(model), logits(llama()))
    trained = {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_B"}


def test_keep_frozen_refuses_what_learns(llama, found):
    from lora_null.integrations import KeepFrozen

    with pytest.raises(ValueError, match=r"initialised with train='b_in_basis', where A is trained; KeepFrozen"):
        KeepFrozen().on_train_begin(None, None, None, model=started(llama, found))


def test_frozen_on_request_it_stays_so(llama, found):
    model = started(llama, found)
    assert lora_null_peft.freeze_lora_A(model) == 14
    for _ in range(2):
        assert {name.split(".")[-3] for name, p in model.named_parameters() if p.requires_grad} == {"lora_B"}
        model.set_adapter("default")

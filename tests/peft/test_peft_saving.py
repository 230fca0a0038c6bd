"""PEFT's own save_pretrained and load_adapter on an initialised model, as trainers call them."""

import copy
import json

import pytest
import torch
from adapter_tools import ids, learn
from peft import (
    LoraConfig,
    PeftModel,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from safetensors.torch import load_file

import lora_null
from lora_null import peft as lora_null_peft
from lora_null.adapters import export_adapter

R = 6
MODES = pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen A", "trained A"])


@pytest.fixture
def start(llama, calibrated):
    """Make the same initialised model again and again, as a resumed run does."""

    def make(freeze_a=True, dtype=torch.float32, covariances=calibrated[1], train=None, **config):
        config = {"r": R, "lora_alpha": 2 * R, "target_modules": "all-linear"} | config
        model = get_peft_model(llama(dtype), LoraConfig(**config))
        options = {"freeze_a": freeze_a} if train is None else {"train": train}
        options |= {"energy": 0.9} if train == "b_in_basis" else {}
        return lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False, **options)

    return make


@torch.no_grad()
def logits(model):
    return model.eval()(ids()).logits


def trainable(model):
    return {name.split(".")[-3] for name, parameter in model.named_parameters() if parameter.requires_grad}


@MODES
def test_a_checkpoint_fits_the_untouched_base(start, llama, tmp_path, freeze_a):
    model = learn(start(freeze_a))
    want, base = logits(model), logits(llama())
    model.save_pretrained(str(tmp_path / "checkpoint"))
    config = json.loads((tmp_path / "checkpoint" / "adapter_config.json").read_text())
    assert config["r"] == (R if freeze_a else 2 * R)
    rank = export_adapter(tmp_path / "checkpoint", tmp_path / "exported")
    assert rank == config["r"]
    for loaded in (
        PeftModel.from_pretrained(llama(), str(tmp_path / "checkpoint")),
        PeftModel.from_pretrained(llama(), str(tmp_path / "exported")),
        lora_null.load_adapter(llama(), tmp_path / "checkpoint"),
    ):
        assert (logits(loaded) - want).norm() <= 1e-5 * (want - base).norm()
    # saving changes nothing in memory
    assert torch.equal(logits(model), want) and model.peft_config["default"].r == R


@MODES
def test_a_checkpoint_knows_how_it_was_trained(start, llama, tmp_path, freeze_a):
    learn(start(freeze_a)).save_pretrained(str(tmp_path))
    assert trainable(lora_null_peft.load_trainable(llama(), tmp_path)) == (
        {"lora_B"} if freeze_a else {"lora_A", "lora_B"}
    )
    patched = lora_null.load_adapter(llama(), tmp_path, is_trainable=True)
    assert patched.lora_null_state.config.freeze_a == freeze_a
    assert patched.lora_null_state.energies


@MODES
def test_a_run_resumes_through_load_adapter(start, tmp_path, freeze_a):
    model = learn(start(freeze_a))
    model.save_pretrained(str(tmp_path))
    resumed = start(freeze_a)
    resumed.load_adapter(str(tmp_path), "default", is_trainable=True)
    assert trainable(resumed) == trainable(model)
    layers = lora_null_peft.lora_layers(model)
    for name, layer in lora_null_peft.lora_layers(resumed).items():
        got, want = ((one.lora_A["default"].weight, one.lora_B["default"].weight) for one in (layer, layers[name]))
        assert torch.equal(got[0], want[0])
        torch.testing.assert_close(got[1], want[1], rtol=0, atol=2e-7)


def test_a_copied_model_saves_the_same(start, tmp_path):
    model = learn(start(freeze_a=False))
    model.save_pretrained(str(tmp_path / "one"))
    copy.deepcopy(model).save_pretrained(str(tmp_path / "other"))
    one, other = (load_file(str(tmp_path / name / "adapter_model.safetensors")) for name in ("one", "other"))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_a_checkpoint_of_another_start_is_refused(start, llama, token_batches, tmp_path):
    learn(start(freeze_a=False)).save_pretrained(str(tmp_path))
    other = lora_null.calibrate(llama(), token_batches(seed=2), progress=False)
    model = start(freeze_a=False, covariances=other)
    with pytest.raises(ValueError, match="started from other factors"):
        model.load_adapter(str(tmp_path), "default", is_trainable=True)


def test_ranks_that_differ_and_half_precision(start, llama, tmp_path):
    patterns = {"rank_pattern": {"q_proj": 2}, "alpha_pattern": {"q_proj": 8}}
    model = learn(start(freeze_a=False, **patterns))
    model.save_pretrained(str(tmp_path / "ranks"))
    want, base = logits(model), logits(llama())
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "ranks"))
    assert (logits(loaded) - want).norm() <= 1e-5 * (want - base).norm()
    again = start(freeze_a=False, **patterns)
    again.load_adapter(str(tmp_path / "ranks"), "default")
    assert (logits(again) - want).norm() <= 1e-5 * (want - base).norm()

    model = learn(start(freeze_a=False)).to(torch.bfloat16)
    model.save_pretrained(str(tmp_path / "bf16"))
    tensors = load_file(str(tmp_path / "bf16" / "adapter_model.safetensors"))
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    again = start(freeze_a=False).to(torch.bfloat16)
    again.load_adapter(str(tmp_path / "bf16"), "default")
    layers = lora_null_peft.lora_layers(model)
    for name, layer in lora_null_peft.lora_layers(again).items():
        got, want = (one.lora_B["default"].weight.float() for one in (layer, layers[name]))
        assert (got - want).norm() <= 1e-2 * want.norm()


@pytest.mark.parametrize("train", ["b", "b_in_basis", "ab"])
def test_a_frozen_copy_of_the_start_is_the_reference(start, llama, tmp_path, train):
    """What TRL's DPOTrainer does: a second adapter of the same configuration, saved in a folder of its own."""
    model = start(train=train)
    free = trainable(model)
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            model.get_parameter(name.replace(".default.", ".ref.")).data.copy_(parameter.data)
    learn(model)
    base = logits(llama())
    model.set_adapter("ref")
    assert (logits(model) - base).norm() <= 1e-6 * base.norm()
    model.set_adapter("default")
    assert trainable(model) == free
    want = logits(model)
    model.save_pretrained(str(tmp_path))
    for folder, outputs in ((tmp_path / "ref", base), (tmp_path, want)):
        loaded = PeftModel.from_pretrained(llama(), str(folder))
        assert (logits(loaded) - outputs).norm() <= 1e-6 * base.norm()


def test_pefts_conversion_is_refused_instead_of_converting_twice(start, tmp_path):
    model = start(freeze_a=False)
    model.save_pretrained(str(tmp_path / "start"))
    with pytest.raises(ValueError, match="is not needed here"):
        learn(model).save_pretrained(
            str(tmp_path / "end"), path_initial_model_for_weight_conversion=str(tmp_path / "start")
        )


@pytest.mark.parametrize(
    "rank", [None, R, R - 2, R + 3], ids=["by hand", "swapped", "swapped smaller", "swapped larger"]
)
def test_a_recipe_that_the_configuration_does_not_know_is_written(start, llama, tmp_path, rank):
    model = learn(start(rank_pattern={"q_proj": 5}))
    if rank is None:
        for layer in lora_null_peft.lora_layers(model).values():
            layer.set_scale("default", 3.0)
    else:
        from peft.utils.hotswap import hotswap_adapter

        learn(start(r=rank, lora_alpha=5 * R), seed=1).save_pretrained(str(tmp_path / "other"))
        hotswap_adapter(model, str(tmp_path / "other"), "default")
    want, base = logits(model), logits(llama())
    model.save_pretrained(str(tmp_path / "saved"))
    assert not model.peft_config["default"].alpha_pattern
    assert model.peft_config["default"].rank_pattern == {"q_proj": 5}
    for loaded in (
        PeftModel.from_pretrained(llama(), str(tmp_path / "saved")),
        lora_null.load_adapter(llama(), tmp_path / "saved"),
        lora_null_peft.load_trainable(llama(), tmp_path / "saved"),
    ):
        assert (logits(loaded) - want).norm() <= 1e-5 * (want - base).norm()


def test_adapters_are_never_pickled(start, tmp_path):
    with pytest.raises(ValueError, match=r"safe_serialization is False, .* expected safetensors"):
        start().save_pretrained(str(tmp_path / "saved"), safe_serialization=False)
    assert not (tmp_path / "saved").exists()


class TestStateDicts:
    """What PEFT's free functions and torch's own take out of a model and put into another."""

    @pytest.mark.parametrize("train", ["b", "b_in_basis", "ab"])
    @pytest.mark.parametrize("how", ["peft", "transformers"])
    def test_pefts_function_returns_an_adapter_for_the_untouched_base(self, llama, calibrated, train, how):
        config = LoraConfig(r=R, lora_alpha=2 * R, target_modules=["q_proj", "up_proj"])

        def made(config=config):
            model = llama()
            if how == "peft":
                return get_peft_model(model, config)
            model.add_adapter(config)
            return model

        def started():
            energy = {"energy": 0.9} if train == "b_in_basis" else {}
            return lora_null_peft.initialize_lora_null_weights(
                made(), calibrated[1], train=train, progress=False, **energy
            )

        model = learn(started())
        want, base = logits(model), logits(llama())
        adapter = {key: tensor.clone() for key, tensor in get_peft_model_state_dict(model).items()}
        plain = made(
            LoraConfig(r=2 * R, lora_alpha=2 * R, target_modules=["q_proj", "up_proj"]) if train == "ab" else config
        )
        found = set_peft_model_state_dict(plain, adapter)
        assert not found.unexpected_keys
        assert (logits(plain) - want).norm() <= 1e-5 * (want - base).norm()
        # as a reminder of the best step so far
        learn(model, seed=3)
        set_peft_model_state_dict(model, adapter)
        assert (logits(model) - want).norm() <= 1e-5 * (want - base).norm()
        assert model.state_dict().keys() == started().state_dict().keys()

    def test_a_whole_model_of_another_scaling(self, start, llama, tmp_path):
        model = learn(start(lora_alpha=3))
        torch.save(model.state_dict(), tmp_path / "model.pt")
        other = start(lora_alpha=5 * R)
        other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
        other.save_pretrained(str(tmp_path / "adapter"))
        for loaded in (other, PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))):
            assert (logits(loaded) - logits(model)).norm() <= 1e-5 * (logits(model) - logits(llama())).norm()

    def test_a_whole_model_of_another_start_is_refused(self, start, llama, token_batches):
        covariances = lora_null.calibrate(llama(), token_batches(seed=2), progress=False)
        model = start(freeze_a=False)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for other in ({"covariances": covariances}, {"lora_alpha": R}):
            with pytest.raises(ValueError, match="started from other factors"):
                model.load_state_dict(learn(start(freeze_a=False, **other)).state_dict())
        model.load_state_dict(before)

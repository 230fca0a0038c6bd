"""PEFT's options in our configuration: which layers, of which rank and scaling, in every way out and back."""

import json

import pytest
import torch
from adapter_tools import R, ids, learn, trained
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file

import lora_null
from lora_null import LoraNullConfig
from lora_null.adapters import export_adapter
from lora_null.adapters.layer import adapter_layers, disable_adapters

PATTERNS = {
    "rank": {"rank_pattern": {"q_proj": 2, r"layers\.1\..*down_proj": 9, "v_proj|k_proj": 3}},
    "alpha": {"lora_alpha": 5, "alpha_pattern": {r"1\.self_attn\.o_proj": 11, "proj": 2.5, "model": 1}},
    "rslora": {"lora_alpha": 4, "use_rslora": True, "rank_pattern": {"up_proj": 8}, "alpha_pattern": {"down_proj": 3}},
}
CHOICES = {
    "excluded names": {"exclude_modules": ["q_proj", "0.mlp.up_proj"]},
    "excluded expression": {"exclude_modules": r".*layers\.1\..*"},
    "one layer": {"layers_to_transform": 1},
    "layers of a list": {"layers_to_transform": [0], "layers_pattern": "layers"},
    "another list": {"layers_to_transform": [0], "layers_pattern": ["blocks", "layers"], "exclude_modules": ["k_proj"]},
    "saved": {"modules_to_save": ["mlp"]},
}
NAMES = ["q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj", "model.layers.1.mlp.gate_proj"]


def peft_layers(model, **options):
    """Name to rank and scaling, as PEFT itself reads the options."""
    from peft.tuners import lora

    peft_model = get_peft_model(model, LoraConfig(**options)).get_base_model()
    return {
        name: (module.r["default"], module.scaling["default"])
        for name, module in peft_model.named_modules()
        if isinstance(module, lora.LoraLayer)
    }


@pytest.mark.parametrize("options", [*PATTERNS.values(), *CHOICES.values()], ids=[*PATTERNS, *CHOICES])
def test_layers_ranks_and_scaling_are_those_of_peft(llama, options):
    options = {"r": R, "lora_alpha": 4, "target_modules": NAMES, **options}
    config = LoraNullConfig(**options)
    chosen = lora_null.models.targets.target_linears(llama(), config)
    ours = {name: (config.rank_of(name), config.scaling_of(name)) for name in chosen}
    theirs = peft_layers(llama(), **options)
    assert ours == theirs and 0 < len(ours) <= 13


def test_all_linear_can_be_narrowed(llama):
    names = set(lora_null.models.targets.target_linears(llama()))
    for options, expected in (
        ({"layers_to_transform": [1]}, {name for name in names if ".1." in name}),
        ({"exclude_modules": ["mlp.up_proj"]}, {name for name in names if not name.endswith("up_proj")}),
        ({"modules_to_save": ["self_attn"]}, {name for name in names if "self_attn" not in name}),
    ):
        assert set(lora_null.models.targets.target_linears(llama(), LoraNullConfig(**options))) == expected
    with pytest.raises(ValueError, match="leaves none of the 14 layers"):
        lora_null.models.targets.target_linears(llama(), LoraNullConfig(layers_to_transform=[7]))


def test_an_exclusion_of_nothing_is_said(llama, caplog):
    lora_null.models.targets.target_linears(llama(), LoraNullConfig(exclude_modules=["q_prj"]))
    assert "q_prj" in caplog.text and "excludes no layer" in caplog.text


@pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen_a", "trained_a"])
@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_patterns_survive_every_way(llama, token_batches, tmp_path, options, freeze_a):
    model = trained(llama, token_batches, freeze_a=freeze_a, lora_dropout=0.25, **options)
    expected = model(ids()).logits
    lora_null.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    export_adapter(tmp_path / "checkpoint", tmp_path / "exported")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["lora_alpha"] == config["r"] and not config["rank_pattern"] and not config["use_rslora"]
    loaded = lora_null.load_adapter(llama(), tmp_path / "adapter")
    lora_null.save_adapter(loaded, tmp_path / "again")
    resumed = lora_null.load_adapter(llama(), tmp_path / "again", is_trainable=True)
    readers = {
        "peft": PeftModel.from_pretrained(llama(), tmp_path / "adapter"),
        "exported": PeftModel.from_pretrained(llama(), tmp_path / "exported"),
        "loaded": loaded,
        "resumed": resumed,
    }
    for name, reader in readers.items():
        assert (reader(ids()).logits - expected).norm() <= 1e-5 * expected.norm(), name
    for (name, layer), after in zip(
        adapter_layers(model).items(), adapter_layers(resumed.train()).values(), strict=True
    ):
        assert (after.r, after.scaling, after.lora_dropout) == (layer.r, layer.scaling, 0.25), name
        for part in ("lora_A", "lora_B"):
            before, now = getattr(layer, part).weight, getattr(after, part).weight
            assert now.requires_grad is before.requires_grad
            torch.testing.assert_close(now, before, rtol=1e-5, atol=1e-6)
    again, first = (load_file(str(tmp_path / part / "adapter_model.safetensors")) for part in ("again", "adapter"))
    assert all(torch.equal(again[key], first[key]) for key in first if "lora_A" in key)
    lora_null.merge(resumed.eval())
    assert (resumed(ids()).logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("option", [{"layers_to_transform": [1]}, {"exclude_modules": ["layers.0.self_attn.q_proj"]}])
def test_what_narrows_the_choice_of_peft_narrows_that_of_the_export(llama, tmp_path, option):
    """Readers make an adapter of zeros, which then trains, for every layer that target_modules selects."""
    config = LoraConfig(r=R, target_modules=["q_proj"], init_lora_weights=False, **option)
    get_peft_model(llama(), config).save_pretrained(tmp_path / "theirs")
    export_adapter(tmp_path / "theirs", tmp_path / "exported")
    made = PeftModel.from_pretrained(llama(), tmp_path / "exported").state_dict()
    adapted = {key.split(".lora_")[0] for key in made if "lora_" in key}
    assert adapted == {"base_model.model.model.layers.1.self_attn.q_proj"}


@pytest.mark.parametrize("options", PATTERNS.values(), ids=PATTERNS)
def test_adapters_with_patterns_of_peft_are_read(llama, tmp_path, options):
    torch.manual_seed(0)
    config = LoraConfig(r=R, target_modules=NAMES, init_lora_weights=False, **options)
    peft_model = get_peft_model(llama(), config).eval()
    peft_model.save_pretrained(tmp_path / "theirs")
    expected = peft_model(ids()).logits
    export_adapter(tmp_path / "theirs", tmp_path / "uniform")
    resumed = lora_null.load_adapter(llama(), tmp_path / "theirs", is_trainable=True)
    for (name, layer), theirs in zip(
        adapter_layers(resumed).items(),
        peft_layers(llama(), r=R, target_modules=NAMES, **options).values(),
        strict=True,
    ):
        assert (layer.r, layer.scaling) == theirs, name
    for model in (resumed, PeftModel.from_pretrained(llama(), tmp_path / "uniform")):
        assert (model(ids()).logits - expected).norm() <= 1e-5 * expected.norm()


def test_what_was_changed_by_hand_is_saved(llama, token_batches, tmp_path):
    """Scaling set on one layer, and A set free: training goes on with them."""
    model = trained(llama, token_batches, train="b")
    first = next(iter(adapter_layers(model).values()))
    first.scaling, first.lora_A.weight.requires_grad = 3.0, True
    expected = model(ids()).logits
    lora_null.save_adapter(model, tmp_path / "adapter")
    resumed = lora_null.load_adapter(llama(), tmp_path / "adapter", is_trainable=True)
    assert [layer.scaling for layer in adapter_layers(resumed).values()] == [3.0] + [1.0] * 13
    assert all(layer.lora_A.weight.requires_grad for layer in adapter_layers(resumed).values())
    assert (resumed(ids()).logits - expected).norm() <= 1e-5 * expected.norm()


def test_a_scaling_set_by_hand_on_a_shifted_base_is_that_of_the_product_alone(llama, token_batches, tmp_path):
    """The base stays shifted by the one attached: on disk, in a model loaded again and without the adapter."""
    model = trained(llama, token_batches, freeze_a=False, lora_alpha=2 * R)
    for layer, scaling in zip(adapter_layers(model).values(), (3.0, 0.5, 2.0), strict=False):
        layer.scaling = scaling
    expected = model(ids()).logits
    with disable_adapters(model):
        torch.testing.assert_close(model(ids()).logits, llama()(ids()).logits, rtol=1e-4, atol=1e-5)
    lora_null.save_adapter(model, tmp_path / "adapter")
    resumed = lora_null.load_adapter(llama(), tmp_path / "adapter", is_trainable=True)
    assert [layer.scaling for layer in adapter_layers(resumed).values()] == [3.0, 0.5] + [2.0] * 12
    for one, other in zip(adapter_layers(model).values(), adapter_layers(resumed).values(), strict=True):
        torch.testing.assert_close(other.lora_B.weight, one.lora_B.weight, rtol=1e-4, atol=1e-5)
    plain = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    for other in (resumed, plain, lora_null.merge(model)):
        assert (other(ids()).logits - expected).norm() <= 1e-5 * expected.norm()


def test_a_checkpoint_with_a_scaling_set_by_hand_is_refused(llama, token_batches, tmp_path):
    from transformers import Trainer, TrainingArguments

    model = trained(llama, token_batches, train="b")
    trainer = Trainer(model, TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[]))
    layer = adapter_layers(model)["model.layers.0.self_attn.q_proj"]
    layer.scaling = 3.0
    with pytest.raises(ValueError, match=r"q_proj: scaling is 3, set by hand, .* attached with 1; expected the same"):
        trainer.save_model(str(tmp_path / "checkpoint"))
    lora_null.save_adapter(model, tmp_path / "adapter")
    with torch.no_grad():
        wanted = model(ids()).logits
        again = lora_null.load_adapter(llama(), tmp_path / "adapter", is_trainable=True)
        torch.testing.assert_close(again(ids()).logits, wanted)
    trainer = Trainer(again, TrainingArguments(str(tmp_path / "run"), use_cpu=True, report_to=[]))
    trainer.save_model(str(tmp_path / "checkpoint"))
    export_adapter(tmp_path / "checkpoint", tmp_path / "exported")
    with torch.no_grad():
        loaded = lora_null.load_adapter(llama(), tmp_path / "exported")
        torch.testing.assert_close(loaded(ids()).logits, wanted)


@pytest.mark.parametrize("train", ["b", "ab"])
def test_a_state_dict_of_another_scaling(llama, calibrated, tmp_path, train):
    def made(alpha):
        config = LoraNullConfig(r=4, lora_alpha=alpha, train=train)
        return lora_null.initialize(llama(), calibrated[1], config, progress=False)

    model, other = learn(made(2)), made(12)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    other.load_state_dict(torch.load(tmp_path / "model.pt", weights_only=True))
    with torch.no_grad():
        torch.testing.assert_close(other(ids()).logits, model(ids()).logits, rtol=1e-5, atol=1e-6)

"""Random combinations on PEFT's route: what was trained comes back from the file, or saving it was refused."""

import random

import pytest
import torch
from adapter_tools import learn
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from tiny_models import make_llama

import lora_null
from lora_null import LoraNullConfig
from lora_null import peft as lora_null_peft
from lora_null.adapters import export_adapter

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "attention_bias": True,
}  # fmt: skip
# What a run may set in PEFT's configuration, one of each line.
OPTIONS = (
    [{"use_rslora": True}, {"lora_dropout": 0.25}],
    [{"alpha_pattern": {"q_proj": 9}}, {"rank_pattern": {"layers.1.mlp.up_proj": 2}}, {"alpha_pattern": {"v_proj": 1}}],
    [{"lora_bias": True}, {"bias": "lora_only"}, {"bias": "all"}],
    [{"trainable_token_indices": [3, 5]}, {"modules_to_save": ["lm_head"]}, {"modules_to_save": ["embed_tokens"]}],
    [{"layers_to_transform": [1]}, {"exclude_modules": ["k_proj"]}],
)
TARGETS = (["q_proj", "up_proj"], ["q_proj", "k_proj", "v_proj", "down_proj"], ["q_proj", "up_proj", "embed_tokens"])
IDS = torch.arange(18).view(2, 9) % 40


def base(dtype):
    return make_llama(dtype, **SIZES)


@pytest.fixture(scope="module")
def covariances():
    draw = torch.Generator().manual_seed(1)
    tokens = [torch.randint(40, (4, 16), generator=draw) for _ in range(4)]
    return {
        dtype: lora_null.calibrate(base(dtype), tokens, progress=False)
        for dtype in (torch.float32, torch.bfloat16, torch.float16)
    }


def drawn(seed):
    """Draw one run: how the model is made, trained, saved and read."""
    draw = random.Random(seed)
    config = {"r": 4, "lora_alpha": draw.choice((4, 6, 10)), "target_modules": draw.choice(TARGETS)}
    for line in draw.sample(OPTIONS, draw.randint(0, 3)):
        config |= draw.choice(line)
    if "embed_tokens" in config["target_modules"]:
        # PEFT does not combine these with LoRA on embeddings.
        config = {
            k: v for k, v in config.items() if k not in ("lora_bias", "trainable_token_indices", "modules_to_save")
        }
        config.pop("layers_to_transform", None)
    made = draw.choice(("peft", "peft", "peft", "added", "injected", "own"))
    if made == "own":
        # Ours has no place for these.
        beyond = ("lora_bias", "bias", "trainable_token_indices")
        config = {key: value for key, value in config.items() if key not in beyond}
        config["target_modules"] = [name for name in config["target_modules"] if name != "embed_tokens"]
    return {
        "config": config,
        "made": made,
        "train": draw.choice(("b", "b_in_basis", "ab")),
        "dtype": draw.choice((torch.float32,) * 6 + (torch.bfloat16, torch.float16)),
        "fused": draw.random() < 0.3,
        "beside": draw.choice((None, None, None, None, "other", "alike", "norms")),
        "saved": draw.choice(("own", "save_adapter")),
        "read": draw.choice(("peft", "merged", "exported", "plain", "trainable", "resumed", "transformers")),
    }


def started(run, covariances):
    model, covariances = base(run["dtype"]), covariances[run["dtype"]]
    options = {"train": run["train"], **({"energy": 0.9} if run["train"] == "b_in_basis" else {})}
    if run["made"] == "own":
        return lora_null.initialize(model, covariances, LoraNullConfig(**run["config"], **options), progress=False)
    config = LoraConfig(**run["config"])
    if run["made"] == "peft":
        model = get_peft_model(model, config)
    elif run["made"] == "added":
        model.add_adapter(config)
    else:
        model = inject_adapter_in_model(config, model)
    lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False, **options)
    if run["fused"]:
        lora_null_peft.use_fused_kernels(model)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits.float()


def save(run, model, folder):
    if run["made"] == "own":
        lora_null.save_adapter(model, folder)
    elif run["saved"] == "save_adapter" or run["made"] == "injected":
        lora_null_peft.save_adapter(model, folder)
    else:
        model.save_pretrained(str(folder))


def read(run, covariances, folder):
    model, own = base(run["dtype"]), covariances[run["dtype"]]
    if run["read"] == "plain":
        return lora_null.load_adapter(model, folder)
    if run["read"] == "trainable" and run["made"] == "own":
        return lora_null.load_adapter(model, folder, is_trainable=True, covariances=own)
    if run["read"] == "trainable":
        return lora_null_peft.load_trainable(model, folder, covariances=own)
    if run["read"] == "transformers":
        model.load_adapter(str(folder))
        return model
    if run["read"] == "resumed" and run["made"] == "peft":
        resumed = started(run, covariances)
        resumed.load_adapter(str(folder), "default", is_trainable=True)
        return resumed
    if run["read"] == "exported":
        folder = folder.with_name("exported")
        export_adapter(folder.with_name("adapter"), folder)
    loaded = PeftModel.from_pretrained(model, str(folder))
    # PEFT does not merge biases where the layer has none.
    merges = run["read"] == "merged" and "lora_bias" not in run["config"]
    return loaded.merge_and_unload() if merges else loaded


@pytest.mark.parametrize("seed", range(360))
def test_what_was_trained_comes_back(seed, covariances, tmp_path):
    run = drawn(seed)
    model, folder = started(run, covariances), tmp_path / "adapter"
    if run["beside"] in ("other", "alike") and run["made"] == "peft":
        # PEFT allows one adapter with biases.
        second = {"bias": "none"} if run["beside"] == "alike" else {"bias": "none", "r": 3, "lora_alpha": 5}
        model.add_adapter("second", LoraConfig(**run["config"] | second))
        model.set_adapter("default")
    if run["beside"] == "norms":
        model.get_submodule("base_model.model.model.norm" if run["made"] == "peft" else "model.norm").requires_grad_(
            True
        )
    learn(model)
    want, plain = logits(model), logits(base(run["dtype"]))
    if run["beside"] == "norms" and run["made"] != "own":
        with pytest.raises(ValueError, match=r"norm\.weight"):
            save(run, model, folder)
        assert not folder.exists() or not any(folder.iterdir())
        return
    save(run, model, folder)
    assert torch.equal(logits(model), want), "saving changed the model"
    beyond = {"lora_bias", "trainable_token_indices"} & set(run["config"]) or run["config"].get("bias") == "all"
    beyond = beyond or "embed_tokens" in run["config"]["target_modules"]
    try:
        loaded = read(run, covariances, folder)
    except ValueError as refusal:
        assert run["read"] in ("plain", "exported") and beyond, refusal
        assert "plain LoRA" in str(refusal) or "holds " in str(refusal), refusal
        return
    # Of a base of 16 bits, shifted or merged and rounded, some bits; the adapters are fp32.
    bound = 1e-5 if run["dtype"] == torch.float32 else 0.2 if run["read"] == "merged" else 0.1
    assert (logits(loaded) - want).norm() <= bound * (want - plain).norm(), run
    if run["read"] in ("trainable", "resumed") and run["made"] == "peft":
        layers = lora_null_peft.lora_layers(loaded)
        for name, layer in lora_null_peft.lora_layers(model).items():
            assert layers[name].scaling["default"] == pytest.approx(layer.scaling["default"], rel=1e-12)
            assert str(layers[name].lora_dropout["default"]) == str(layer.lora_dropout["default"])
            assert layers[name].lora_A["default"].weight.requires_grad == (run["train"] != "b")

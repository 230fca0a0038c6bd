"""Random combinations of mode, options, dtypes, ways to save and readers: the trained logits, or a refusal."""

import copy
import random
from functools import cache

import pytest
import torch
from tiny_models import make_llama

import lora_null
from lora_null import LoraNullConfig
from lora_null.adapters import export_adapter
from lora_null.adapters.layer import adapter_layers

COMBINATIONS = 160
IDS = torch.randint(97, (2, 12), generator=torch.Generator().manual_seed(3))
# Trained by hand, besides what the configuration trains; the last has no place in an adapter's file.
BY_HAND = {
    "nothing": (),
    "norms": ("layernorm.weight", "model.norm.weight"),
    "biases": ("q_proj.bias", "v_proj.bias"),
    "embeddings": ("embed_tokens.weight",),
    "an adapted weight": ("layers.0.self_attn.q_proj.weight",),
}
SIZES = {"attention_bias": True}


def draw(number):
    """One combination."""
    choose = random.Random(number)
    options = {
        "r": choose.choice([3, 6]),
        "lora_alpha": choose.choice([None, 5, 12.5]),
        "train": choose.choice(["b", "b_in_basis", "ab"]),
        "lora_dropout": choose.choice([0.0, 0.2]),
        "use_rslora": choose.random() < 0.4,
        "rank_pattern": choose.choice([None, {"q_proj": 2}, {r"layers\.1\..*": 8, "q_proj": 5}]),
        "alpha_pattern": choose.choice([None, {"v_proj": 3}, {r"0\.self_attn\.q_proj": 7, "proj": 2.5}]),
        "exclude_modules": choose.choice([None, ["down_proj"], r".*\.k_proj"]),
        "layers_to_transform": choose.choice([None, None, [0]]),
        "target_modules": choose.choice(["all-linear", ["q_proj", "v_proj", "up_proj"]]),
        "modules_to_save": choose.choice([None, None, ["lm_head"], ["model.norm", "embed_tokens"]]),
    }
    if options["train"] == "b_in_basis":
        options["energy"] = 0.8
    return {
        "options": options,
        "tied": choose.random() < 0.3,
        "dtype": choose.choice([torch.float32, torch.float32, torch.float64, torch.bfloat16, torch.float16]),
        "adapter_dtype": choose.choice([torch.float32, torch.float32, torch.bfloat16]),
        "by_hand": choose.choice([name for name in BY_HAND for _ in range(1 if name.startswith("an ") else 3)]),
        "way": choose.choice(["saved", "saved in bf16", "saved again", "exported", "exported from a checkpoint"]),
        "reader": choose.choice(["loaded", "resumed", "merged", "peft", "peft merged"]),
    }


@cache
def covariances(tied):
    batches = [torch.randint(97, (4, 24), generator=torch.Generator().manual_seed(seed)) for seed in range(4)]
    return lora_null.calibrate(make_llama(tie_word_embeddings=tied, **SIZES), batches, progress=False)


def base(dtype, tied):
    return make_llama(dtype, tie_word_embeddings=tied, **SIZES)


@torch.no_grad()
def learn(model, endings):
    torch.manual_seed(1)
    for name, parameter in model.named_parameters():
        if name.endswith(endings) and endings:
            parameter.requires_grad_(True)
        if parameter.requires_grad:
            parameter.add_(0.1 * torch.randn_like(parameter))


def save(model, way, folder, again):
    if way == "exported from a checkpoint":
        model.save_pretrained(folder / "checkpoint")
        export_adapter(folder / "checkpoint", folder / "adapter")
        return
    dtype = torch.bfloat16 if way == "saved in bf16" else model.dtype if model.dtype is torch.float64 else None
    first = folder / ("first" if way in ("saved again", "exported") else "adapter")
    lora_null.save_adapter(model, first, dtype=dtype)
    if way == "saved again":
        lora_null.save_adapter(lora_null.load_adapter(again, first), folder / "adapter")
    elif way == "exported":
        export_adapter(first, folder / "adapter")


def read(reader, model, folder, of_the_run, same):
    from peft import PeftModel

    if reader.startswith("peft"):
        model = PeftModel.from_pretrained(model, folder / "adapter").eval()
        return model.merge_and_unload() if reader == "peft merged" else model
    more = {"is_trainable": True, "covariances": of_the_run, **same} if reader == "resumed" else {}
    model = lora_null.load_adapter(model, folder / "adapter", **more).eval()
    return lora_null.merge(model) if reader == "merged" else model


@pytest.mark.parametrize("number", range(COMBINATIONS))
@pytest.mark.filterwarnings("ignore::UserWarning", "ignore::RuntimeWarning", "ignore::FutureWarning")
def test_every_way_gives_the_trained_logits_or_a_refusal(tmp_path, number):
    case = draw(number)
    config, dtype, tied = LoraNullConfig(**case["options"]), case["dtype"], case["tied"]
    model = base(dtype, tied)
    # Of fp32 weights, which fp16 rounds.
    same = {"verify_base": dtype is not torch.float16}
    lora_null.initialize(model, covariances(tied), config, adapter_dtype=case["adapter_dtype"], progress=False, **same)
    learn(model, BY_HAND[case["by_hand"]])
    if case["by_hand"] == "an adapted weight":
        # of a base that was shifted the cause may also be another run's state dict
        words = r"q_proj\.weight requires a gradient or has changed|weight of \S+q_proj is another than"
        with pytest.raises(ValueError, match=words):
            save(model, case["way"], tmp_path, base(dtype, tied))
        assert not (tmp_path / "adapter").exists()
        return
    with torch.no_grad():
        own, pretrained = model(IDS).logits.double(), base(dtype, tied)(IDS).logits.double()
        truth = copy.deepcopy(model).double()(IDS).logits
        save(model, case["way"], tmp_path, base(dtype, tied))
        loaded = read(case["reader"], base(dtype, tied), tmp_path, covariances(tied), same)
        found = loaded(IDS).logits.double()
    halved = torch.bfloat16 in (dtype, case["adapter_dtype"]) or dtype is torch.float16 or case["way"].endswith("bf16")
    tolerance = 2 * (own - truth).norm() + (1.5e-2 if halved else 1e-5) * truth.norm()
    assert (found - truth).norm() <= tolerance, case
    # What is lost would be seen.
    assert (pretrained - truth).norm() > 2 * tolerance, case
    if case["reader"] == "resumed":
        for (name, before), after in zip(adapter_layers(model).items(), adapter_layers(loaded).values(), strict=True):
            assert (after.r, after.scaling, after.lora_dropout) == (before.r, before.scaling, before.lora_dropout), name
            assert after.lora_A.weight.requires_grad is before.lora_A.weight.requires_grad
        # Besides the factors whole modules train, and the biases of all adapted layers.
        trained, now = (
            {name.rpartition(".")[0] for name, p in m.named_parameters() if p.requires_grad} for m in (model, loaded)
        )
        assert now - trained <= set(adapter_layers(loaded)) and trained <= now

"""Models of every class, and of every place that transformers loads from, go through the commands."""

import shutil

import pytest
import torch
import transformers

import lora_null

TEXT = {
    "vocab_size": 97,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
VISION = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
SMALL = {"vocab_size": 97, "d_model": 32, "pad_token_id": 0, "decoder_start_token_id": 0}
MODELS = {
    "T5ForConditionalGeneration": lambda: transformers.T5Config(
        **SMALL, d_ff=48, d_kv=8, num_layers=1, num_decoder_layers=1, num_heads=4
    ),
    "LlavaForConditionalGeneration": lambda: transformers.LlavaConfig(
        text_config=transformers.LlamaConfig(**TEXT),
        vision_config=transformers.CLIPVisionConfig(**VISION),
        image_token_index=96,
    ),
    "BertForSequenceClassification": lambda: transformers.BertConfig(
        vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=1, num_attention_heads=4
    ),
}
REMOTE = """
from transformers import LlamaConfig, LlamaForCausalLM

class OwnConfig(LlamaConfig):
    model_type = "own"

class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig
"""


def through(run, folder, model, *flags):
    """Calibrate, initialise and merge; the merged model is the same, since B starts at zero."""
    for command in (
        ("calibrate", model, "--data", folder / "text.txt", "--output", folder / "cov", "--max-tokens", 2000),
        ("init", model, folder / "cov", folder / "adapter", "--r", 4),
        ("merge", model, folder / "adapter", folder / "merged"),
    ):
        code, _, err = run(*command, *flags)
        assert code == 0, err


def test_a_merged_model_prepares_images_as_its_base(folder, tokenizer, run):
    torch.manual_seed(0)
    config = MODELS["LlavaForConditionalGeneration"]()
    transformers.LlavaForConditionalGeneration(config).save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    (folder / "other" / "preprocessor_config.json").write_text('{"image_processor_type": "CLIPImageProcessor"}')
    through(run, folder, folder / "other")
    wanted, got = (folder / name / "preprocessor_config.json" for name in ("other", "merged"))
    assert got.read_text() == wanted.read_text()
    code, _, err = run("merge", folder / "other", folder / "adapter", folder / "merged", "--overwrite")
    assert code == 0, err


@pytest.mark.parametrize("name", MODELS)
def test_the_class_is_the_one_that_was_saved(folder, tokenizer, run, name):
    kind = getattr(transformers, name)
    torch.manual_seed(0)
    model = kind(MODELS[name]())
    model.save_pretrained(folder / "other")
    tokenizer.save_pretrained(folder / "other")
    through(run, folder, folder / "other")
    covariances = lora_null.Covariances.load(folder / "cov")
    assert all(count > 0 for count in covariances.tokens.values()) and len(covariances)
    merged, loading = kind.from_pretrained(folder / "merged", output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    for key, value in kind.from_pretrained(folder / "other").state_dict().items():
        assert torch.equal(merged.state_dict()[key], value), key


def test_code_that_comes_with_a_model_runs_on_request_only(folder, run, monkeypatch, tmp_path):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "model" / "modeling_own.py").write_text(REMOTE)
    config = transformers.LlamaConfig.from_pretrained(folder / "model").to_dict()
    config.update(
        model_type="own",
        architectures=["OwnForCausalLM"],
        auto_map={"AutoConfig": "modeling_own.OwnConfig", "AutoModelForCausalLM": "modeling_own.OwnForCausalLM"},
    )
    transformers.PretrainedConfig(**config).save_pretrained(folder / "scratch")
    text = (folder / "scratch" / "config.json").read_text().replace('"model_type": ""', '"model_type": "own"')
    (folder / "model" / "config.json").write_text(text)
    calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "cov")
    code, _, err = run(*calibrate)
    assert code == 2 and "trust_remote_code" in err and not (folder / "cov").exists()
    through(run, folder, folder / "model", "--trust-remote-code")


def test_a_revision_is_the_one_that_is_loaded(folder, run, monkeypatch, llama, tokenizer):
    """A cache of the hub with two commits; the hub itself is not asked."""
    cache = folder / "hub" / "models--own--tiny"
    for commit, branch, seed in (("a" * 40, "main", 0), ("b" * 40, "v2", 1)):
        llama(seed=seed).save_pretrained(cache / "snapshots" / commit)
        tokenizer.save_pretrained(cache / "snapshots" / commit)
        (cache / "refs").mkdir(exist_ok=True)
        (cache / "refs" / branch).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    for flags, seed in (((), 0), (("--revision", "v2"), 1)):
        through(run, folder, "own/tiny", *flags)
        merged = transformers.AutoModelForCausalLM.from_pretrained(folder / "merged")
        assert torch.equal(merged.lm_head.weight, llama(seed=seed).lm_head.weight)
        for output in ("adapter", "merged"):
            shutil.rmtree(folder / output)
        (folder / "cov").unlink()
    code, _, err = run("init", "own/tiny", folder / "text.txt", folder / "adapter", "--revision", "v3")
    assert code == 2 and len(err) < 1000


def test_a_map_of_devices(folder, run):
    pytest.importorskip("accelerate")
    through(run, folder, folder / "model", "--device-map", "cpu")
    code, _, err = run(
        "merge", folder / "model", folder / "adapter", folder / "x", "--device-map", "auto", "--device", 0
    )
    assert code == 2 and "expected one of them" in err


def test_a_quantised_base_is_calibrated_and_initialised(folder, run):
    pytest.importorskip("bitsandbytes")
    options = transformers.BitsAndBytesConfig(load_in_4bit=True)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder / "model", quantization_config=options)
    model.save_pretrained(folder / "small")
    for file in (folder / "model").glob("tokenizer*"):
        shutil.copy(file, folder / "small")
    calibrate = ("calibrate", folder / "small", "--data", folder / "text.txt", "--output", folder / "cov")
    for command in (calibrate, ("init", folder / "small", folder / "cov", folder / "adapter", "--r", 4)):
        code, _, err = run(*command, "--device", "cpu")
        assert code == 0, err
    code, _, err = run("merge", folder / "small", folder / "adapter", folder / "merged", "--device", "cpu")
    assert code == 2 and "is quantised" in err

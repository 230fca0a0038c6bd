"""The whole way on small random models of many kinds: calibrate, initialise, train, save, PEFT, merge."""

import json

import pytest
import torch
import transformers
from peft import PeftModel
from safetensors.torch import load_file

import lora_null
from lora_null.adapters.layer import adapter_layers
from lora_null.system import log

R = 4
WORDS = 97
ATTENTION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {
    **ATTENTION,
    "vocab_size": WORDS,
    "intermediate_size": 48,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
SHARED_EXPERT = {**EXPERTS, "shared_expert_intermediate_size": 16}
BOTH_SIDES = {
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "vocab_size": WORDS,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "decoder_start_token_id": 2,
}
IMAGES = {**ATTENTION, "intermediate_size": 48, "image_size": 16, "patch_size": 4}

# Weights are stored transposed (Conv1D).
GPT = {
    "vocab_size": WORDS,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "bos_token_id": 1,
    "eos_token_id": 2,
}

# class, configuration, its values, number of adapted layers
MODELS = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", GPT, 8),
    "openai_gpt": ("OpenAIGPTLMHeadModel", "OpenAIGPTConfig", GPT, 8),
    "imagegpt": ("ImageGPTForCausalImageModeling", "ImageGPTConfig", {**GPT, "vocab_size": WORDS + 1}, 8),
    "gpt2_classifier": ("GPT2ForSequenceClassification", "GPT2Config", {**GPT, "pad_token_id": 0, "num_labels": 2}, 8),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", DECODER, 14),  # biases
    "gemma3": ("Gemma3ForCausalLM", "Gemma3TextConfig", {**DECODER, "head_dim": 8}, 14),  # two kinds of attention
    "phi3": ("Phi3ForCausalLM", "Phi3Config", DECODER, 8),  # qkv_proj, gate_up_proj
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", DECODER, 8),
    "falcon": ("FalconForCausalLM", "FalconConfig", DECODER, 8),  # attention beside the MLP, tied head
    "opt": ("OPTForCausalLM", "OPTConfig", {**DECODER, "ffn_dim": 48, "word_embed_proj_dim": 16}, 14),
    "bloom": (
        "BloomForCausalLM",
        "BloomConfig",
        {"vocab_size": WORDS, "hidden_size": 32, "n_layer": 2, "n_head": 4, "pad_token_id": 0},
        8,
    ),
    # The MLP of the first layer and the shared experts have the names of experts, so PEFT would lose their adapters.
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        "DeepseekV3Config",
        {
            **DECODER,
            "num_key_value_heads": 4,
            "q_lora_rank": 16,
            "kv_lora_rank": 8,
            "qk_rope_head_dim": 4,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 16,
            "n_group": 1,
            "topk_group": 1,
            "first_k_dense_replace": 1,
        },
        10,
    ),
    # out_proj is refused by PEFT, dt_proj is never called.
    "mamba": (
        "MambaForCausalLM",
        "MambaConfig",
        {"vocab_size": WORDS, "hidden_size": 32, "state_size": 8, "num_hidden_layers": 2},
        4,
    ),
    # The gate of the shared expert has one output.
    "qwen2_moe": ("Qwen2MoeForCausalLM", "Qwen2MoeConfig", {**DECODER, **SHARED_EXPERT}, 16),
    "t5": (
        "T5ForConditionalGeneration",
        "T5Config",
        {
            "vocab_size": WORDS,
            "d_model": 32,
            "d_kv": 8,
            "d_ff": 48,
            "num_layers": 1,
            "num_heads": 4,
            "decoder_start_token_id": 0,
        },
        16,
    ),
    "whisper": (
        "WhisperForConditionalGeneration",
        "WhisperConfig",
        {**BOTH_SIDES, "num_mel_bins": 8, "max_source_positions": 8, "max_target_positions": 32},
        16,
    ),
    # Heads of classifiers are left alone.
    "bert": ("BertForSequenceClassification", "BertConfig", {**DECODER, "num_labels": 2}, 13),
    "llama": ("LlamaForSequenceClassification", "LlamaConfig", {**DECODER, "num_labels": 3}, 14),
    "vit": ("ViTForImageClassification", "ViTConfig", {**IMAGES, "num_labels": 10}, 12),
    "clip": (
        "CLIPModel",
        "CLIPConfig",
        {
            "text_config": {**DECODER, "projection_dim": 16},
            "vision_config": {**IMAGES, "projection_dim": 16},
            "projection_dim": 16,
        },
        26,
    ),
}


CLASSIFIERS = ("bert", "llama", "gpt2_classifier")


def make(kind):
    name, config, values, _ = MODELS[kind]
    torch.manual_seed(0)
    model = getattr(transformers, name)(getattr(transformers, config)(**values)).eval()
    # Random models say almost the same whatever they read.
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim == 2 else 1)
    return model.requires_grad_(False)


def batch(kind, seed):
    generator = torch.Generator().manual_seed(seed)
    ids, pixels = torch.randint(3, WORDS, (4, 16), generator=generator), torch.randn(4, 3, 16, 16, generator=generator)
    classes = torch.randint(2, (4,), generator=generator)
    if kind == "vit":
        return {"pixel_values": pixels, "labels": classes}
    if kind == "clip":
        return {"input_ids": ids, "pixel_values": pixels, "return_loss": True}
    if kind == "whisper":
        return {"input_features": torch.randn(4, 8, 16, generator=generator), "labels": ids}
    return {"input_ids": ids, "labels": classes if kind in CLASSIFIERS else ids}


def outputs(model, kind):
    result = model(**batch(kind, seed=99))
    return (result.logits_per_image if kind == "clip" else result.logits).detach()


def agree(found, expected, bound=2e-5):
    return (found - expected).norm() <= bound * expected.norm()


@pytest.mark.parametrize("kind", MODELS)
def test_the_whole_way(kind, tmp_path):
    covariances = lora_null.calibrate(make(kind), [batch(kind, seed) for seed in range(6)], progress=False)
    for freeze_a in (True, False):
        model = make(kind)
        before = outputs(model, kind)
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, freeze_a=freeze_a), progress=False)
        layers = adapter_layers(model)
        assert len(layers) == MODELS[kind][3]
        start = outputs(model, kind)
        assert torch.equal(start, before) if freeze_a else agree(start, before)
        for name, layer in layers.items():
            C = covariances[name].double()
            rank = min(R, layer.out_features)
            rows = torch.linalg.qr(layer.lora_A.weight.detach()[:rank].double().t()).Q
            seen = (rows * (C @ rows)).sum()
            assert seen <= torch.linalg.eigvalsh(C)[:R].sum() + 1e-12 * C.trace(), name
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=2e-2)
        for step in range(2):
            model(**batch(kind, step)).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        after = outputs(model, kind)
        assert not agree(after, before, 1e-3)
        folder = tmp_path / str(freeze_a)
        lora_null.save_adapter(model, folder)
        assert agree(outputs(lora_null.load_adapter(make(kind), folder), kind), after)
        assert agree(outputs(PeftModel.from_pretrained(make(kind), folder).eval(), kind), after)
        assert agree(outputs(lora_null.merge(model), kind), after)


def test_layers_that_peft_cannot_load_are_named(monkeypatch, caplog):
    monkeypatch.setattr(log, "_given", set())
    lora_null.calibrate(make("mamba"), [batch("mamba", 0)], progress=False)
    assert (
        "PEFT cannot load adapters on these layers of MambaForCausalLM: backbone.layers.*.mixer.out_proj. They get no"
        in caplog.text
    )
    assert "With all-linear they get no adapter" in caplog.text
    covariances = lora_null.calibrate(
        make("mamba"), [batch("mamba", 0)], lora_null.LoraNullConfig(target_modules=["out_proj"]), progress=False
    )
    assert len(covariances) == 2
    assert "They get one because target_modules names them" in caplog.text


def test_layers_that_calibration_never_called(caplog):
    covariances = lora_null.calibrate(make("mamba"), [batch("mamba", 0)], progress=False)
    names = [f"backbone.layers.{number}.mixer.dt_proj" for number in range(2)]
    assert json.loads(covariances.metadata["without_tokens"]) == names
    caplog.clear()
    lora_null.initialize(make("mamba"), covariances, lora_null.LoraNullConfig(r=R), progress=False)
    assert f"2 layers that calibration never called get no adapter: {', '.join(names)}" in caplog.text
    wish = lora_null.LoraNullConfig(r=R, target_modules=["dt_proj"])
    with pytest.raises(ValueError, match=r"no entry for 2 of 2 target layers.* or no token reached these layers"):
        lora_null.initialize(make("mamba"), covariances, wish, progress=False)


def test_a_trained_head_is_not_lost(tmp_path):
    model = make("llama")
    covariances = lora_null.calibrate(model, [batch("llama", 0)], progress=False)
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
    lora_null.save_adapter(model, tmp_path / "adapter")
    model.score.requires_grad_(True)
    lora_null.save_adapter(model, tmp_path / "trained", overwrite=True)
    for folder, carried in ((tmp_path / "adapter", False), (tmp_path / "trained", True)):
        assert ("base_model.model.score.weight" in load_file(folder / "adapter_model.safetensors")) is carried

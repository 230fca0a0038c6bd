"""Which layers get an adapter, and what is said of those that cannot."""

import pytest
import torch
from torch import nn

import lora_null
from lora_null import LoraNullConfig
from lora_null.models.targets import survey, target_linears
from lora_null.system import log


def moe(kind):
    import transformers

    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 64}
    torch.manual_seed(0)
    if kind == "mixtral":
        return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=3)).eval()
    sizes |= {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 12}
    return transformers.Qwen2MoeForCausalLM(
        transformers.Qwen2MoeConfig(**sizes, shared_expert_intermediate_size=12)
    ).eval()


@pytest.fixture
def warnings(monkeypatch, caplog):
    """The warnings that are given, as if none had been given before."""
    monkeypatch.setattr(log, "_given", set())
    return lambda: [record.getMessage() for record in caplog.records if "fused into one parameter" in record.message]


@pytest.mark.parametrize("kind", ["mixtral", "qwen2_moe"])
def test_fused_experts_are_named_once(kind, warnings, token_batches):
    model = moe(kind)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    lora_null.initialize(model, covariances, LoraNullConfig(r=4), progress=False)
    [warning] = warnings()
    for name in ("model.layers.*.mlp.experts.gate_up_proj", "model.layers.*.mlp.experts.down_proj"):
        assert name in warning
    fused = [p.numel() for name, p in model.named_parameters() if ".experts." in name]
    # Adapters are no weights of the model.
    share = sum(fused) / sum(p.numel() for name, p in model.named_parameters() if "lora_" not in name)
    assert f"4 parameters, {share:.0%} of all weights" in warning
    assert not any("experts." in name for name in covariances)


def test_only_what_was_asked_for_is_missed(warnings):
    model = moe("qwen2_moe")
    target_linears(model, LoraNullConfig(target_modules=["q_proj", "v_proj"]))
    assert not warnings()
    # The shared expert has such a layer, so that the wish is not empty; the others do not.
    chosen = target_linears(model, LoraNullConfig(target_modules=["q_proj", "down_proj"]))
    assert [name for name in chosen if name.endswith("down_proj")] == [
        f"model.layers.{i}.mlp.shared_expert.down_proj" for i in range(2)
    ]
    [warning] = warnings()
    assert "experts.down_proj" in warning and "gate_up_proj" not in warning


def test_a_wish_for_nothing_but_experts_is_refused():
    with pytest.raises(
        ValueError, match=r"\['gate_up_proj'\].*layers\.\*\.mlp\.experts\.gate_up_proj: .*target_parameters names"
    ):
        target_linears(moe("mixtral"), LoraNullConfig(target_modules=["q_proj", "gate_up_proj"]))


def test_convolutions_and_single_matrices_are_no_experts(warnings):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.convolution, self.linear = nn.Conv1d(4, 4, 3), nn.Linear(4, 4)
            self.positions = nn.Parameter(torch.zeros(1, 5, 4))

    assert list(target_linears(Model())) == ["linear"]
    assert not warnings()


def test_one_walk_finds_what_is_asked_later(llama, monkeypatch):
    from peft import LoraConfig, get_peft_model

    model = llama(tie_word_embeddings=True)
    walks, named_modules = [], nn.Module.named_modules

    def counted(module, *args, **kwargs):
        walks.append(module)
        return named_modules(module, *args, **kwargs)

    # modules() and parameters() walk by it too
    monkeypatch.setattr(nn.Module, "named_modules", counted)
    found = survey(model)
    assert walks.count(model) == 1
    monkeypatch.undo()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert set(found.linears) == linears and "lm_head" in found.heads & linears
    assert [name for name, target in found.linears.items() if target.tied] == ["lm_head"]
    down = found.linears["model.layers.1.mlp.down_proj"]
    assert (down.m, down.d) == tuple(down.linear.weight.shape) and down.m != down.d
    assert list(found.select()) == [name for name in found.linears if name != "lm_head"]
    adapted = survey(get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"])).get_base_model())
    assert {name.removesuffix(".base_layer") for name in adapted.linears} == linears


SMALL = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 48}
TEXT = {**SMALL, "vocab_size": 97, "num_key_value_heads": 2, "pad_token_id": 0}


def hears():
    from transformers import Qwen2AudioConfig, Qwen2AudioForConditionalGeneration

    sound = {"d_model": 32, "encoder_layers": 1, "encoder_attention_heads": 4, "encoder_ffn_dim": 48}
    sound |= {"model_type": "qwen2_audio_encoder", "num_mel_bins": 8, "max_source_positions": 8}
    config = Qwen2AudioConfig(audio_config=sound, text_config={"model_type": "qwen2", **TEXT}, audio_token_index=5)
    return Qwen2AudioForConditionalGeneration(config)


def sees_on_two_sides():
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    text = {"model_type": "t5", "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 1, "num_heads": 4}
    text |= {"vocab_size": 97, "pad_token_id": 0, "decoder_start_token_id": 0}
    config = Blip2Config(
        vision_config={**SMALL, "image_size": 16, "patch_size": 4},
        qformer_config={**SMALL, "encoder_hidden_size": 32},
        text_config=text,
    )
    return Blip2ForConditionalGeneration(config)


@pytest.mark.parametrize(
    ("make", "text", "tower", "counts"),
    [
        (hears, "language_model", "audio_tower", (7, 13)),
        (sees_on_two_sides, "language_model", "vision_model", (16, 21)),
    ],
)
def test_towers_get_adapters_where_they_are_named(make, text, tower, counts, monkeypatch, caplog):
    monkeypatch.setattr(log, "_given", set())
    model = make()
    chosen = target_linears(model)
    assert all(text in name for name in chosen) and len(chosen) == counts[0]
    assert f"{tower}" in caplog.text and "name them in target_modules" in caplog.text
    # Named so, an output head inside is selected as well.
    everything = target_linears(model, LoraNullConfig(target_modules=rf".*({text}|{tower})\..*"))
    assert len(everything) == counts[1]

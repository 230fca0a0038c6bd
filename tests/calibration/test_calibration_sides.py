"""Which mask belongs to a layer: encoders, decoders, cross-attention, cached decoding, images."""

import pytest
import torch
from calibration_tools import VOCABULARY, llama, token_ids
from torch import nn

from lora_null import LoraNullConfig, calibrate
from lora_null.models.targets import target_linears
from lora_null.system import log

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")

SIZES = {"vocab_size": VOCABULARY, "d_model": 16, "decoder_start_token_id": 0}


def t5():
    from transformers import T5Config, T5ForConditionalGeneration

    torch.manual_seed(0)
    return T5ForConditionalGeneration(T5Config(d_kv=8, d_ff=24, num_layers=2, num_heads=2, **SIZES)).eval()


def bart():
    from transformers import BartConfig, BartForConditionalGeneration

    torch.manual_seed(0)
    heads = {f"{side}_{what}": 2 for side in ("encoder", "decoder") for what in ("layers", "attention_heads")}
    widths = {"encoder_ffn_dim": 24, "decoder_ffn_dim": 24}
    return BartForConditionalGeneration(BartConfig(max_position_embeddings=64, **heads, **widths, **SIZES)).eval()


def berts():
    """An encoder and a decoder of different widths, with a projection from one to the other."""
    from transformers import BertConfig, BertLMHeadModel, BertModel, EncoderDecoderModel

    torch.manual_seed(0)
    sizes = {"vocab_size": VOCABULARY, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 24}
    encoder = BertModel(BertConfig(hidden_size=16, **sizes), add_pooling_layer=False)
    decoder = BertLMHeadModel(BertConfig(hidden_size=32, is_decoder=True, add_cross_attention=True, **sizes))
    model = EncoderDecoderModel(encoder=encoder, decoder=decoder)
    model.config.decoder_start_token_id = model.config.pad_token_id = 0
    return model.eval()


def reads_source(name):
    """Tell whether a layer reads the encoder's sequence, by the names that these models use."""
    crossing = any(part in name for part in ("EncDecAttention", "encoder_attn", "crossattention"))
    keys = name.rsplit(".", 1)[-1] in ("k", "v", "k_proj", "v_proj", "key", "value")
    return (crossing and keys) or name.startswith(("encoder.", "model.encoder.", "enc_to_dec_proj"))


def sums(model, run, mask_of, config=None):
    """Sum every target layer's inputs in float64, over the rows that ``mask_of(name)`` keeps."""
    wanted = {}

    def note(name, x):
        mask = mask_of(name)
        rows = x.reshape(-1, x.shape[-1]).double()
        rows = rows if mask is None else rows[mask.reshape(-1).bool()]
        wanted[name] = wanted.get(name, 0) + rows.T @ rows

    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: note(name, args[0]))
        for name, module in target_linears(model, config).items()
    ]
    with torch.no_grad():
        run()
    for handle in handles:
        handle.remove()
    return wanted


def assert_sums(got, wanted):
    assert {name for names in got.groups.values() for name in names} == set(wanted)
    for name, matrix in wanted.items():
        assert (got[name] - matrix).norm() <= 1e-5 * matrix.norm(), name


# As long as each other, so that no size tells one side from the other.
SOURCE = torch.tensor([[1] * 9, [1] * 6 + [0] * 3, [0] * 2 + [1] * 7])
TARGET = torch.tensor([[1] * 4 + [0] * 5, [1] * 9, [1] * 7 + [0] * 2])


@pytest.mark.parametrize("given", ["labels", "decoder mask", "both", "the rule of labels", "nothing"])
@pytest.mark.parametrize(
    ("make", "options"),
    [(t5, {}), (bart, {}), (berts, {}), (bart, {"low_memory": True}), (bart, {"low_memory": True, "device": "cpu"})],
    ids=["t5", "bart", "berts", "bart layerwise", "bart layerwise on a device"],
)
def test_encoder_and_decoder_have_masks_of_their_own(make, options, given):
    model = make()
    ids, labels = token_ids(3, 9, seed=1), token_ids(3, 9, seed=2).masked_fill(TARGET == 0, -100)
    batch, target = {"input_ids": ids, "attention_mask": SOURCE}, TARGET
    if given in ("labels", "the rule of labels"):
        batch["labels"] = labels
    elif given == "decoder mask":
        batch |= {"decoder_input_ids": token_ids(3, 9, seed=3), "decoder_attention_mask": TARGET}
    elif given == "both":
        # the mask of the decoder is for what it reads, which begins one token earlier
        begun = torch.cat([torch.ones(3, 1, dtype=torch.long), TARGET[:, :-1]], 1)
        batch |= {"labels": labels, "decoder_attention_mask": begun}
        target = begun
    else:
        batch["decoder_input_ids"] = token_ids(3, 9, seed=3)
        target = None
    rule = "labels" if given == "the rule of labels" else "attention"
    got = calibrate(model, [batch], mask=rule, **options)
    assert_sums(got, sums(model, lambda: model(**batch), lambda name: SOURCE if reads_source(name) else target))


def test_a_decoder_that_is_given_nothing_reads_what_the_encoder_reads():
    model, batch = bart(), {"input_ids": token_ids(3, 9), "attention_mask": SOURCE}
    assert_sums(calibrate(model, [batch]), sums(model, lambda: model(**batch), lambda name: SOURCE))


def test_no_mask_counts_all_on_both_sides():
    batch = {"input_ids": token_ids(3, 9), "attention_mask": SOURCE, "labels": token_ids(3, 5)}
    got = calibrate(t5(), [batch], mask="none")
    assert set(got.tokens.values()) == {27, 15}


@pytest.mark.parametrize("make", [llama, t5, bart], ids=lambda make: make.__name__)
def test_tokens_that_are_generated_count_and_padding_does_not(make):
    model, ids = make(), token_ids(3, 9).clamp(min=3)
    mask = SOURCE.flip(1)  # left padding, as generation wants it
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False, "pad_token_id": 0}

    def run():
        model.generate(input_ids=ids, attention_mask=mask, **options)

    seen = []

    def mask_of(name):
        if make is not llama:
            return mask if reads_source(name) else None
        # each layer is called once for the prompt, and then for a token of each row
        seen.append(name)
        return mask if seen.count(name) == 1 else None

    assert_sums(calibrate(model, run), sums(model, run, mask_of))


def test_masks_that_generation_has_expanded_are_refused():
    model, ids = llama(), token_ids(3, 9).clamp(min=3)

    def run():
        model.generate(ids, attention_mask=SOURCE.flip(1), max_new_tokens=2, cache_implementation="static")

    with pytest.raises(ValueError, match=r"attention_mask of batch 0 is .*; expected \(B, L\)"):
        calibrate(model, run)
    with pytest.raises(ValueError, match=r"attention_mask of batch 0 is a dict; expected \(B, L\)"):
        calibrate(model, lambda: model(ids, attention_mask={"full_attention": None}))


def test_a_layer_that_runs_outside_of_a_call_is_refused():
    model, ids = llama(), token_ids(3, 9)

    def run():
        model(ids, attention_mask=SOURCE)
        model.model.layers[0].mlp(torch.ones(3, 9, 32))

    with pytest.raises(ValueError, match=r"layers\.0\.mlp\.gate_proj ran outside of a call.*mask=\"none\""):
        calibrate(model, run)
    assert calibrate(model, run, mask="none").tokens["model.layers.0.mlp.gate_proj"] == 54

    # what failed, and was caught by the caller, is over as well
    def caught():
        try:
            model(ids, attention_mask=SOURCE, inputs_embeds=torch.ones(3, 9, 32))
        except ValueError:
            model.model.layers[0].mlp(torch.ones(3, 9, 32))

    with pytest.raises(ValueError, match="ran outside of a call"):
        calibrate(model, caught)


# Towers too.
EVERYTHING = LoraNullConfig(target_modules=r"model\..*")


def llava():
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2, image_size=6, patch_size=2
    )
    text = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=1,
        num_attention_heads=2,
    )
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=100, vision_feature_layer=-1)
    return LlavaForConditionalGeneration(config).eval()


def test_text_masks_are_not_for_images(monkeypatch, caplog):
    monkeypatch.setattr(log, "_given", set())
    model = llava()
    # nine patches and the class: as many rows as the text has tokens, by chance
    ids, mask = token_ids(2, 10) % 100, torch.ones(2, 10, dtype=torch.long)
    ids[:, :9], mask[1, 9:] = 100, 0
    batch = {"input_ids": ids, "attention_mask": mask, "pixel_values": torch.randn(2, 3, 6, 6)}
    # Towers are left out unless they are named.
    assert all("language_model" in name for name in calibrate(model, [batch]))
    assert "all-linear leaves out 14 layers of LlavaForConditionalGeneration that read images" in caplog.text
    assert "model.multi_modal_projector, model.vision_tower" in caplog.text
    got = calibrate(model, [batch], EVERYTHING)
    assert got.tokens["model.vision_tower.encoder.layers.0.self_attn.k_proj"] == 20
    assert got.tokens["model.multi_modal_projector.linear_1"] == 18
    assert got.tokens["model.language_model.layers.0.mlp.gate_proj"] == 19

    def mask_of(name):
        return mask if "language_model" in name else None

    assert_sums(got, sums(model, lambda: model(**batch), mask_of, EVERYTHING))


def smolvlm():
    from transformers import SmolVLMConfig, SmolVLMForConditionalGeneration

    torch.manual_seed(0)
    config = SmolVLMConfig(
        vision_config={
            "hidden_size": 16,
            "intermediate_size": 24,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "image_size": 8,
            "patch_size": 2,
        },
        text_config={
            "model_type": "llama",
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "intermediate_size": 56,
            "num_hidden_layers": 1,
            "num_attention_heads": 2,
            "num_key_value_heads": 2,
            "pad_token_id": 0,
        },
        image_token_id=100,
        scale_factor=2,
        pad_token_id=0,
    )
    return SmolVLMForConditionalGeneration(config).eval()


def test_padding_of_images_does_not_count_or_is_refused():
    model = smolvlm()
    ids, mask = token_ids(2, 10) % 100, torch.ones(2, 10, dtype=torch.long)
    ids[:, :4], mask[1, 8:] = 100, 0
    pixels = torch.ones(2, 1, 8, 8, dtype=torch.long)
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "pixel_values": torch.randn(2, 1, 3, 8, 8),
        "pixel_attention_mask": pixels,
    }
    got = calibrate(model, [batch], EVERYTHING)
    assert got.tokens["model.vision_model.encoder.layers.0.mlp.fc1"] == 32
    assert got.tokens["model.connector.modality_projection.proj"] == 8
    assert got.tokens["model.text_model.layers.0.mlp.gate_proj"] == 18
    pixels[1, :, 4:] = 0
    # patches of several places in one row: nobody knows which of them are padding
    with pytest.raises(ValueError, match=r"padded images or sounds \(patch_attention_mask.*modality_projection"):
        calibrate(model, [batch], EVERYTHING)
    patches = torch.ones(2, 4, 4)
    patches[1, 2:] = 0
    config = LoraNullConfig(target_modules=r".*(vision_model|text_model).*(fc1|k_proj)")
    got = calibrate(model, [batch], config)
    assert got.tokens["model.vision_model.encoder.layers.0.mlp.fc1"] == 24
    masks = {"vision_model": patches, "text_model": mask, "connector": None}
    wanted = sums(model, lambda: model(**batch), lambda name: masks[name.split(".")[1]], EVERYTHING)
    for name in got.groups:
        assert (got[name] - wanted[name]).norm() <= 1e-5 * wanted[name].norm(), name
    assert (
        calibrate(model, [batch], EVERYTHING, mask="none").tokens["model.vision_model.encoder.layers.0.mlp.fc1"] == 32
    )


def test_a_model_without_transformers_has_one_mask():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask=None):
            return self.linear(self.embedding(input_ids))

    assert calibrate(Model(), [{"input_ids": token_ids(3, 9), "attention_mask": SOURCE}]).tokens == {"linear": 22}

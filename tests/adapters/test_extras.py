"""What was trained besides the factors is in the file, for PEFT and for us, or the save is refused by name."""

import json

import pytest
import torch
from adapter_tools import R, ids, trained
from safetensors.torch import load_file
from torch import nn

import lora_null
from lora_null import LoraNullConfig
from lora_null.adapters import export_adapter
from lora_null.adapters.extras import keys_of
from lora_null.adapters.layer import attach_adapter, disable_adapters
from lora_null.adapters.state import AdapterState, set_state


@torch.no_grad()
def learn(model, *names):
    """Let parameters whose names end so require gradients and learn something."""
    torch.manual_seed(1)
    found = [(name, p) for name, p in model.named_parameters() if name.endswith(names)]
    assert found
    for _, parameter in found:
        parameter.requires_grad_(True)
        parameter.add_(0.3 * torch.randn_like(parameter))
    return model


def norms(model):
    return learn(model, "layernorm.weight", "model.norm.weight")


def biases(model):
    return learn(model, "q_proj.bias", "o_proj.bias")


def head(model):
    return learn(model, "lm_head.weight")


def embeddings(model):
    return learn(model, "embed_tokens.weight")


def frozen_again(model):
    return norms(model).requires_grad_(False)


CHANGES = {
    "norms": (norms, {}),
    "norms frozen again": (frozen_again, {}),
    "biases": (biases, {"attention_bias": True}),
    "head": (head, {}),
    "embeddings": (embeddings, {}),
    "tied embeddings": (embeddings, {"tie_word_embeddings": True}),
    "all of these": (lambda m: head(biases(embeddings(norms(m)))), {"attention_bias": True}),
}


@pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen_a", "trained_a"])
@pytest.mark.parametrize(("change", "options"), CHANGES.values(), ids=CHANGES)
def test_what_was_trained_besides_comes_back(llama, token_batches, tmp_path, change, options, freeze_a):
    from peft import PeftModel

    def base(dtype=torch.float32):
        return llama(dtype, **options)

    model = change(trained(base, token_batches, freeze_a=freeze_a))
    expected = model(ids()).logits
    lora_null.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    export_adapter(tmp_path / "checkpoint", tmp_path / "exported")
    export_adapter(tmp_path / "adapter", tmp_path / "again")
    loaded = lora_null.load_adapter(base(), tmp_path / "adapter")
    assert not any(p.requires_grad for p in loaded.parameters())
    lora_null.save_adapter(loaded, tmp_path / "third")
    resumed = lora_null.load_adapter(base(), tmp_path / "third", is_trainable=True)
    readers = {"loaded": loaded, "resumed": resumed}
    readers |= {name: PeftModel.from_pretrained(base(), tmp_path / name) for name in ("adapter", "exported", "again")}
    for name, reader in readers.items():
        assert (reader(ids()).logits - expected).norm() <= 1e-5 * expected.norm(), name
    if change is not frozen_again:
        before = {name for name, p in model.named_parameters() if p.requires_grad}
        now = {name for name, p in resumed.named_parameters() if p.requires_grad}
        # Of one layer's biases PEFT trains all or none.
        assert {name for name in now ^ before if not name.endswith("_proj.bias")} == set() and before <= now
    lora_null.merge(loaded)
    assert (loaded(ids()).logits - expected).norm() <= 1e-5 * expected.norm()


def test_an_adapter_alone_has_nothing_besides(llama, token_batches, tmp_path):
    lora_null.save_adapter(trained(llama, token_batches), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] is None and config["bias"] == "none"
    assert all("lora_" in name for name in load_file(tmp_path / "adapter/adapter_model.safetensors"))


def test_resized_embeddings_are_kept(llama, token_batches, tmp_path):
    from peft import PeftModel

    model = trained(llama, token_batches)
    model.resize_token_embeddings(101)
    expected = model(ids()).logits
    lora_null.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match="resize_token_embeddings"):
        lora_null.load_adapter(llama(), tmp_path / "adapter")

    def resized():
        base = llama()
        base.resize_token_embeddings(101)
        return base

    for loaded in (
        lora_null.load_adapter(resized(), tmp_path / "adapter"),
        PeftModel.from_pretrained(resized(), tmp_path / "adapter"),
    ):
        assert (loaded(ids()).logits - expected).norm() <= 1e-5 * expected.norm()


class Gated(nn.Module):
    """A parameter beside adapted layers: PEFT cannot save it without the layers."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.gate, self.block = nn.Parameter(torch.ones(8)), nn.Module()
        self.block.first, self.block.scale = nn.Linear(8, 8), nn.Parameter(torch.ones(8))

    def forward(self, x):
        return self.gate * self.block.scale * self.block.first(x)


@pytest.mark.parametrize("name", ["gate", "block.scale", "block.first.weight"])
@pytest.mark.parametrize("frozen", [True, False])
def test_what_has_no_place_is_refused_by_name(tmp_path, name, frozen):
    model = Gated()
    model.requires_grad_(False)
    attach_adapter(model.block.first, torch.randn(2, 8), torch.randn(8, 2))
    set_state(model, AdapterState(LoraNullConfig(r=2), before=keys_of(model)))
    parameter = model.get_parameter(name)
    parameter.data += 1
    parameter.requires_grad_(not frozen)
    with pytest.raises(ValueError, match=rf"^{name} requires a gradient or has changed"):
        lora_null.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()


def classifier(token_batches, **options):
    from transformers import LlamaConfig, LlamaForSequenceClassification

    sizes = {"vocab_size": 97, "hidden_size": 48, "intermediate_size": 72, "num_hidden_layers": 2}
    torch.manual_seed(0)
    return LlamaForSequenceClassification(
        LlamaConfig(**sizes, num_attention_heads=4, num_labels=3, pad_token_id=0, **options)
    ).eval()


def test_a_new_head_trains_on_request_and_is_saved(token_batches, tmp_path, caplog):
    from peft import PeftModel

    model = classifier(token_batches)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    frozen = lora_null.initialize(classifier(token_batches), covariances, LoraNullConfig(r=R), progress=False)
    assert not frozen.score.weight.requires_grad and "modules_to_save=['score']" in caplog.text
    caplog.clear()
    lora_null.initialize(model, covariances, LoraNullConfig(r=R, train="b", modules_to_save=["score"]), progress=False)
    assert model.score.weight.requires_grad and not caplog.text
    pretrained = model(ids()).logits
    learn(model, "score.weight", "lora_B.weight")
    expected = model(ids()).logits
    with disable_adapters(model):
        torch.testing.assert_close(model(ids()).logits, pretrained)
    torch.testing.assert_close(model(ids()).logits, expected)
    lora_null.save_adapter(model, tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["modules_to_save"] == ["score"]
    resumed = lora_null.load_adapter(classifier(token_batches), tmp_path / "adapter", is_trainable=True)
    assert resumed.score.weight.requires_grad
    for loaded in (resumed, PeftModel.from_pretrained(classifier(token_batches), tmp_path / "adapter")):
        torch.testing.assert_close(loaded(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    with disable_adapters(resumed):
        torch.testing.assert_close(resumed(ids()).logits, pretrained)


@pytest.mark.parametrize(
    ("modules", "match"),
    [
        (["nothing"], "'nothing', in which no module"),
        (["self_attn"], None),
        (["mlp", "gate_proj"], r"selects model.layers..\.mlp and model\..* inside it"),
    ],
)
def test_modules_that_cannot_train_whole(llama, token_batches, modules, match):
    model = llama()
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    config = LoraNullConfig(r=R, modules_to_save=modules)
    if match is None:
        lora_null.initialize(model, covariances, config, progress=False)
        assert model.model.layers[0].self_attn.q_proj.weight.requires_grad
        return
    with pytest.raises(ValueError, match=match):
        lora_null.initialize(model, covariances, config, progress=False)
    assert all(p.requires_grad for p in model.parameters())


def test_a_module_that_was_put_in_later_is_kept(llama, token_batches, tmp_path):
    """Frozen already when the adapter is saved, and in no base: only the file can hold it."""
    model = trained(llama, token_batches)
    model.extra = nn.Linear(4, 3).requires_grad_(False)
    lora_null.save_adapter(model, tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"holds extra\..* has nothing of that name"):
        lora_null.load_adapter(llama(), tmp_path / "adapter")
    base = llama()
    base.extra = nn.Linear(4, 3)
    lora_null.load_adapter(base, tmp_path / "adapter")
    assert torch.equal(base.extra.weight, model.extra.weight)


def test_heads_as_peft_saves_them_are_read(token_batches, tmp_path):
    """PEFT names ``classifier`` and ``score``, of which a model has one."""
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False, task_type="SEQ_CLS")
    peft_model = learn(get_peft_model(classifier(token_batches), config).eval(), "score.modules_to_save.default.weight")
    peft_model.save_pretrained(tmp_path / "theirs")
    expected = peft_model(ids()).logits
    resumed = lora_null.load_adapter(classifier(token_batches), tmp_path / "theirs", is_trainable=True)
    torch.testing.assert_close(resumed(ids()).logits, expected, rtol=1e-5, atol=1e-5)
    assert resumed.score.weight.requires_grad
    lora_null.save_adapter(resumed, tmp_path / "ours")
    again = lora_null.load_adapter(classifier(token_batches), tmp_path / "ours")
    torch.testing.assert_close(again(ids()).logits, expected, rtol=1e-5, atol=1e-5)


def test_a_model_that_learned_besides_has_no_pretrained_state(llama, token_batches):
    from lora_null.evaluation.pretrained import require_comparable

    model = trained(llama, token_batches)
    require_comparable(model, None)
    with pytest.raises(ValueError, match=r"not the pre-trained one\. Pass base="):
        require_comparable(frozen_again(model), None)


@pytest.mark.parametrize("learned", [True, False])
@pytest.mark.parametrize(("first", "then"), [("float32", "bfloat16"), ("float32", "float16"), ("bfloat16", "float32")])
def test_a_conversion_hides_nothing_and_is_no_change(llama, token_batches, tmp_path, learned, first, then):
    model = trained(llama, token_batches, dtype=getattr(torch, first))
    if learned:
        frozen_again(model)
    lora_null.save_adapter(model.to(getattr(torch, then)), tmp_path / "adapter")
    held = {name for name in load_file(tmp_path / "adapter/adapter_model.safetensors") if "lora_" not in name}
    assert len(held) == (5 if learned else 0) and all("norm" in name for name in held)


def test_what_trains_around_the_model_is_said(llama, token_batches, tmp_path, caplog):
    whole = nn.ModuleDict({"model": trained(llama, token_batches), "value": nn.Linear(4, 1)})
    lora_null.save_adapter(whole, tmp_path / "adapter")
    assert "2 parameters outside the adapted model train, for instance value.weight" in caplog.text
    caplog.clear()
    lora_null.save_adapter(nn.ModuleDict({"model": whole["model"]}), tmp_path / "other")
    assert not caplog.text


def test_tied_weights_are_not_loaded_by_halves(llama, token_batches, tmp_path):
    model = embeddings(trained(llama, token_batches))
    lora_null.save_adapter(model, tmp_path / "adapter")
    tied = llama(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in tied.state_dict().items()}
    with pytest.raises(ValueError, match="tied"):
        lora_null.load_adapter(tied, tmp_path / "adapter", verify_base=False)
    assert all(torch.equal(value, before[name]) for name, value in tied.state_dict().items())


def test_a_file_that_lacks_what_it_promises_is_refused(llama, token_batches, tmp_path):
    lora_null.save_adapter(trained(llama, token_batches), tmp_path / "adapter")
    (tmp_path / "adapter/lora_null.json").unlink()
    path = tmp_path / "adapter/adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "modules_to_save": ["lm_head"]}))
    with pytest.raises(ValueError, match=r"lacks lm_head\.weight"):
        lora_null.load_adapter(llama(), tmp_path / "adapter")


def test_disabled_adapters_are_not_saved(llama, token_batches, tmp_path):
    """The head would go into the file with the values that it had before."""
    model = head(trained(llama, token_batches, modules_to_save=["lm_head"]))
    with disable_adapters(model), pytest.raises(ValueError, match=r"are disabled, .* outside of disable_adapters"):
        lora_null.save_adapter(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    lora_null.save_adapter(model, tmp_path / "adapter")


def test_a_state_dict_of_another_start(llama, token_batches, tmp_path):
    """It has the base that its own start shifted, so that the outputs are right, and the cause is named on saving."""
    model = trained(llama, token_batches, freeze_a=False)
    covariances = lora_null.calibrate(llama(), token_batches(seed=2), progress=False)
    other = lora_null.initialize(llama(), covariances, LoraNullConfig(r=R, freeze_a=False), progress=False)
    other.load_state_dict(model.state_dict())
    assert torch.equal(other(ids()).logits, model(ids()).logits)
    with pytest.raises(ValueError, match=r"q_proj is another than the one that was shifted .* another run, use"):
        lora_null.save_adapter(other, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()

"""Layers that keep their weight transposed, GPT-2's Conv1D: every mode, both routes, on disk, and beside nn.Linear."""

import json
import warnings

import pytest
import torch
import transformers
from adapter_tools import optimise
from peft import LoraConfig, PeftModel, get_peft_model
from transformers.pytorch_utils import Conv1D

import lora_null
from lora_null import peft as lora_null_peft
from lora_null.adapters.layer import adapter_layers

WORDS, R = 97, 4
SIZES = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64, "bos_token_id": 1, "eos_token_id": 2}
# bit for bit where the base is untouched
BOUNDS = {"b": 0.0, "b_in_basis": 0.0, "ab": 2e-5}


def make(dtype=torch.float32):
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=WORDS, **SIZES)).eval()
    for parameter in model.parameters():
        parameter.data.mul_(3 if parameter.ndim == 2 else 1)
    return model.requires_grad_(False).to(dtype)


def ids(seed=3):
    return torch.randint(3, WORDS, (4, 16), generator=torch.Generator().manual_seed(seed))


def padded(seed):
    """A batch whose padding holds tokens that nothing else has."""
    mask = torch.ones(4, 16, dtype=torch.long)
    mask[1:, 11:] = 0
    return {"input_ids": ids(seed).where(mask.bool(), 0), "attention_mask": mask}


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


def agree(found, expected, bound=2e-5):
    return (found - expected).norm() <= bound * expected.norm()


def learn(model):
    return optimise(model, map(ids, range(2)), 2e-2)


@pytest.fixture(scope="module")
def found():
    return lora_null.calibrate(make(), [padded(seed) for seed in range(6)], progress=False)


def test_covariances_are_those_of_the_inputs_that_count(found):
    model, name = make(), "transformer.h.1.mlp.c_proj"
    sums = torch.zeros(128, 128, dtype=torch.float64)

    def add(_module, args):
        rows = args[0][batch["attention_mask"].bool()].double()
        sums.add_(rows.t() @ rows)

    model.get_submodule(name).register_forward_pre_hook(add)
    for seed in range(6):
        batch = padded(seed)
        model(**batch)
    assert (found[name].double() - sums).norm() <= 1e-6 * sums.norm()
    assert set(found) == {n for n, m in model.named_modules() if isinstance(m, Conv1D)}


@pytest.mark.parametrize("train", BOUNDS)
@pytest.mark.parametrize("through_peft", [False, True])
def test_both_routes_in_all_modes(found, train, through_peft, tmp_path):
    config = lora_null.LoraNullConfig(r=R, lora_alpha=6, train=train, energy=0.9 if train == "b_in_basis" else None)
    if through_peft:
        model = get_peft_model(make(), LoraConfig(r=R, lora_alpha=6, target_modules="all-linear", fan_in_fan_out=True))
        options = {"train": train, "energy": config.energy, "progress": False}
        lora_null_peft.initialize_lora_null_weights(model, found, **options)
        layers, save = lora_null_peft.lora_layers(model), lora_null_peft.save_adapter
        weights = {name: layer.get_base_layer().weight.detach() for name, layer in layers.items()}
        factors = {name: (layer.lora_A["default"], layer.lora_B["default"]) for name, layer in layers.items()}
    else:
        model = lora_null.initialize(make(), found, config, progress=False)
        layers, save = adapter_layers(model), lora_null.save_adapter
        weights = {name: layer.weight.detach() for name, layer in layers.items()}
        factors = {name: (layer.lora_A, layer.lora_B) for name, layer in layers.items()}
    assert len(layers) == 8
    before = logits(make())
    assert agree(logits(model), before, BOUNDS[train])
    plain = make()
    for name, (A, B) in factors.items():
        W = plain.get_submodule(name).weight.t()
        # W U U^T, which is B0 A0, is what the shifted base lacks.
        lacks = W - weights[name].t()
        expected = 1.5 * B.weight @ A.weight if train == "ab" else torch.zeros_like(W)
        torch.testing.assert_close(lacks, expected, rtol=0, atol=1e-6)
        assert (A.weight.shape, B.weight.shape) == ((R, W.shape[1]), (W.shape[0], R))
    learn(model)
    after = logits(model)
    assert not agree(after, before, 1e-3)
    save(model, tmp_path / "adapter")
    with warnings.catch_warnings():
        # PEFT warns where the configuration does not say how the weights lie.
        warnings.filterwarnings("error", message="fan_in_fan_out")
        assert agree(logits(PeftModel.from_pretrained(make(), tmp_path / "adapter")), after)
    assert agree(logits(lora_null.load_adapter(make(), tmp_path / "adapter")), after)
    if train != "b_in_basis":
        again = lora_null.load_adapter(make(), tmp_path / "adapter", is_trainable=True)
        assert agree(logits(again), after)
    merged = model.merge_and_unload() if through_peft else lora_null.merge(model)
    assert agree(logits(merged), after)
    assert {type(merged.get_submodule(name)) for name in layers} == {Conv1D}


def test_one_pass_gives_the_bits_of_two_steps(tmp_path, one_thread):
    make().save_pretrained(tmp_path / "model")
    config = lora_null.LoraNullConfig(r=R, train="ab")
    batches = [padded(seed) for seed in range(3)]
    lora_null.initialize_streaming(tmp_path / "model", batches, config, tmp_path / "one", progress=False)
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    covariances = lora_null.calibrate(model, batches, config, low_memory=True, progress=False)
    lora_null.save_adapter(lora_null.initialize(model, covariances, config, progress=False), tmp_path / "two")
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_weights_of_another_model_are_seen(found):
    other = make()
    other.transformer.h[0].mlp.c_fc.weight.data.neg_()
    with pytest.raises(ValueError, match="collected on other weights"):
        lora_null.initialize(other, found, lora_null.LoraNullConfig(r=R, train="b"), progress=False)


def test_a_half_precision_base_is_shifted_and_merged(found):
    covariances = lora_null.calibrate(make(torch.bfloat16), [{"input_ids": ids()}], progress=False)
    config = lora_null.LoraNullConfig(r=R, train="ab")
    model = lora_null.initialize(make(torch.bfloat16), covariances, config, progress=False)
    assert agree(logits(model).float(), logits(make(torch.bfloat16)).float(), 3e-2)
    after = logits(learn(model))
    assert agree(logits(lora_null.merge(model)).float(), after.float(), 3e-2)


def test_beside_ordinary_linear_layers(tmp_path):
    sizes = {"state_dim": 5, "act_dim": 3, "hidden_size": 32, "n_layer": 1, "n_head": 4, "max_ep_len": 20}

    def decision():
        torch.manual_seed(0)
        config = transformers.DecisionTransformerConfig(**sizes)
        return transformers.DecisionTransformerModel(config).eval().requires_grad_(False)

    def episode(seed):
        made = torch.Generator().manual_seed(seed)
        return {
            "states": torch.randn(2, 6, 5, generator=made),
            "actions": torch.randn(2, 6, 3, generator=made),
            "rewards": torch.randn(2, 6, 1, generator=made),
            "returns_to_go": torch.randn(2, 6, 1, generator=made),
            "timesteps": torch.randint(20, (2, 6), generator=made),
            "attention_mask": torch.ones(2, 6),
        }

    # Three tokens for each step of an episode: padding could not be told from the mask.
    data = [episode(seed) for seed in range(4)]
    config = lora_null.LoraNullConfig(r=3, train="b", target_modules=["c_attn", "c_proj", "predict_action.0"])
    covariances = lora_null.calibrate(decision(), data, config, mask="none", progress=False)
    model = lora_null.initialize(decision(), covariances, config, progress=False)
    layers = adapter_layers(model)
    assert sorted({type(layer).__name__ for layer in layers.values()}) == ["LoraNullConv1D", "LoraNullLinear"]
    model(**episode(9)).action_preds.pow(2).sum().backward()
    with torch.no_grad():
        for layer in layers.values():
            layer.lora_B.weight.sub_(layer.lora_B.weight.grad)
    after = model(**episode(9)).action_preds.detach()
    lora_null.save_adapter(model, tmp_path / "adapter")
    assert not json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())["fan_in_fan_out"]
    loaded = PeftModel.from_pretrained(decision(), tmp_path / "adapter").eval()
    assert agree(loaded(**episode(9)).action_preds, after)

"""What is refused, is refused before the first change: the model is then bit-identical, with nothing left on it."""

import sys
from contextlib import contextmanager

import pytest
import torch
from adapter_tools import R, ids, learn, trained
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.utils import parametrizations, prune

import lora_null
from lora_null import LoraNullConfig
from lora_null.adapters.layer import LoraNullLinear, adapter_layers

FREEZE_A = pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen_a", "trained_a"])


def picture(model):
    """Everything of a model that an operation may change."""
    return (
        {name: (value.dtype, value.clone()) for name, value in model.state_dict().items()},
        {name: (id(p), p.requires_grad) for name, p in model.named_parameters()},
        {name: (type(module), sorted(vars(module))) for name, module in model.named_modules()},
        dict(model.config.to_dict()),
    )


def same(before, model):
    now = picture(model)
    assert now[1:] == before[1:]
    for name, (dtype, value) in now[0].items():
        assert dtype == before[0][name][0] and torch.equal(value, before[0][name][1]), name


def failing(monkeypatch, module, name, at):
    """Let the call number ``at`` of a function fail, counted from 1."""
    module = sys.modules[f"lora_null.adapters.{module}"]
    function, calls = getattr(module, name), []

    def fail(*args, **kwargs):
        calls.append(name)
        if len(calls) == at:
            raise ValueError("this step fails")
        return function(*args, **kwargs)

    monkeypatch.setattr(module, name, fail)
    return calls


@pytest.mark.parametrize(
    ("module", "name", "at"),
    [
        ("initialize", "survey", 1),
        ("initialize", "refuse_adapted", 1),
        ("initialize", "require_adaptable", 1),
        ("initialize", "require_modules", 1),
        ("initialize", "start_factors", 1),
        ("spaces", "null_spaces", 1),
        ("start", "factors_of", 14),
        ("initialize", "require_shift", 14),
    ],
)
def test_no_step_of_initialisation_leaves_a_trace(calibrated, monkeypatch, module, name, at):
    model, covariances = calibrated
    before, calls = picture(model), failing(monkeypatch, module, name, at)
    with pytest.raises(ValueError, match="this step fails"):
        lora_null.initialize(model, covariances, LoraNullConfig(r=R, freeze_a=False), progress=False)
    assert len(calls) == at
    same(before, model)


@pytest.mark.parametrize(
    ("name", "at"),
    [
        ("_matching", 1),
        ("require_adaptable", 1),
        ("fingerprint", 1),
        ("_rank", 14),
        ("place_extras", 1),
        ("home_of", 14),
        ("unstack", 14),
        ("require_finite", 28),
        ("require_shift", 14),
    ],
)
def test_no_step_of_loading_leaves_a_trace(llama, token_batches, tmp_path, monkeypatch, name, at):
    lora_null.save_adapter(trained(llama, token_batches, freeze_a=False), tmp_path / "adapter")
    model = llama()
    before, calls = picture(model), failing(monkeypatch, "load", name, at)
    with pytest.raises(ValueError, match="this step fails"):
        lora_null.load_adapter(model, tmp_path / "adapter", is_trainable=True)
    assert len(calls) == at
    same(before, model)


@pytest.mark.parametrize("name", ["require_finite", "require_shift"])
def test_no_step_of_merging_leaves_a_trace(llama, token_batches, monkeypatch, name):
    model = trained(llama, token_batches, freeze_a=False)
    before, calls = picture(model), failing(monkeypatch, "merge", name, 14)
    with pytest.raises(ValueError, match="this step fails"):
        lora_null.merge(model)
    assert len(calls) == 14
    same(before, model)


MADE = {
    "weight_norm": parametrizations.weight_norm,
    "old weight_norm": nn.utils.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "old spectral_norm": nn.utils.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "pruning": lambda linear: prune.l1_unstructured(linear, "weight", amount=0.3),
}


@FREEZE_A
@pytest.mark.parametrize("make", MADE.values(), ids=MADE)
@pytest.mark.filterwarnings("ignore:.*weight_norm.*:FutureWarning")
def test_weights_that_are_made_anew_are_refused(llama, token_batches, tmp_path, make, freeze_a):
    lora_null.save_adapter(trained(llama, token_batches), tmp_path / "adapter")
    model = llama()
    make(model.model.layers[1].mlp.down_proj)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    before = picture(model)
    match = r"layers\.1\.mlp\.down_proj is computed from others .*remove_parametrizations"
    with pytest.raises(ValueError, match=match):
        lora_null.initialize(model, covariances, LoraNullConfig(r=R, freeze_a=freeze_a), progress=False)
    with pytest.raises(ValueError, match=match):
        lora_null.load_adapter(model, tmp_path / "adapter", verify_base=False)
    same(before, model)
    peft_model = get_peft_model(model, LoraConfig(r=R, target_modules=["down_proj"]))
    with pytest.raises(ValueError, match=match):
        lora_null.peft.initialize_lora_null_weights(peft_model, covariances, freeze_a=freeze_a, progress=False)


@pytest.mark.parametrize("make", [MADE["weight_norm"], MADE["pruning"]], ids=["weight_norm", "pruning"])
def test_weights_that_came_to_be_made_anew_are_not_merged(llama, token_batches, make):
    model = trained(llama, token_batches)
    make(model.model.layers[1].mlp.down_proj)
    before = picture(model)
    with pytest.raises(ValueError, match="Merging needs weights that are parameters"):
        lora_null.merge(model)
    same(before, model)


def shared_memory(model):
    q, k = (getattr(model.model.layers[0].self_attn, name) for name in ("q_proj", "v_proj"))
    k.weight = nn.Parameter(q.weight.data[: len(k.weight)])


def expanded(model):
    q = model.model.layers[0].self_attn.q_proj
    q.weight = nn.Parameter(q.weight.data[:1].expand(q.weight.shape))


@pytest.mark.parametrize("change", [shared_memory, expanded])
def test_parameters_in_one_memory_are_not_written(llama, token_batches, change):
    model = llama()
    change(model)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    before = picture(model)
    with pytest.raises(ValueError, match=r"shares its weight with another module|holds some values once"):
        lora_null.initialize(model, covariances, LoraNullConfig(r=R, freeze_a=False), progress=False)
    same(before, model)
    # Untouched, such a base can be trained on.
    lora_null.initialize(model, covariances, LoraNullConfig(r=R), progress=False)
    before = picture(model)
    with pytest.raises(ValueError, match=r"shares its weight with another module|holds some values once"):
        lora_null.merge(model)
    same(before, model)


@pytest.mark.parametrize("dtype", [torch.int8, torch.bool, torch.complex64, torch.float8_e4m3fn, "float32", None])
def test_dtypes_that_hold_no_factors(calibrated, llama, token_batches, tmp_path, dtype):
    model, covariances = calibrated
    before = picture(model)
    with pytest.raises(ValueError, match=r"^adapter_dtype is .*; expected one of"):
        lora_null.initialize(model, covariances, LoraNullConfig(r=R), adapter_dtype=dtype, progress=False)
    with pytest.raises(ValueError, match=r"^dtype is .*; expected one of"):
        lora_null.factorize(torch.eye(3), torch.eye(3), dtype=dtype)
    lora_null.save_adapter(trained(llama, token_batches), tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"^adapter_dtype is .*; expected one of"):
        lora_null.load_adapter(model, tmp_path / "adapter", adapter_dtype=dtype)
    same(before, model)
    if dtype is not None:
        with pytest.raises(ValueError, match=r"^dtype is .*; expected one of"):
            lora_null.save_adapter(trained(llama, token_batches), tmp_path / "other", dtype=dtype)
        assert not (tmp_path / "other").exists()


def test_what_overflows_a_dtype_is_refused(llama, token_batches, tmp_path):
    model = trained(llama, token_batches, dtype=torch.float16)
    for layer in adapter_layers(model).values():
        layer.lora_B.weight.data.fill_(3e7)
    before = picture(model)
    with pytest.raises(ValueError, match=r"would hold NaN or Inf in torch.float16"):
        lora_null.merge(model)
    same(before, model)
    lora_null.save_adapter(model, tmp_path / "adapter")
    base = llama(torch.float16)
    before = picture(base)
    with pytest.raises(ValueError, match=r"holds NaN or Inf in torch.float16, so it was not loaded"):
        lora_null.load_adapter(base, tmp_path / "adapter", adapter_dtype=torch.float16)
    same(before, base)
    with pytest.raises(ValueError, match=r"do not fit into torch.float16"):
        lora_null.factorize(torch.randn(3, 4) * 1e12, torch.eye(4)[:, :2], dtype=torch.float16)


def test_a_merge_near_the_edge_of_fp16_goes_through(llama, token_batches):
    """The bound that tells quickly is too careful here; the weights themselves fit."""
    model = trained(llama, token_batches, dtype=torch.float16)
    for layer in adapter_layers(model).values():
        layer.lora_A.weight.data.zero_()[0, 0], layer.lora_B.weight.data.zero_()[0, 0] = 0, 0
        layer.lora_A.weight.data[0, 0], layer.lora_A.weight.data[1, 0] = 200.0, 200.0
        layer.lora_B.weight.data[0, 0], layer.lora_B.weight.data[0, 1] = 200.0, -190.0
    lora_null.merge(model)
    assert all(bool(p.isfinite().all()) for p in model.parameters())
    assert 1900 < float(model.model.layers[0].mlp.up_proj.weight[0, 0]) < 2100


@FREEZE_A
def test_a_base_in_fp64_is_not_rounded(llama, token_batches, tmp_path, freeze_a):
    model = llama(torch.float64)
    expected = model(ids()).logits
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    config = LoraNullConfig(r=R, freeze_a=freeze_a)
    lora_null.initialize(model, covariances, config, adapter_dtype=torch.float64, progress=False)
    assert (model(ids()).logits - expected).norm() <= 1e-13 * expected.norm()
    torch.manual_seed(0)
    for layer in adapter_layers(model).values():
        layer.lora_B.weight.data.add_(0.1 * torch.randn_like(layer.lora_B.weight))
    expected = model(ids()).logits
    lora_null.save_adapter(model, tmp_path / "adapter", dtype=torch.float64)
    for is_trainable in (False, True):
        base = llama(torch.float64)
        loaded = lora_null.load_adapter(
            base, tmp_path / "adapter", is_trainable=is_trainable, adapter_dtype=torch.float64
        )
        assert (loaded(ids()).logits - expected).norm() <= 1e-12 * expected.norm()
        lora_null.merge(loaded)
        assert (loaded(ids()).logits - expected).norm() <= 1e-12 * expected.norm()


@FREEZE_A
def test_zero_weights_do_not_stop_initialisation(llama, token_batches, freeze_a, caplog):
    model = llama()
    for name in ("q_proj", "k_proj"):
        nn.init.zeros_(getattr(model.model.layers[0].self_attn, name).weight)
    expected = model(ids()).logits
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    lora_null.initialize(model, covariances, LoraNullConfig(r=R, freeze_a=freeze_a), progress=False)
    assert len(adapter_layers(model)) == 14
    assert "2 layers, for instance model.layers.0.self_attn.q_proj, map all directions" in caplog.text
    assert (model(ids()).logits - expected).norm() <= 1e-5 * expected.norm()


def test_experts_of_peft_beside_our_layers_are_refused(token_batches):
    """``target_parameters`` alone puts no adapter on a linear layer, so that the model looks like one without."""
    from peft import LoraConfig, get_peft_model
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"vocab_size": 97, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1}
    config = MixtralConfig(**sizes, num_attention_heads=2, num_key_value_heads=1, num_local_experts=2)
    model = MixtralForCausalLM(config)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    peft_model = get_peft_model(
        model, LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    ).get_base_model()
    with pytest.raises(ValueError, match="carries PEFT adapters"):
        lora_null.initialize(peft_model, covariances, LoraNullConfig(r=2), progress=False)
    assert not any(isinstance(module, LoraNullLinear) for module in peft_model.modules())


def test_the_name_of_a_local_base_is_said(llama, token_batches, tmp_path, caplog):
    import json

    model = trained(llama, token_batches)
    model.config._name_or_path = str(tmp_path / "base-of-this-test")
    lora_null.save_adapter(model, tmp_path / "adapter")
    assert "names it 'base-of-this-test'" in caplog.text and "base_model_name_or_path" in caplog.text
    lora_null.save_adapter(model, tmp_path / "adapter", overwrite=True, base_model_name_or_path="org/base")
    config = json.loads((tmp_path / "adapter/adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"


@contextmanager
def careless(how):
    """What training programs leave switched on around the calls: half precision for products."""
    before = torch.get_float32_matmul_precision()
    try:
        if how == "medium":
            torch.set_float32_matmul_precision("medium")
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize("how", ["autocast", "medium"])
def test_shifts_and_merges_are_of_full_precision(llama, calibrated, tmp_path, how):
    covariances, pretrained = calibrated[1], llama()(ids()).logits
    with careless(how):
        model = lora_null.initialize(llama(), covariances, LoraNullConfig(r=R, freeze_a=False), progress=False)
        peft_model = get_peft_model(llama(), LoraConfig(r=R, target_modules="all-linear"))
        lora_null.peft.initialize_lora_null_weights(peft_model, covariances, freeze_a=False, progress=False)
    for started in (model, peft_model):
        assert (started(ids()).logits - pretrained).norm() <= 1e-5 * pretrained.norm()
    learn(model)
    expected = model(ids()).logits
    with careless(how):
        lora_null.save_adapter(model, tmp_path / "adapter")
        resumed = lora_null.load_adapter(llama(), tmp_path / "adapter", is_trainable=True)
        merged = lora_null.merge(model)
    for found in (resumed, merged):
        assert (found(ids()).logits - expected).norm() <= 1e-5 * expected.norm()

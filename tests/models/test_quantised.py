"""Adapters on weights that other libraries quantise; those that are installed are run, the others imitated."""

import abc
import copy
import io

import pytest
import torch
from adapter_tools import R, ids
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_null
import lora_null.peft as lora_null_peft
from lora_null import factorize
from lora_null.adapters.layer import adapter_layers
from lora_null.models.quantised import dequantised, layout_kept
from lora_null.models.targets import target_linears
from lora_null.system.log import forget_warnings


class FloatLike(torch.Tensor):
    """A weight rounded to 8 bits behind the dtype and shape of the original, as torchao and quanto have it."""

    @staticmethod
    def __new__(cls, weight):
        return torch.Tensor._make_wrapper_subclass(cls, weight.shape, dtype=weight.dtype)

    def __init__(self, weight):
        self.scale = weight.detach().abs().amax() / 127
        self.packed = (weight.detach() / self.scale).round().to(torch.int8)

    def dequantize(self):
        return self.packed.float() * self.scale

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.detach.default:
            return copy.copy(args[0])
        raise NotImplementedError(f"{func} on a {cls.__name__}")

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        if func is nn.functional.linear:
            x, weight, *bias = args
            return nn.functional.linear(x, weight.dequantize(), *bias)
        return super().__torch_function__(func, types, args, kwargs or {})

    def __copy__(self):
        return FloatLike(self.dequantize())


def imitated(model, folder):
    for linear in target_linears(model).values():
        linear.weight = nn.Parameter(FloatLike(linear.weight), requires_grad=False)
    return model


def torchao(model, folder):
    quantization = pytest.importorskip("torchao.quantization")
    wanted = set(target_linears(model).values())
    quantization.quantize_(model, quantization.Int8WeightOnlyConfig(), filter_fn=lambda module, _: module in wanted)
    return model


def quanto(model, folder):
    quanto = pytest.importorskip("optimum.quanto")
    quanto.quantize(model, weights=quanto.qint8, exclude="lm_head")
    quanto.freeze(model)
    return model


def bitsandbytes(model, folder, **options):
    pytest.importorskip("bitsandbytes")
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    if not folder.exists():
        model.save_pretrained(folder)
    config = BitsAndBytesConfig(**options)
    return AutoModelForCausalLM.from_pretrained(
        folder, quantization_config=config, dtype=torch.float32, device_map="cpu"
    ).eval()


def nf4(model, folder, double=False):
    return bitsandbytes(
        model,
        folder,
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=double,
        bnb_4bit_compute_dtype=torch.float32,
    )


def double_nf4(model, folder):
    return nf4(model, folder, double=True)


def int8(model, folder):
    return bitsandbytes(model, folder, load_in_8bit=True)


WHOLE_MODEL = [imitated, torchao, nf4, double_nf4, int8]
PEFT = [torchao, quanto, nf4, int8]


@pytest.fixture
def quantised(llama, tmp_path, request):
    # bitsandbytes packs 32 rows and scales 64 columns at a time.
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_key_value_heads": 4}
    return lambda: request.param(llama(**sizes), tmp_path / "base").requires_grad_(False)


def logits(model):
    return model(ids()).logits.detach()


def train(model, steps=3):
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=5e-3, weight_decay=0)
    for step in range(steps):
        model(input_ids=ids(step), labels=ids(step)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("quantised", WHOLE_MODEL, indirect=True)
def test_the_whole_way(quantised, token_batches, tmp_path):
    model = quantised()
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    low = lora_null.calibrate(quantised(), token_batches(), low_memory=True, progress=False)
    assert all(torch.equal(low[key], covariances[key]) for key in covariances)
    with pytest.raises(ValueError, match="q_proj is quantised"):
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, freeze_a=False), progress=False)
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, train="b"), progress=False)
    before = logits(model)
    with lora_null.adapters.layer.disable_adapters(model):
        assert torch.equal(logits(model), before)
    train(model)
    after = logits(model)
    assert (after - before).norm() > 1e-3 * before.norm()
    lora_null.save_adapter(model, tmp_path / "adapter")
    for trainable in (False, True):
        loaded = lora_null.load_adapter(quantised(), tmp_path / "adapter", is_trainable=trainable)
        assert torch.equal(logits(loaded), after)
    with pytest.raises(ValueError, match=r"Merging changes base weights, but .* is quantised"):
        lora_null.merge(model)
    stock = PeftModel.from_pretrained(quantised(), tmp_path / "adapter").eval()
    with layout_kept(stock):
        torch.testing.assert_close(logits(stock), after, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantised", WHOLE_MODEL, indirect=True)
def test_factors_are_of_the_weight_that_the_layer_multiplies_by(quantised):
    model = quantised()
    with torch.no_grad():
        model(ids())  # changes the layout of some weights
    linear = model.model.layers[0].mlp.up_proj
    with layout_kept(model):
        used = linear(torch.eye(linear.in_features)).detach().t()
    assert (dequantised(linear) - used).norm() <= 5e-3 * used.norm()
    basis = torch.linalg.qr(torch.randn(linear.in_features, R)).Q
    lora_A, lora_B = factorize(linear, basis)
    assert (lora_B @ lora_A - used @ basis @ basis.t()).norm() <= 5e-3 * used.norm()


@pytest.mark.parametrize("quantised", WHOLE_MODEL, indirect=True)
def test_gradients_pass_through_the_base_after_an_evaluation(quantised, token_batches):
    model = quantised()
    with torch.no_grad():
        model(ids())
    covariances = lora_null.calibrate(model, token_batches(count=2), progress=False)
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
    with torch.no_grad():
        model(ids())
    layer = model.model.layers[1].mlp.up_proj
    x = torch.randn(3, layer.in_features, requires_grad=True)
    layer(x).sum().backward()
    expected = dequantised(layer).sum(0).expand_as(x)
    assert (x.grad - expected).norm() <= 1e-2 * expected.norm()


@pytest.mark.parametrize("quantised", PEFT, indirect=True)
def test_peft_layers(quantised, token_batches, tmp_path):
    covariances = lora_null.calibrate(quantised(), token_batches(), progress=False)

    def prepared(freeze_a=True):
        config = LoraConfig(r=R, lora_alpha=R, target_modules="all-linear")
        model = get_peft_model(quantised(), config).eval()
        return lora_null_peft.initialize_lora_null_weights(model, covariances, freeze_a=freeze_a, progress=False)

    with pytest.raises(ValueError, match="is quantised"):
        prepared(freeze_a=False)
    model = prepared()
    assert lora_null_peft.use_fused_kernels(model).patched == 0
    with model.disable_adapter():
        before = logits(model)
    assert torch.equal(logits(model), before)
    train(model)
    lora_null_peft.save_adapter(model, tmp_path / "adapter")
    stock = PeftModel.from_pretrained(quantised(), tmp_path / "adapter").eval()
    with layout_kept(stock):
        torch.testing.assert_close(logits(stock), logits(model), rtol=1e-4, atol=1e-5)


class Scaled(nn.Linear):
    """A linear layer of another library."""

    def forward(self, x):
        return 2 * super().forward(x)


def test_a_model_with_layers_of_another_class_is_pickled(llama, token_batches):
    model = llama()
    for linear in target_linears(model).values():
        linear.__class__ = Scaled
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
    train(model)
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    for other in (torch.load(file, weights_only=False), copy.deepcopy(model)):
        assert torch.equal(logits(other), logits(model))
        assert type(other.lm_head) is nn.Linear
        assert len(adapter_layers(other)) == 14
        assert lora_null.merge(other).model.layers[0].mlp.up_proj.__class__ is Scaled


class Mixin(abc.ABC):  # noqa: B024
    """Makes instances that no other class fits, as optimum-quanto's does."""


class Unfit(Mixin, nn.Linear):
    """A layer whose class cannot be changed."""


def test_a_layer_that_cannot_be_patched_is_refused_before_anything_changes(llama, calibrated, tmp_path):
    model, covariances = calibrated
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
    lora_null.save_adapter(model, tmp_path / "adapter")
    other = llama()
    mlp = other.model.layers[1].mlp
    unfit = Unfit(mlp.up_proj.in_features, mlp.up_proj.out_features, bias=False)
    unfit.weight, mlp.up_proj = mlp.up_proj.weight, unfit
    match = r"Unfit cannot be adapted in place .*initialize_lora_null_weights"
    with pytest.raises(ValueError, match=match):
        lora_null.initialize(other, covariances, lora_null.LoraNullConfig(r=R), progress=False)
    with pytest.raises(ValueError, match=match):
        lora_null.load_adapter(other, tmp_path / "adapter")
    assert not adapter_layers(other)
    assert all(parameter.requires_grad for parameter in other.parameters())


def test_a_weight_that_nobody_can_read_is_named(calibrated):
    model, covariances = calibrated
    linear = model.model.layers[1].mlp.up_proj
    linear.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj: The weight of this Linear .* be dequantised"):
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)


def test_calibration_leaves_the_layout_of_4_bit_weights(llama, token_batches):
    model = llama()
    up_proj = model.model.layers[0].mlp.up_proj
    up_proj.support_avx512bf16_for_cpu = True
    seen = []
    up_proj.register_forward_hook(lambda *_: seen.append(up_proj.support_avx512bf16_for_cpu))
    lora_null.calibrate(model, token_batches(), progress=False)
    assert seen and not any(seen)
    assert up_proj.support_avx512bf16_for_cpu


def test_that_trainers_want_adapters_of_peft_is_said(llama, calibrated, tmp_path, caplog):
    model, covariances = calibrated
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
    lora_null.save_adapter(model, tmp_path / "adapter")
    assert "initialize_lora_null_weights" not in caplog.text
    for start in (
        lambda model: lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False),
        lambda model: lora_null.load_adapter(model, tmp_path / "adapter", is_trainable=True, covariances=covariances),
    ):
        caplog.clear()
        forget_warnings()
        other = llama()
        other.is_quantized = True
        start(other)
        assert "transformers.Trainer" in caplog.text and "lora_null.peft.initialize_lora_null_weights" in caplog.text

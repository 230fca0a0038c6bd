"""Merging into a quantised base: its integer codes stay to the bit, its zero points take the adapter."""

import copy

import pytest
import torch
from adapter_tools import ids, learn
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_null
import lora_null.peft as lora_null_peft
from lora_null import LoraNullConfig
from lora_null.adapters.layer import adapter_layers, attach_adapter
from lora_null.models.layout import is_linear
from lora_null.models.quantised import dequantised
from lora_null.models.zero_points import zero_points
from lora_null.solver.pooling import ordinary


class HQQLinear(nn.Module):
    """What HQQ makes of a linear layer: no ``nn.Linear``, codes in one parameter, the rest in a dictionary."""

    def __init__(self, linear, nbits=4, group_size=8, axis=1, dtype=torch.float32):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias = None if linear.bias is None else linear.bias.detach().to(dtype)
        W = linear.weight.detach().float().reshape(-1, group_size)
        least, most = W.amin(1, keepdim=True), W.amax(1, keepdim=True)
        scale = (most - least).clamp(min=1e-4) / (2**nbits - 1)
        zero = -least / scale
        self.W_q = nn.Parameter((W / scale + zero).round().clamp(0, 2**nbits - 1).to(torch.uint8), requires_grad=False)
        self.meta = {"nbits": nbits, "group_size": group_size, "axis": axis, "shape": linear.weight.shape}
        self.meta |= {"scale": scale.to(dtype), "zero": zero.to(dtype)}

    def dequantize(self):
        codes = self.W_q.to(self.meta["scale"].dtype)
        return ((codes - self.meta["zero"]) * self.meta["scale"]).reshape(self.meta["shape"])

    def forward(self, x):
        return nn.functional.linear(x, self.dequantize(), self.bias)

    def state_dict(self, *args, destination=None, prefix="", keep_vars=False):
        state = {"W_q": self.W_q, "scale": self.meta["scale"], "zero": self.meta["zero"]}
        if destination is not None:
            destination.update({prefix + key: value for key, value in state.items()})
        return state


def imitated(linear, bits=4, group_size=8, dtype=torch.float32):
    return HQQLinear(linear, bits, group_size, dtype=dtype)


def hqq(linear, bits=4, group_size=8, dtype=torch.float32):
    core = pytest.importorskip("hqq.core.quantize")
    config = core.BaseQuantizeConfig(nbits=bits, group_size=group_size, axis=1)
    return core.HQQLinear(linear, config, compute_dtype=dtype, device="cpu", del_orig=False)


def torchao(linear, bits=4, group_size=8, dtype=torch.float32):
    quantization = pytest.importorskip("torchao.quantization")
    holder = nn.Sequential(linear.to(dtype))
    config = quantization.IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"),
        granularity=quantization.granularity.PerGroup(group_size),
        mapping_type=quantization.MappingType.ASYMMETRIC,
    )
    quantization.quantize_(holder, config)
    return holder[0]


FORMATS = [imitated, hqq, torchao]


def codes(layer):
    return (layer.W_q if hasattr(layer, "W_q") else layer.weight.qdata).clone()


def put(layer, L, r=3, scaling=1.5, seed=0, dtype=torch.float32):
    """Attach an adapter on means, of about a step of the quantisation in each weight."""
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(r, layer.in_features // L, generator=generator)
    B = torch.randn(layer.out_features, r, generator=generator) * 0.05
    return attach_adapter(layer, ordinary(A, L, "mean").to(dtype), B.to(dtype), scaling=scaling)


@pytest.mark.parametrize("quantise", FORMATS)
@settings(deadline=None, max_examples=25)
@given(
    st.sampled_from([2, 3, 4, 8]),
    st.sampled_from([8, 16, 24]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.sampled_from([4, 8, 12]),
    st.booleans(),
    st.integers(0, 99),
)
def test_the_merged_layer_is_the_adapted_one_and_its_codes_stay(quantise, bits, size, groups, multiple, m, bias, seed):
    torch.manual_seed(seed)
    linear = nn.Linear(size * groups * multiple, m, bias=bias)
    layer = quantise(linear, bits, size)
    before, codes_before = dequantised(layer).double(), codes(layer)
    put(layer, size * multiple, seed=seed)
    A, B = layer.lora_A.weight.detach().double(), layer.lora_B.weight.detach().double()
    x = torch.randn(2, 5, linear.in_features)
    adapted = layer(x).detach()
    holder = nn.Sequential(layer)
    lora_null.merge(holder)
    assert is_linear(layer) and not adapter_layers(holder) and "LoraNull" not in type(layer).__name__
    assert torch.equal(codes(layer), codes_before)
    want = before + 1.5 * B @ A
    # Codes, zero points and their difference are below 2^bits and what the change adds; each is rounded once.
    points = zero_points("layer", layer)
    unit = (2**bits + points.values.abs().max()) / torch.as_tensor(points.per_unit).abs().min()
    assert (dequantised(layer).double() - want).abs().max() <= 4 * torch.finfo(torch.float32).eps * unit
    torch.testing.assert_close(layer(x), adapted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("quantise", FORMATS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_zero_points_of_half_precision_are_rounded_once(quantise, dtype):
    torch.manual_seed(1)
    layer = quantise(nn.Linear(64, 12), 4, 16, dtype)
    before = zero_points("layer", layer)
    values, per_unit = before.values.double(), before.per_unit
    put(layer, 16)
    change = 1.5 * (layer.lora_B.weight.double() @ layer.lora_A.weight.double()[:, ::16])
    lora_null.merge(nn.Sequential(layer))
    after = zero_points("layer", layer).values
    assert after.dtype == dtype
    exact = values + per_unit * change
    assert torch.equal(after, exact.to(dtype)) and not torch.equal(after.double(), values)


@pytest.mark.parametrize("quantise", FORMATS)
def test_the_whole_way(quantise, llama, token_batches, tmp_path):
    def base():
        torch.manual_seed(0)
        model = llama()
        for block in model.model.layers:
            for parent in (block.self_attn, block.mlp):
                for name, child in list(parent.named_children()):
                    if isinstance(child, nn.Linear):
                        setattr(parent, name, quantise(child, 4, 8))
        return model.requires_grad_(False)

    def logits(model):
        with torch.no_grad():
            return model(ids()).logits

    model = base()
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    assert len(covariances) == 8
    low = lora_null.calibrate(base(), token_batches(), low_memory=True, progress=False)
    assert all(torch.equal(low[key], covariances[key]) for key in covariances)
    start = logits(model)
    config = LoraNullConfig(r=3, lora_alpha=5, train="b", group_pooling="auto")
    lora_null.initialize(model, covariances, config, progress=False)
    assert model.lora_null_state.config.group_pooling == 8 and len(adapter_layers(model)) == 14
    assert torch.equal(logits(model), start)
    model(input_ids=ids(), labels=ids()).loss.backward()
    assert all(layer.lora_B.weight.grad.norm() > 0 for layer in adapter_layers(model).values())
    learn(model)
    want = logits(model)
    assert (want - start).norm() > 1e-2 * start.norm()
    lora_null.save_adapter(model, tmp_path / "adapter")
    names = set(model.state_dict())
    assert {f"{name}.lora_B.weight" for name in adapter_layers(model)} <= names
    for trainable in (False, True):
        loaded = lora_null.load_adapter(base(), tmp_path / "adapter", is_trainable=trainable)
        torch.testing.assert_close(logits(loaded), want, rtol=1e-4, atol=1e-5)
    kept = {name: codes(layer) for name, layer in adapter_layers(loaded).items()}
    assert torch.equal(logits(copy.deepcopy(loaded)), logits(loaded))
    merged = lora_null.merge(loaded)
    torch.testing.assert_close(logits(merged), want, rtol=1e-4, atol=1e-4)
    assert all(torch.equal(codes(merged.get_submodule(name)), before) for name, before in kept.items())
    assert set(merged.state_dict()) == set(base().state_dict())


def test_what_rounding_takes_is_said(caplog):
    torch.manual_seed(1)
    for dtype, size in ((torch.bfloat16, 1e-3), (torch.bfloat16, 1.0), (torch.float32, 1e-3)):
        layer = put(imitated(nn.Linear(64, 12), 4, 16, dtype), 16, scaling=size)
        caplog.clear()
        lora_null.merge(nn.Sequential(layer))
        said = "Rounding the zero points to torch.bfloat16 changes the adapter of 0 by" in caplog.text
        assert said == ((dtype, size) == (torch.bfloat16, 1e-3))


def test_zero_points_of_tinygemm_are_added():
    """torchao's packed int4, which cannot be trained on a CPU and takes adapters that were trained elsewhere."""
    int4 = pytest.importorskip("torchao.prototype.quantization.int4")
    torch.manual_seed(0)
    for dtype, bound in ((torch.float32, 1e-5), (torch.bfloat16, 2e-2)):
        linear = nn.Linear(128, 32, bias=False, dtype=dtype)
        linear.weight = nn.Parameter(
            int4.Int4OpaqueTensor.from_hp(linear.weight.detach(), [1, 32]), requires_grad=False
        )
        before, x = linear.weight.qdata.clone(), torch.randn(5, 128, dtype=dtype)
        layer = put(linear, 32, scaling=10.0)
        with torch.no_grad():
            adapted = layer(x)
            assert (adapted - nn.Linear.forward(linear, x)).norm() > 0.1 * adapted.norm()
            lora_null.merge(nn.Sequential(layer))
            assert torch.equal(linear.weight.qdata, before)
            assert (linear(x) - adapted).norm() <= bound * adapted.norm()


def test_an_adapter_that_reads_inputs_apart_is_refused_and_nothing_changes():
    torch.manual_seed(0)
    holder = nn.Sequential(imitated(nn.Linear(16, 4)), imitated(nn.Linear(16, 4)))
    put(holder[0], 8)
    A = torch.randn(2, 16)
    attach_adapter(holder[1], A, torch.randn(4, 2))
    before = [layer.meta["zero"].clone() for layer in holder]
    with pytest.raises(ValueError, match=r"adapter of 1 reads the inputs of a group of 8 differently.*group_pooling=8"):
        lora_null.merge(holder)
    assert len(adapter_layers(holder)) == 2
    assert all(torch.equal(layer.meta["zero"], zero) for layer, zero in zip(holder, before, strict=True))
    with torch.no_grad():
        holder[1].lora_A.weight.copy_(ordinary(A[:, ::4], 4, "mean"))
    with pytest.raises(ValueError, match="a group of 8 differently"):
        lora_null.merge(holder)
    with torch.no_grad():
        holder[1].lora_A.weight.copy_(ordinary(A[:, ::8], 8, "mean"))
        holder[1].lora_B.weight.fill_(3e38)
    with pytest.raises(ValueError, match="zero points of 1 would hold NaN or Inf"):
        lora_null.merge(holder)
    assert all(torch.equal(layer.meta["zero"], zero) for layer, zero in zip(holder, before, strict=True))


@pytest.mark.parametrize(
    "change", [{"axis": 0}, {"group_size": None}, {"group_size": 12}, {"zero": None}, {"scale": None}], ids=str
)
def test_ways_of_hqq_without_groups_of_inputs_are_refused(change):
    layer = imitated(nn.Linear(16, 4))
    for key, value in change.items():
        if value is None and key != "group_size":
            del layer.meta[key]
        else:
            layer.meta[key] = value
    put(layer, 8) if "scale" in layer.meta else None
    with pytest.raises(ValueError, match=r"^0: HQQ has quantised it with .*expected axis=1"):
        zero_points("0", layer)


def test_group_sizes_that_differ_are_named(llama, token_batches):
    model = llama()
    for block in model.model.layers:
        block.mlp.down_proj = imitated(block.mlp.down_proj, group_size=16)
        block.mlp.up_proj = imitated(block.mlp.up_proj, group_size=8)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    config = LoraNullConfig(r=2, group_pooling="auto", target_modules=["up_proj", "down_proj"])
    with pytest.raises(ValueError, match=r"several group sizes, \{8: .*up_proj.*, 16: .*down_proj"):
        lora_null.initialize(model, covariances, config, progress=False)
    assert not adapter_layers(model)


def test_a_scaling_set_by_hand_is_refused_by_the_state_dict_of_such_a_layer():
    layer = put(imitated(nn.Linear(16, 4)), 8)
    assert {"W_q", "zero", "lora_A.weight", "lora_B.weight"} <= set(layer.state_dict())
    layer.scaling = 3.0
    with pytest.raises(ValueError, match="scaling is 3, set by hand"):
        nn.Sequential(layer).state_dict()


def loaded(folder, **options):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, device_map="cpu", **options).eval()


def torchao_base(llama, tokenizer, path):
    """Return a model that transformers has quantised, after saving it as ``base``."""
    quantization = pytest.importorskip("torchao.quantization")
    from transformers import TorchAoConfig

    llama().save_pretrained(path / "full")
    kind = quantization.IntxWeightOnlyConfig(
        weight_dtype=torch.int4,
        granularity=quantization.granularity.PerGroup(8),
        mapping_type=quantization.MappingType.ASYMMETRIC,
    )
    model = loaded(path / "full", quantization_config=TorchAoConfig(kind))
    model.save_pretrained(path / "base")
    tokenizer.save_pretrained(path / "base")
    return model


def test_a_merged_torchao_model_is_served_by_transformers(llama, tokenizer, token_batches, tmp_path, run):
    model = torchao_base(llama, tokenizer, tmp_path)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    config = LoraNullConfig(r=3, train="b_in_basis", energy=0, group_pooling="auto")
    want = learn(lora_null.initialize(model, covariances, config, progress=False))(ids()).logits
    lora_null.save_adapter(model, tmp_path / "adapter")
    before = {name: codes(layer) for name, layer in adapter_layers(model).items()}
    code, _, error = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert code == 0, error
    merged = loaded(tmp_path / "merged")
    assert all(torch.equal(codes(merged.get_submodule(name)), kept) for name, kept in before.items())
    torch.testing.assert_close(merged(ids()).logits, want, rtol=1e-4, atol=1e-5)
    assert (want - loaded(tmp_path / "base")(ids()).logits).norm() > 1e-2 * want.norm()


def test_peft_qa_lora_of_others_goes_into_zero_points_by_the_command_line(llama, tokenizer, tmp_path, run):
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.variants import QALoraLinearVariant

    base = torchao_base(llama, tokenizer, tmp_path)
    # PEFT puts it on GPTQ layers only, so its own forward is called on the factors that it would save.
    torch.manual_seed(0)
    other = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    config = other.peft_config["default"]
    config.use_qalora, config.qalora_group_size = True, 8
    for name, layer in other.get_base_model().named_modules():
        if hasattr(layer, "lora_A"):
            QALoraLinearVariant.init(layer, "default", config)
            torch.nn.init.normal_(layer.lora_B["default"].weight, std=0.02)
            base.get_submodule(name).register_forward_hook(
                lambda _, args, y, layer=layer: QALoraLinearVariant.forward(layer, "default", args[0], y)
            )
    other.save_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        want = base(ids()).logits
    code, _, error = run("merge", tmp_path / "base", tmp_path / "adapter", tmp_path / "merged")
    assert code == 0, error
    merged, before = loaded(tmp_path / "merged"), loaded(tmp_path / "base")
    with torch.no_grad():
        torch.testing.assert_close(merged(ids()).logits, want, rtol=1e-3, atol=1e-4)
        assert (want - before(ids()).logits).norm() > 1e-2 * want.norm()
    for name in ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"):
        assert torch.equal(codes(merged.get_submodule(name)), codes(before.get_submodule(name)))


def test_a_merged_hqq_model_is_served_by_hqq(llama, token_batches, tmp_path):
    core, models = pytest.importorskip("hqq.core.quantize"), pytest.importorskip("hqq.models.hf.base")
    model, own = llama(), models.AutoHQQHFModel
    quantised = core.BaseQuantizeConfig(nbits=4, group_size=8, axis=1)
    own.quantize_model(model, quantised, compute_dtype=torch.float32, device="cpu")
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    config = LoraNullConfig(r=3, group_pooling="auto")
    want = learn(lora_null.initialize(model, covariances, config, progress=False))(ids()).logits
    own.save_quantized(lora_null.merge(model), str(tmp_path / "merged"))
    merged = own.from_quantized(str(tmp_path / "merged"), compute_dtype=torch.float32, device="cpu")
    torch.testing.assert_close(merged(ids()).logits, want, rtol=1e-4, atol=1e-4)


def test_adapters_that_peft_puts_on_hqq_are_merged_too(llama, token_batches, tmp_path):
    core, models = pytest.importorskip("hqq.core.quantize"), pytest.importorskip("hqq.models.hf.base")
    from peft import LoraConfig, get_peft_model

    def base():
        model = llama()
        quantised = core.BaseQuantizeConfig(nbits=4, group_size=8, axis=1)
        models.AutoHQQHFModel.quantize_model(model, quantised, compute_dtype=torch.float32, device="cpu")
        return model

    model = base()
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    model = get_peft_model(model, LoraConfig(r=3, target_modules=["q_proj", "up_proj"]))
    lora_null_peft.initialize_lora_null_weights(model, covariances, group_pooling="auto", progress=False)
    assert torch.equal(model(ids()).logits, base()(ids()).logits)
    want = learn(model)(ids()).logits
    lora_null_peft.save_adapter(model, tmp_path / "adapter")
    merged = lora_null.merge(lora_null.load_adapter(base(), tmp_path / "adapter"))
    torch.testing.assert_close(merged(ids()).logits, want, rtol=1e-4, atol=1e-5)

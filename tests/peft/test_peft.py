"""PEFT models: initialisation, freezing through PEFT's own switches, saving, the fused forward and its limits."""

import json
import logging

import pytest
import torch
from adapter_tools import ids, learn
from peft import LoHaConfig, LoraConfig, PeftModel, get_peft_model
from peft.tuners import lora
from safetensors.torch import load_file

import lora_null
from lora_null import peft as lora_null_peft
from lora_null.system.log import forget_warnings

R = 6


@pytest.fixture
def covariances(calibrated):
    return calibrated[1]


def peft_llama(llama, dtype=torch.float32, **config):
    return get_peft_model(
        llama(dtype), LoraConfig(**{"r": R, "lora_alpha": 2 * R, "target_modules": "all-linear"} | config)
    )


def test_frozen_a_is_an_exact_no_op(llama, covariances):
    before = llama()(ids()).logits
    model = peft_llama(llama)
    lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)
    assert torch.equal(model(ids()).logits, before)


def test_frozen_a_stays_frozen_through_pefts_switches(llama, covariances, tmp_path):
    model = peft_llama(llama)
    lora_null_peft.initialize_lora_null_weights(model, covariances, train="b", progress=False)

    def trainable(peft_model):
        return {name.split(".")[-3] for name, parameter in peft_model.named_parameters() if parameter.requires_grad}

    assert trainable(model) == {"lora_B"}
    model.set_adapter("default")
    assert trainable(model) == {"lora_B"}
    with model.disable_adapter():
        pass
    assert trainable(model) == {"lora_B"}
    learn(model)
    lora_null_peft.save_adapter(model, tmp_path / "adapter")
    assert trainable(PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"), is_trainable=True)) > {"lora_B"}
    assert trainable(lora_null_peft.load_trainable(llama(), tmp_path / "adapter")) == {"lora_B"}


def test_same_start_as_a_patched_plain_model(llama, calibrated):
    plain, covariances = calibrated
    lora_null.initialize(plain, covariances, lora_null.LoraNullConfig(r=R), progress=False)
    model = peft_llama(llama)
    lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)
    for name, layer in lora_null_peft.lora_layers(model).items():
        assert torch.equal(layer.lora_A["default"].weight, plain.get_submodule(name).lora_A.weight)


@pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen_a", "trained_a"])
def test_saved_adapter_fits_the_untouched_base(llama, covariances, tmp_path, freeze_a):
    model = peft_llama(llama)
    lora_null_peft.initialize_lora_null_weights(model, covariances, freeze_a=freeze_a, progress=False)
    before = llama()(ids()).logits
    assert (model(ids()).logits - before).norm() <= 1e-6 * before.norm()
    learn(model)
    lora_null_peft.save_adapter(model, tmp_path / "adapter")
    expected = model(ids()).logits
    for loaded in (
        PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")),
        lora_null.load_adapter(llama(), tmp_path / "adapter"),
    ):
        assert (loaded(ids()).logits - expected).norm() <= 1e-5 * expected.norm()


def test_training_on_keeps_what_is_known_of_the_base(llama, covariances, tmp_path):
    model = peft_llama(llama)
    lora_null_peft.initialize_lora_null_weights(model, covariances, train="b", progress=False)
    lora_null_peft.save_adapter(model, tmp_path / "first")
    again = lora_null_peft.load_trainable(llama(), tmp_path / "first")
    lora_null_peft.save_adapter(again, tmp_path / "second")
    first, second = (json.loads((tmp_path / name / "lora_null.json").read_text()) for name in ("first", "second"))
    assert first["base_fingerprint"] and first["energies"]
    assert (second["base_fingerprint"], second["energies"]) == (first["base_fingerprint"], first["energies"])


def test_ranks_may_differ_between_layers(llama, covariances, tmp_path):
    model = peft_llama(llama, rank_pattern={"q_proj": 2}, alpha_pattern={"q_proj": 8})
    lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)
    learn(model)
    expected = model(ids()).logits
    lora_null_peft.save_adapter(model, tmp_path / "adapter")
    tensors = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert {tensor.shape[0] for name, tensor in tensors.items() if "lora_A" in name} == {R}
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    assert (loaded(ids()).logits - expected).norm() <= 1e-5 * expected.norm()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_fused_forward_agrees_and_can_be_undone(llama, covariances, dtype):
    model = peft_llama(llama, dtype)
    lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)
    learn(model)
    names = list(model.state_dict())

    def run():
        model.zero_grad()
        output = model(ids(), labels=ids())
        output.loss.backward()
        gradients = {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}
        return output.logits.detach(), gradients

    def error(gradients):
        """Return the relative error of all gradients together, each weighted alike."""
        assert gradients.keys() == truth[1].keys()
        return sum(float((gradients[name] - g).norm() / g.norm()) ** 2 for name, g in truth[1].items()) ** 0.5

    model.double()
    truth = run()
    model.to(dtype)
    eager = run()
    handle = lora_null_peft.use_fused_kernels(model)
    assert handle.patched == 14 and not handle.skipped
    assert list(model.state_dict()) == names
    assert {status.module_type for status in model.get_layer_status()} == {"lora.Linear"}
    fused = run()
    assert (fused[0] - truth[0]).norm() <= 2 * (eager[0] - truth[0]).norm()
    assert error(fused[1]) <= 2 * error(eager[1])
    handle.undo()
    assert {type(module) for module in model.modules() if isinstance(module, lora.LoraLayer)} == {lora.Linear}
    assert torch.equal(run()[0], eager[0])


class TestFallback:
    @pytest.fixture
    def model(self, llama, covariances):
        model = peft_llama(llama)
        lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)
        learn(model)
        return model

    def agrees(self, model, caplog, reason, **inputs):
        """Compare with PEFT's own layers and count the log lines about falling back."""
        expected = model(ids(), **inputs).logits
        handle = lora_null_peft.use_fused_kernels(model)
        forget_warnings()
        with caplog.at_level(logging.WARNING, "lora_null"):
            assert torch.equal(model(ids(), **inputs).logits, expected)
            model(ids(), **inputs)
        lines = [record.message for record in caplog.records if "falls back" in record.message]
        assert len(lines) == (1 if reason else 0), lines
        assert not reason or reason in lines[0]
        handle.undo()

    def test_disabled_and_merged_adapters(self, model, caplog):
        with model.disable_adapter():
            self.agrees(model, caplog, None)
        model.merge_adapter()
        self.agrees(model, caplog, None)

    def test_several_active_adapters(self, model, caplog):
        model.add_adapter("second", LoraConfig(r=3, target_modules="all-linear", init_lora_weights=False))
        model.base_model.set_adapter(["default", "second"])
        self.agrees(model, caplog, "several active adapters")

    def test_adapters_in_different_layers(self, model, caplog):
        """Each layer computes the one that it holds, wherever that stands among the active ones."""
        other = {"r": 3, "target_modules": ["up_proj"], "init_lora_weights": False}
        model = get_peft_model(model.unload(), LoraConfig(**other | {"target_modules": ["q_proj"]}))
        model.add_adapter("second", LoraConfig(**other))
        model.base_model.set_adapter(["default", "second"])
        expected = model(ids()).logits
        lora_null_peft.use_fused_kernels(model)
        forget_warnings()
        with caplog.at_level(logging.WARNING, "lora_null"):
            assert (model(ids()).logits - expected).norm() <= 1e-5 * expected.norm()
        assert "falls back" not in caplog.text

    def test_an_adapter_of_another_kind_in_between(self, llama):
        """A mixed model puts one adapted layer into another."""
        model = get_peft_model(llama(), LoHaConfig(r=2, target_modules=["q_proj"], init_weights=False), mixed=True)
        model.add_adapter("second", LoraConfig(r=3, target_modules=["q_proj"], init_lora_weights=False))
        model.set_adapter(["default", "second"])
        expected = model(ids()).logits
        lora_null_peft.use_fused_kernels(model)
        assert torch.equal(model(ids()).logits, expected)

    def test_mixed_batches(self, model, caplog):
        model.eval()
        self.agrees(model, caplog, "extra forward arguments", adapter_names=["default", "__base__"])

    def test_strict_mode_turns_it_into_an_error(self, model, monkeypatch):
        model.add_adapter("second", LoraConfig(r=3, target_modules="all-linear"))
        model.base_model.set_adapter(["default", "second"])
        lora_null_peft.use_fused_kernels(model)
        monkeypatch.setenv("LORA_NULL_STRICT", "1")
        with pytest.raises(RuntimeError, match="several active adapters"):
            model(ids())

    def test_dora_layers(self, llama, caplog):
        model = peft_llama(llama, use_dora=True, target_modules=["q_proj"])
        self.agrees(model, caplog, "the variant DoraLinearVariant")

    def test_a_model_without_lora_says_so(self, llama, caplog):
        forget_warnings()
        with caplog.at_level(logging.WARNING, "lora_null"):
            assert lora_null_peft.use_fused_kernels(llama()).patched == 0
        assert "patched no layer" in caplog.text


class TestBadInput:
    def test_a_damaged_last_layer_leaves_the_others_as_they_were(self, llama, covariances):
        model = peft_llama(llama)
        last = model.get_base_model().model.layers[1].mlp.down_proj.base_layer
        last.weight.data[0, 0] = float("nan")
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: factorize: .*damaged checkpoint"):
            lora_null_peft.initialize_lora_null_weights(
                model, covariances, freeze_a=False, verify_base=False, progress=False
            )
        after = model.state_dict()
        assert all(torch.equal(value, after[name]) for name, value in before.items() if not value.isnan().any())

    def test_covariances_of_another_model(self, llama, covariances):
        model = get_peft_model(llama(hidden_size=32), LoraConfig(r=2, target_modules="all-linear"))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="collected on another model"):
            lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("own", [False, True], ids=["of the plain model", "of the PEFT model"])
    def test_covariances_of_other_weights_are_refused(self, llama, covariances, token_batches, own):
        if own:
            covariances = lora_null.calibrate(peft_llama(llama), token_batches(), progress=False)
        some = {"target_modules": ["q_proj"]}
        lora_null_peft.initialize_lora_null_weights(peft_llama(llama, **some), covariances, progress=False)
        other = get_peft_model(llama(seed=5), LoraConfig(r=R, **some))
        before = {name: value.clone() for name, value in other.state_dict().items()}
        with pytest.raises(ValueError, match=r"collected on other weights .* pass verify_base=False"):
            lora_null_peft.initialize_lora_null_weights(other, covariances, progress=False)
        assert all(torch.equal(before[name], value) for name, value in other.state_dict().items())
        lora_null_peft.initialize_lora_null_weights(other, covariances, verify_base=False, progress=False)
        assert any("coefficients" in name for name, p in other.named_parameters() if p.requires_grad)

    def test_an_adapter_goes_on_with_its_own_base_only(self, llama, covariances, tmp_path):
        model = peft_llama(llama)
        lora_null_peft.initialize_lora_null_weights(model, covariances, train="b", progress=False)
        lora_null_peft.save_adapter(learn(model), tmp_path / "adapter")
        other = llama(seed=5)
        names = list(other.state_dict())
        with pytest.raises(ValueError, match=r"trained on other weights .* verify_base=False"):
            lora_null_peft.load_trainable(other, tmp_path / "adapter")
        assert list(other.state_dict()) == names
        lora_null_peft.load_trainable(other, tmp_path / "adapter", verify_base=False)
        lora_null_peft.load_trainable(llama(torch.bfloat16), tmp_path / "adapter")

    def test_a_weight_of_two_modules_is_named(self, llama, token_batches, caplog):
        model = llama(tie_word_embeddings=True)
        head = lora_null.LoraNullConfig(target_modules=["lm_head"])
        covariances = lora_null.calibrate(model, token_batches(), head, progress=False)
        model = get_peft_model(model, LoraConfig(r=R, target_modules=["lm_head"]))
        lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)
        assert "lm_head shares its weight with another module" in caplog.text

    def test_a_model_with_adapters_of_ours(self, llama, covariances, tmp_path):
        model = lora_null_peft.initialize_lora_null_weights(peft_llama(llama), covariances, progress=False)
        lora_null_peft.save_adapter(model, tmp_path / "adapter")
        own = lora_null.initialize(llama(), covariances, lora_null.LoraNullConfig(r=R), progress=False)
        with pytest.raises(ValueError, match="14 lora_null adapters already"):
            lora_null_peft.load_trainable(own, tmp_path / "adapter")
        with pytest.raises(ValueError, match="no LoRA layer with an adapter named 'default'"):
            lora_null_peft.save_adapter(own, tmp_path / "other")
        model = get_peft_model(own, LoraConfig(r=R, target_modules=["q_proj"]))
        with pytest.raises(ValueError, match="14 lora_null adapters already"):
            lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)

    def test_covariances_of_fewer_layers(self, llama, token_batches):
        few = lora_null.LoraNullConfig(target_modules=["q_proj"])
        covariances = lora_null.calibrate(llama(), token_batches(), few, progress=False)
        with pytest.raises(ValueError, match="no entry for 12 of 14 target layers"):
            lora_null_peft.initialize_lora_null_weights(peft_llama(llama), covariances, progress=False)

    def test_an_unknown_adapter(self, llama, covariances):
        with pytest.raises(ValueError, match="named 'other'"):
            lora_null_peft.initialize_lora_null_weights(peft_llama(llama), covariances, adapter_name="other")

    def test_a_rank_above_the_number_of_inputs(self, llama, covariances):
        with pytest.raises(ValueError, match="r=49 is larger than"):
            lora_null_peft.initialize_lora_null_weights(peft_llama(llama, r=49), covariances, progress=False)

    @pytest.mark.parametrize("again", [True, False], ids=["frozen_a", "trained_a"])
    def test_a_base_that_is_shifted_already(self, llama, covariances, again):
        model = peft_llama(llama)
        lora_null_peft.initialize_lora_null_weights(model, covariances, freeze_a=False, progress=False)
        before = model(ids()).logits
        with pytest.raises(ValueError, match="was initialised with freeze_a=False before"):
            lora_null_peft.initialize_lora_null_weights(model, covariances, freeze_a=again, progress=False)
        assert torch.equal(model(ids()).logits, before)

    def test_a_merged_adapter(self, llama, covariances):
        model = peft_llama(llama, init_lora_weights=False)
        model.merge_adapter()
        with pytest.raises(ValueError, match="has its adapter merged"):
            lora_null_peft.initialize_lora_null_weights(model, covariances, progress=False)

    def test_a_plain_model_with_peft_adapters(self, llama, covariances, token_batches):
        model = peft_llama(llama)
        own = lora_null.calibrate(model, token_batches(), progress=False)
        assert len(own) == len(covariances)
        with pytest.raises(ValueError, match="initialize_lora_null_weights"):
            lora_null.initialize(model, own, lora_null.LoraNullConfig(r=2), progress=False)
        lora_null_peft.initialize_lora_null_weights(model, own, progress=False)


def test_fusing_twice_can_still_be_undone(llama):
    model = peft_llama(llama)
    lora_null_peft.use_fused_kernels(model)
    handle = lora_null_peft.use_fused_kernels(model)
    assert handle.patched == 14
    handle.undo()
    assert {type(module) for module in model.modules() if isinstance(module, lora.LoraLayer)} == {lora.Linear}


def test_a_model_without_values_gets_the_fused_forward(llama):
    """As PEFT makes it with low_cpu_mem_usage, before the values come."""
    with torch.device("meta"):
        model = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"]))
    assert lora_null_peft.use_fused_kernels(model).patched == 2

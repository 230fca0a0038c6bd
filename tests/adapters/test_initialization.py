"""Initialisation of a patched model, in both modes."""

import os
import subprocess
import sys

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

import lora_null
from lora_null.adapters.layer import adapter_layers, disable_adapters
from lora_null.models.targets import target_linears

R = 6


def ids(seed=3):
    return torch.randint(97, (2, 20), generator=torch.Generator().manual_seed(seed))


def train(model, steps=8, lr=5e-3, weight_decay=0.0):
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=lr, weight_decay=weight_decay)
    for step in range(steps):
        batch = ids(step)
        loss = model(batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_frozen_a_leaves_logits_bit_identical(llama, token_batches, dtype):
    model = llama(dtype)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    before = model(ids()).logits
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
    assert torch.equal(model(ids()).logits, before)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-6), (torch.bfloat16, 2e-2)], ids=["fp32", "bf16"])
def test_trained_a_keeps_logits_to_rounding(llama, token_batches, dtype, bound):
    model = llama(dtype)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    before = model(ids()).logits.double()
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, freeze_a=False), progress=False)
    after = model(ids()).logits.double()
    assert not torch.equal(after, before) or dtype != torch.float32
    assert (after - before).norm() <= bound * before.norm()


def test_shifted_bf16_base_is_the_pretrained_weight_to_one_rounding(llama, token_batches):
    # Measured on 1024 x 1024: the effective weight moves 1.6e-3 relative; one bf16 rounding is 2^-9 = 2e-3 at most.
    model = llama(torch.bfloat16)
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    before = {name: linear.weight.double() for name, linear in target_linears(model).items()}
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, freeze_a=False), progress=False)
    for name, layer in adapter_layers(model).items():
        effective = layer.weight.double() + layer.lora_B.weight.double() @ layer.lora_A.weight.double()
        assert (effective - before[name]).norm() <= 2e-3 * before[name].norm(), name


def test_only_the_adapters_are_trained(calibrated):
    model, covariances = calibrated
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, train="b"), progress=False)
    names = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert names == {f"{name}.lora_B.weight" for name in target_linears(model)}
    assert len(names) == 14
    assert not any("lm_head" in name for name in names)


def test_frozen_a_keeps_its_promise_for_any_b(calibrated):
    # DESIGN: ||dW X||_F <= ||B||_2 sqrt(D_1) (sum of the r smallest eigenvalues)^(1/2), X the calibration inputs.
    model, covariances = calibrated
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, train="b"), progress=False)
    for name, layer in adapter_layers(model).items():
        C = covariances[name].double()
        lora_A = layer.lora_A.weight.double()
        lora_B = torch.randn(layer.out_features, R, dtype=torch.float64)
        change = lora_B @ lora_A
        seen = torch.trace(change @ C @ change.T).clamp(min=0).sqrt()
        smallest = torch.linalg.eigvalsh(C)[:R].clamp(min=0).sum().sqrt()
        largest_D = torch.linalg.eigvalsh(lora_A @ lora_A.T)[-1]
        bound = torch.linalg.matrix_norm(lora_B, 2) * largest_D.sqrt() * smallest
        assert seen <= bound * (1 + 1e-3) + 1e-5, name


def test_training_b_from_zero_equals_training_it_from_b0_on_the_shifted_base(llama, token_batches):
    frozen, shifted = llama(), llama()
    covariances = lora_null.calibrate(frozen, token_batches(), progress=False)
    lora_null.initialize(frozen, covariances, lora_null.LoraNullConfig(r=R, train="b"), progress=False)
    lora_null.initialize(shifted, covariances, lora_null.LoraNullConfig(r=R, freeze_a=False), progress=False)
    for layer in adapter_layers(shifted).values():
        layer.lora_A.weight.requires_grad_(False)
    ours, theirs = train(frozen)(ids()).logits, train(shifted)(ids()).logits
    # Adam divides by the root of the second moment, which magnifies rounding of tiny gradients.
    assert (ours - theirs).norm() <= 1e-3 * ours.norm()


def test_disabled_adapters_give_the_pretrained_model_in_both_modes(llama, token_batches):
    for freeze_a in (True, False):
        model = llama()
        before = model(ids()).logits
        covariances = lora_null.calibrate(model, token_batches(), progress=False)
        config = lora_null.LoraNullConfig(r=R, freeze_a=freeze_a)
        train(lora_null.initialize(model, covariances, config, progress=False))
        assert (model(ids()).logits - before).norm() > 1e-2 * before.norm()
        with disable_adapters(model):
            assert (model(ids()).logits - before).norm() <= 1e-6 * before.norm()
        assert all(layer.adapter_enabled for layer in adapter_layers(model).values())


def test_merging_returns_plain_layers_with_the_trained_function(llama, token_batches):
    for freeze_a in (True, False):
        model = llama()
        covariances = lora_null.calibrate(model, token_batches(), progress=False)
        config = lora_null.LoraNullConfig(r=R, lora_alpha=2 * R, freeze_a=freeze_a)
        train(lora_null.initialize(model, covariances, config, progress=False))
        trained = model(ids()).logits
        names = set(llama().state_dict())
        merged = lora_null.merge(model)
        assert (merged(ids()).logits - trained).norm() <= 1e-6 * trained.norm()
        assert set(merged.state_dict()) == names
        assert {type(linear) for linear in target_linears(merged).values()} == {nn.Linear}
        assert not hasattr(merged, "lora_null_state")


def test_initialisation_is_deterministic(llama, token_batches):
    states = []
    for _ in range(2):
        model = llama()
        covariances = lora_null.calibrate(model, token_batches(), progress=False)
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
        states.append({name: layer.lora_A.weight.clone() for name, layer in adapter_layers(model).items()})
    assert all(torch.equal(states[0][name], states[1][name]) for name in states[0])


def test_processes_divide_the_solves_and_agree(calibrated, tmp_path):
    model, covariances = calibrated
    covariances.save(tmp_path / "covariances")
    model.save_pretrained(tmp_path / "model")
    script = """
import os, sys
import torch, torch.distributed as dist
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
import lora_null
from lora_null.adapters.layer import adapter_layers
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + os.path.abspath("rendezvous"), rank=rank, world_size=2)
solved = []
many = sys.modules["lora_null.solver.null_spaces"]
original = many.null_space
many.null_space = lambda *args, **kwargs: solved.append(1) or original(*args, **kwargs)
model = AutoModelForCausalLM.from_pretrained("model")
config = lora_null.LoraNullConfig(r=6, train="b")
lora_null.initialize(model, lora_null.Covariances.load("covariances"), config, progress=False)
factors = {name: layer.lora_A.weight.detach() for name, layer in adapter_layers(model).items()}
save_file(factors, f"factors{rank}.safetensors", metadata={"solved": str(len(solved))})
dist.destroy_process_group()
"""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen([sys.executable, "-c", script, str(rank)], cwd=tmp_path, env=environment) for rank in range(2)
    ]
    assert [process.wait(timeout=120) for process in processes] == [0, 0]
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, train="b"), progress=False)
    first, second = (load_file(str(tmp_path / f"factors{rank}.safetensors")) for rank in range(2))
    for name, layer in adapter_layers(model).items():
        assert torch.equal(first[name], second[name])
        torch.testing.assert_close(first[name], layer.lora_A.weight.detach(), rtol=1e-4, atol=1e-6)
    counts = []
    for rank in range(2):
        with safe_open(str(tmp_path / f"factors{rank}.safetensors"), "pt") as file:
            counts.append(int(file.metadata()["solved"]))
    assert sum(counts) == len(covariances) and min(counts) > 0


class TestOffloadedModel:
    """Weights that accelerate keeps elsewhere, on meta between forwards."""

    @pytest.fixture
    def offloaded(self, llama):
        from accelerate import cpu_offload

        model = cpu_offload(llama(), execution_device="cpu")
        assert all(linear.weight.is_meta for linear in target_linears(model).values())
        return model

    def test_frozen_a_trains_and_saves_as_without_offload(self, llama, offloaded, calibrated, token_batches, tmp_path):
        plain, covariances = calibrated
        found = lora_null.calibrate(offloaded, token_batches(), progress=False)
        for model, own in ((plain, covariances), (offloaded, found)):
            lora_null.initialize(model, own, lora_null.LoraNullConfig(r=R), progress=False)
            train(model, steps=3)
        torch.testing.assert_close(offloaded(ids()).logits, plain(ids()).logits)
        lora_null.save_adapter(offloaded, tmp_path / "adapter")
        loaded = lora_null.load_adapter(llama(), tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids()).logits, plain(ids()).logits)

    def test_what_would_be_lost_is_refused(self, offloaded, calibrated):
        covariances = calibrated[1]
        with pytest.raises(ValueError, match="is offloaded"):
            lora_null.initialize(offloaded, covariances, lora_null.LoraNullConfig(r=R, freeze_a=False), progress=False)
        lora_null.initialize(offloaded, covariances, lora_null.LoraNullConfig(r=R), progress=False)
        expected = train(offloaded, steps=3)(ids()).logits
        with pytest.raises(ValueError, match=r"Merging changes base weights, but .* is offloaded"):
            lora_null.merge(offloaded)
        assert torch.equal(offloaded(ids()).logits, expected)


class TestQuantisedBase:
    """A base with integer weights, imitated by a linear layer that keeps its weight packed, as bitsandbytes does."""

    class PackedLinear(nn.Linear):
        def pack(self):
            self.scale = self.weight.detach().abs().amax() / 127
            packed = (self.weight.detach() / self.scale).round().to(torch.int8)
            self.weight = nn.Parameter(packed.flatten()[:, None], requires_grad=False)
            return self

        def forward(self, x):
            weight = self.weight.view(self.out_features, self.in_features) * self.scale
            return nn.functional.linear(x, weight, self.bias)

    def packed(self, llama):
        model = llama()
        for linear in target_linears(model).values():
            linear.__class__ = self.PackedLinear
            linear.pack()
        return model

    @pytest.fixture(autouse=True)
    def dequantise(self, monkeypatch):
        import peft.utils.integrations as integrations

        def dense(module):
            return module.weight.view(module.out_features, module.in_features) * module.scale

        monkeypatch.setattr(integrations, "dequantize_module_weight", dense)

    def test_frozen_a_is_an_exact_no_op_and_trains(self, llama, token_batches, tmp_path):
        model = self.packed(llama)
        before = model(ids()).logits
        covariances = lora_null.calibrate(model, token_batches(), progress=False)
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
        assert torch.equal(model(ids()).logits, before)
        trained = train(model)(ids()).logits
        assert (trained - before).norm() > 1e-2 * before.norm()
        lora_null.save_adapter(model, tmp_path / "adapter")
        loaded = lora_null.load_adapter(self.packed(llama), tmp_path / "adapter")
        torch.testing.assert_close(loaded(ids()).logits, trained)

    def test_what_it_cannot_represent_is_refused(self, llama, calibrated):
        covariances, model = calibrated[1], self.packed(llama)
        with pytest.raises(ValueError, match="is quantised"):
            lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R, freeze_a=False), progress=False)
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
        with pytest.raises(ValueError, match=r"Merging changes base weights, but .* is quantised"):
            lora_null.merge(model)


class TestBadInput:
    def unchanged(self, model, before):
        assert not adapter_layers(model)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        assert all(parameter.requires_grad for parameter in model.parameters())

    def refused(self, model, covariances, config, match):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=match):
            lora_null.initialize(model, covariances, config, progress=False)
        self.unchanged(model, before)

    def test_unknown_target_modules(self, calibrated):
        self.refused(*calibrated, lora_null.LoraNullConfig(r=2, target_modules=["query"]), r"\['query'\].*q_proj")

    def test_rank_above_the_number_of_inputs(self, calibrated):
        self.refused(*calibrated, lora_null.LoraNullConfig(r=49), r"r=49 is larger than d=48, .* inputs of .*q_proj")

    def test_covariances_of_another_width(self, llama, calibrated):
        self.refused(llama(hidden_size=32), calibrated[1], lora_null.LoraNullConfig(r=2), "collected on another model")

    def test_covariances_of_fewer_layers(self, llama, calibrated):
        model = llama(num_hidden_layers=3)
        self.refused(model, calibrated[1], lora_null.LoraNullConfig(r=2), "no entry for 7 of 21 target layers")

    def test_a_model_without_linears(self, calibrated):
        model = nn.Sequential(nn.Embedding(4, 4))
        self.refused(model, calibrated[1], lora_null.LoraNullConfig(r=2), "no linear layer to adapt")

    def test_a_model_that_is_initialised_already(self, calibrated):
        model, covariances = calibrated
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=2), progress=False)
        with pytest.raises(ValueError, match="14 lora_null adapters already"):
            lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=2), progress=False)

    def test_covariances_of_other_weights(self, llama, calibrated):
        config, other = lora_null.LoraNullConfig(r=2), llama(seed=5)
        self.refused(other, calibrated[1], config, r"collected on other weights .* pass verify_base=False")
        lora_null.initialize(other, calibrated[1], config, verify_base=False, progress=False)
        some = lora_null.LoraNullConfig(r=2, target_modules=["q_proj"])
        lora_null.initialize(llama(), calibrated[1], some, progress=False)

    def test_an_invalid_regular_expression(self, calibrated):
        self.refused(*calibrated, lora_null.LoraNullConfig(r=2, target_modules="["), "not a regular expression")

    def test_tied_weights_cannot_be_shifted_or_merged(self, llama, token_batches):
        model = llama(tie_word_embeddings=True)
        config = lora_null.LoraNullConfig(r=2, target_modules=["lm_head", "q_proj"])
        covariances = lora_null.calibrate(model, token_batches(), config, progress=False)
        shifted = lora_null.LoraNullConfig(r=2, target_modules=["lm_head", "q_proj"], freeze_a=False)
        self.refused(model, covariances, shifted, "lm_head shares its weight with another module")
        lora_null.initialize(model, covariances, config, progress=False)
        expected = train(model, steps=2)(ids()).logits
        with pytest.raises(ValueError, match="Merging changes base weights, but lm_head shares"):
            lora_null.merge(model)
        assert torch.equal(model(ids()).logits, expected)

    def test_a_diverged_adapter_is_not_merged(self, calibrated):
        model, covariances = calibrated
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=2), progress=False)
        layer = adapter_layers(model)["model.layers.1.mlp.up_proj"]
        layer.lora_B.weight.data[0] = float("nan")
        with pytest.raises(ValueError, match=r"up_proj holds NaN or Inf, so nothing was merged"):
            lora_null.merge(model)
        assert len(adapter_layers(model)) == 14

    def test_a_damaged_weight_is_named(self, calibrated):
        model, covariances = calibrated
        model.model.layers[1].mlp.down_proj.weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.down_proj: factorize: .*damaged checkpoint"):
            lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), verify_base=False, progress=False)
        assert not adapter_layers(model)

    def test_inference_mode_does_not_spoil_training(self, calibrated):
        model, covariances = calibrated
        with torch.inference_mode():
            lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=2), progress=False)
        train(model, steps=2)

    def test_parallelize_module_is_told_what_it_cannot_do(self, calibrated, tmp_path):
        import torch.distributed as dist
        from torch.distributed.tensor.parallel import ColwiseParallel, parallelize_module

        model, covariances = calibrated
        lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=2), progress=False)
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            mesh = dist.init_device_mesh("cpu", (1,))
            with pytest.raises(ValueError, match=r"coefficients belongs .* parallelize_module cannot distribute it"):
                parallelize_module(model.model.layers[0].mlp, mesh, {"up_proj": ColwiseParallel()})
        finally:
            dist.destroy_process_group()

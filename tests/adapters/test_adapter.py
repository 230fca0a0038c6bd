"""Adapters on disk: stock PEFT reads them, servers' rules hold, and training goes on from them."""

import json
import subprocess
import sys

import pytest
import torch
from adapter_tools import R, ids, trained
from safetensors.torch import load_file, save_file

import lora_null
from lora_null.adapters import export_adapter
from lora_null.adapters.layer import adapter_layers
from lora_null.adapters.names import tensor_names

# vLLM's documented choices for max_lora_rank.
SERVED_RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)


@pytest.fixture(params=[True, False], ids=["frozen_a", "trained_a"])
def freeze_a(request):
    return request.param


def test_stock_peft_reproduces_the_logits(llama, token_batches, tmp_path, freeze_a):
    from peft import PeftModel

    model = trained(llama, token_batches, freeze_a=freeze_a, lora_alpha=9)
    lora_null.save_adapter(model, tmp_path / "adapter")
    expected = model(ids()).logits
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))(ids()).logits
    assert (loaded - expected).norm() <= 1e-5 * expected.norm()


def test_a_fresh_process_needs_only_peft(llama, token_batches, tmp_path, freeze_a):
    model = trained(llama, token_batches, freeze_a=freeze_a)
    lora_null.save_adapter(model, tmp_path / "adapter")
    llama().save_pretrained(tmp_path / "base")
    save_file({"ids": ids(), "logits": model(ids()).logits.detach()}, str(tmp_path / "expected.safetensors"))
    script = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
expected = load_file("expected.safetensors")
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("base"), "adapter").eval()
error = (model(expected["ids"]).logits - expected["logits"]).norm() / expected["logits"].norm()
assert not any(name.startswith("lora_null") for name in sys.modules)
assert error <= 1e-5, error
"""
    subprocess.run([sys.executable, "-c", script], cwd=tmp_path, check=True, timeout=120)


def test_servers_can_read_it(llama, token_batches, tmp_path, freeze_a):
    """The rules that vLLM's reader applies, in pure Python."""
    lora_null.save_adapter(trained(llama, token_batches, freeze_a=freeze_a, lora_alpha=3), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    tensors = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    assert config["peft_type"] == "LORA" and config["lora_alpha"] == config["r"] == (R if freeze_a else 2 * R)
    assert any(config["r"] <= rank for rank in SERVED_RANKS)
    assert not config["modules_to_save"] and not config["use_dora"] and config["bias"] == "none"
    assert not config["use_rslora"] and not config["rank_pattern"] and not config["alpha_pattern"]
    assert config["init_lora_weights"] is True
    assert config["target_modules"] == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    linears = {name for name, module in llama().named_modules() if isinstance(module, torch.nn.Linear)}
    for key, tensor in tensors.items():
        module, factor = key.removeprefix("base_model.model.").rsplit(".", 2)[0], key.rsplit(".", 2)[1]
        assert module in linears and module.rsplit(".", 1)[-1] in config["target_modules"]
        assert tensor.shape[0 if factor == "lora_A" else 1] == config["r"], key


def test_rank_2r_export_survives_bf16(llama, token_batches, tmp_path):
    """Small updates of large factors: the stacking [B | -B0][A ; A0] loses them in bf16, ours does not."""
    model = trained(llama, token_batches, freeze_a=False)
    name, layer = next(iter(adapter_layers(model).items()))
    with torch.no_grad():
        for factor, initial in ((layer.lora_A, layer.initial_A), (layer.lora_B, layer.initial_B)):
            factor.weight.copy_(initial.weight * (1 + 1e-3 * torch.randn_like(initial.weight)))
    initial_A, initial_B = layer.initial_A.weight.double(), layer.initial_B.weight.double()
    truth = layer.lora_B.weight.double() @ layer.lora_A.weight.double() - initial_B @ initial_A
    lora_null.save_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16)
    tensors = load_file(str(tmp_path / "adapter" / "adapter_model.safetensors"))
    lora_A, lora_B = (tensors[key].double() for key in tensor_names(name))
    assert tensors[tensor_names(name)[0]].dtype == torch.bfloat16
    assert (lora_B @ lora_A - truth).norm() <= 5e-3 * truth.norm()
    naive_A = torch.cat([layer.lora_A.weight, layer.initial_A.weight]).bfloat16().double()
    naive_B = torch.cat([layer.lora_B.weight, -layer.initial_B.weight], dim=1).bfloat16().double()
    assert (naive_B @ naive_A - truth).norm() > 0.5 * truth.norm()


def test_loads_into_our_layers(llama, token_batches, tmp_path, freeze_a):
    model = trained(llama, token_batches, freeze_a=freeze_a, lora_alpha=9)
    lora_null.save_adapter(model, tmp_path / "adapter")
    loaded = lora_null.load_adapter(llama(), tmp_path / "adapter")
    expected = model(ids()).logits
    assert (loaded(ids()).logits - expected).norm() <= 1e-6 * expected.norm()
    assert not any(parameter.requires_grad for parameter in loaded.parameters())


def test_training_can_go_on_after_a_round_trip(llama, token_batches, tmp_path, freeze_a):
    model = trained(llama, token_batches, freeze_a=freeze_a, lora_alpha=9)
    lora_null.save_adapter(model, tmp_path / "adapter")
    loaded = lora_null.load_adapter(llama(), tmp_path / "adapter", is_trainable=True)
    for (name, ours), theirs in zip(adapter_layers(model).items(), adapter_layers(loaded).values(), strict=True):
        # With frozen A the scaling has moved into B; the trained parameters are the same set.
        assert theirs.lora_A.weight.requires_grad is (not freeze_a), name
        assert theirs.lora_B.weight.requires_grad, name
        torch.testing.assert_close(theirs.lora_A.weight, ours.lora_A.weight, rtol=1e-5, atol=1e-6)
        product, expected = (layer.scaling * layer.lora_B.weight for layer in (theirs, ours))
        torch.testing.assert_close(product, expected, rtol=1e-5, atol=1e-6)
    expected = model(ids()).logits
    assert (loaded(ids()).logits - expected).norm() <= 1e-5 * expected.norm()
    # ... and saved again it is the same adapter.
    lora_null.save_adapter(loaded, tmp_path / "again")
    first, second = (load_file(str(tmp_path / part / "adapter_model.safetensors")) for part in ("adapter", "again"))
    for key in first:
        torch.testing.assert_close(second[key], first[key], rtol=1e-5, atol=2e-6)


def test_a_checkpoint_of_continued_training_exports_to_the_same_function(llama, token_batches, tmp_path, freeze_a):
    """Where lora_alpha is not r: the scaling that a loaded model states is the one that its layers apply."""
    lora_null.save_adapter(trained(llama, token_batches, freeze_a=freeze_a, lora_alpha=9), tmp_path / "first")
    for trainable in (True, False):
        model = lora_null.load_adapter(llama(), tmp_path / "first", is_trainable=trainable)
        expected = model(ids()).logits
        model.save_pretrained(tmp_path / f"checkpoint{trainable}")
        export_adapter(tmp_path / f"checkpoint{trainable}", tmp_path / f"second{trainable}")
        again = lora_null.load_adapter(llama(), tmp_path / f"second{trainable}")
        assert (again(ids()).logits - expected).norm() <= 1e-5 * expected.norm()
        if trainable:
            assert {layer.scaling for layer in adapter_layers(model).values()} == {1.5}


def test_an_adapter_is_loaded_where_an_offloaded_model_computes(llama, token_batches, tmp_path):
    from accelerate import cpu_offload

    model = trained(llama, token_batches)
    lora_null.save_adapter(model, tmp_path / "adapter")
    offloaded = lora_null.load_adapter(cpu_offload(llama(), execution_device="cpu"), tmp_path / "adapter")
    assert not any(layer.lora_B.weight.is_meta for layer in adapter_layers(offloaded).values())
    torch.testing.assert_close(offloaded(ids()).logits, model(ids()).logits)


def test_an_adapter_loaded_in_inference_mode_can_be_trained(llama, token_batches, tmp_path, freeze_a):
    lora_null.save_adapter(trained(llama, token_batches, freeze_a=freeze_a), tmp_path / "adapter")
    model = llama()
    with torch.inference_mode():
        lora_null.load_adapter(model, tmp_path / "adapter", is_trainable=True)
    model(ids(), labels=ids()).loss.backward()
    assert all(layer.lora_B.weight.grad is not None for layer in adapter_layers(model).values())


def test_reads_an_ordinary_peft_adapter(llama, tmp_path):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=4, lora_alpha=12, target_modules=["q_proj", "down_proj"], init_lora_weights=False)
    peft_model = get_peft_model(llama(), config)
    peft_model.save_pretrained(tmp_path / "adapter")
    loaded = lora_null.load_adapter(llama(), tmp_path / "adapter")
    expected = peft_model(ids()).logits
    assert (loaded(ids()).logits - expected).norm() <= 1e-6 * expected.norm()


@pytest.mark.parametrize("r", [1, 3, 4])
def test_an_ordinary_adapter_survives_training_on_and_saving(llama, tmp_path, r):
    """It is not in the rank-2r form, although both of its factors are trained."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(r=r, lora_alpha=2 * r, target_modules="all-linear", init_lora_weights=False)
    peft_model = get_peft_model(llama(), config)
    peft_model.save_pretrained(tmp_path / "first")
    expected = peft_model(ids()).logits
    for source, target in (("first", "second"), ("second", "third")):
        model = lora_null.load_adapter(llama(), tmp_path / source, is_trainable=True)
        assert all(layer.r == r and not layer.shifted for layer in adapter_layers(model).values())
        assert all(layer.lora_A.weight.requires_grad for layer in adapter_layers(model).values())
        assert (model(ids()).logits - expected).norm() <= 1e-5 * expected.norm()
        lora_null.save_adapter(model, tmp_path / target)


def test_a_checkpoint_says_what_its_adapters_are(llama, token_batches, tmp_path):
    model = trained(llama, token_batches, lora_alpha=9)
    model.save_pretrained(tmp_path / "checkpoint")
    kept = json.loads((tmp_path / "checkpoint" / "config.json").read_text())["lora_null"]
    assert kept["config"]["lora_alpha"] == 9 and kept["config"]["train"] == "b_in_basis" and kept["base_fingerprint"]
    lora_null.merge(model).save_pretrained(tmp_path / "merged")
    assert "lora_null" not in json.loads((tmp_path / "merged" / "config.json").read_text())


def test_a_checkpoint_that_lost_its_adapters_is_noticed(llama, token_batches, tmp_path, caplog):
    """from_pretrained passes over them, and leaves a shifted base."""
    trained(llama, token_batches, freeze_a=False).save_pretrained(tmp_path / "checkpoint")
    model = type(llama()).from_pretrained(tmp_path / "checkpoint")
    assert "may be shifted" not in caplog.text
    lora_null.calibrate(model, token_batches(), progress=False)
    assert "saved with adapters of lora_null and train='ab'. Here they are missing" in caplog.text


def test_names_are_whole_where_endings_would_select_more(llama, token_batches, tmp_path):
    from peft import PeftModel

    model = trained(llama, token_batches, target_modules=["layers.1.self_attn.q_proj"])
    lora_null.save_adapter(model, tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "adapter"))
    adapted = {key for key in loaded.state_dict() if "lora_A" in key}
    assert adapted == {"base_model.model.model.layers.1.self_attn.q_proj.lora_A.default.weight"}
    expected = model(ids()).logits
    assert (loaded(ids()).logits - expected).norm() <= 1e-6 * expected.norm()


def test_names_are_whole_where_endings_would_select_other_modules(llama, calibrated, tmp_path):
    """A convolution named as a linear layer is, as in vision towers, must not get an adapter from the readers."""
    from peft import LoraConfig, PeftModel, get_peft_model

    def with_tower():
        model = llama()
        model.tower = torch.nn.ModuleDict({"q_proj": torch.nn.Conv1d(8, 8, 1)})
        return model

    wanted = [f"model.layers.{i}.self_attn.q_proj" for i in range(2)]
    model, by_peft = with_tower(), get_peft_model(with_tower(), LoraConfig(r=2, lora_alpha=2, target_modules=wanted))
    lora_null.initialize(model, calibrated[1], lora_null.LoraNullConfig(r=2, target_modules=["q_proj"]), progress=False)
    lora_null.peft.initialize_lora_null_weights(by_peft, calibrated[1], progress=False)
    lora_null.save_adapter(model, tmp_path / "own")
    lora_null.peft.save_adapter(by_peft, tmp_path / "peft")
    for folder in ("own", "peft"):
        loaded = PeftModel.from_pretrained(with_tower(), str(tmp_path / folder))
        adapted = {name for name in loaded.state_dict() if "lora_A" in name}
        assert adapted == {f"base_model.model.{name}.lora_A.default.weight" for name in wanted}


def test_no_absolute_path_is_published(llama, token_batches, tmp_path):
    from transformers import AutoModelForCausalLM

    llama().save_pretrained(tmp_path / "my-base")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "my-base")
    covariances = lora_null.calibrate(model, token_batches(), progress=False)
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=R), progress=False)
    lora_null.save_adapter(model, tmp_path / "adapter")
    for file in (tmp_path / "adapter").iterdir():
        assert str(tmp_path).encode() not in file.read_bytes(), file
    file = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(file.read_text())
    assert config["base_model_name_or_path"] == "my-base"
    file.write_text(json.dumps({**config, "base_model_name_or_path": str(tmp_path / "my-base")}))
    export_adapter(tmp_path / "adapter", tmp_path / "exported")
    exported = json.loads((tmp_path / "exported" / "adapter_config.json").read_text())
    assert exported["base_model_name_or_path"] == "my-base"


def test_a_module_around_the_model_adds_nothing_to_the_names(llama, token_batches, tmp_path):
    """A LightningModule, a DeepSpeed engine, anybody's own wrapper."""
    model = trained(llama, token_batches)
    wrapper = torch.nn.ModuleDict({"model": model})
    lora_null.save_adapter(model, tmp_path / "model")
    lora_null.save_adapter(wrapper, tmp_path / "wrapper")
    for name in ("adapter_model.safetensors", "adapter_config.json", "lora_null.json"):
        assert (tmp_path / "wrapper" / name).read_bytes() == (tmp_path / "model" / name).read_bytes(), name
    assert lora_null.merge(wrapper) is wrapper
    assert not hasattr(model, "lora_null_state")

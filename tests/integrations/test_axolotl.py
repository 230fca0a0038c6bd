"""The plugin for axolotl: by itself with the calls that axolotl makes, and inside axolotl where it is installed."""

import json
import os
import subprocess
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model

import lora_null
from lora_null.integrations import KeepFrozen
from lora_null.integrations.axolotl import KERNELS, LoraNullPlugin


@pytest.fixture
def covariance_file(calibrated, tmp_path):
    calibrated[1].save(tmp_path / "cov.safetensors")
    return str(tmp_path / "cov.safetensors")


def fresh(model, **options):
    return get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 4, "target_modules": "all-linear"} | options))


def trained(model):
    return {name.split(".lora_")[-1][0] for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("freeze_a", [True, False])
def test_a_fresh_adapter_gets_its_start(covariance_file, llama, freeze_a):
    model = fresh(llama())
    cfg = {"adapter": "lora", "lora_null_covariances": covariance_file, "lora_null_freeze_a": freeze_a}
    LoraNullPlugin().post_lora_load(cfg, model)
    assert trained(model) == ({"B"} if freeze_a else {"A", "B"})
    assert all(type(m) is lora_null.peft.FusedLoraLinear for m in lora_null.peft.lora_layers(model).values())
    want = fresh(llama())
    covariances = lora_null.Covariances.load(covariance_file)
    lora_null.peft.initialize_lora_null_weights(want, covariances, freeze_a=freeze_a, progress=False)
    for (name, p), q in zip(model.named_parameters(), want.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_a_factor_that_learns_within_a_basis_starts_and_goes_on(covariance_file, llama, tmp_path):
    keys = {"adapter": "lora", "lora_null_covariances": covariance_file, "lora_null_freeze_a": None}
    model, plugin = fresh(llama()), LoraNullPlugin()
    plugin.post_lora_load(
        keys | {"lora_null_train": "b_in_basis", "lora_null_energy": 0.8, "lora_null_task": covariance_file}, model
    )
    assert any(name.endswith("coefficients") for name, _ in model.named_parameters())
    assert trained(model) == {"A", "B"} and plugin.add_callbacks_post_trainer({}, type("T", (), {"model": model})) == []
    lora_null.peft.save_adapter(model, tmp_path / "saved")
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "saved"), is_trainable=True)
    with pytest.raises(ValueError, match="covariances"):
        plugin.post_lora_load({"adapter": "lora", "lora_model_dir": str(tmp_path / "saved")}, again)
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "saved"), is_trainable=True)
    plugin.post_lora_load(keys | {"lora_model_dir": str(tmp_path / "saved")}, again)
    assert [n for n, p in again.named_parameters() if p.requires_grad] == [
        n for n, p in model.named_parameters() if p.requires_grad
    ]


def test_a_saved_adapter_goes_on_in_its_mode(covariance_file, llama, tmp_path):
    model, plugin = fresh(llama(), lora_alpha=12, lora_dropout=0.25), LoraNullPlugin()
    started = {"adapter": "lora", "lora_null_covariances": covariance_file, "lora_null_train": "b"}
    plugin.post_lora_load(started, model)
    lora_null.peft.save_adapter(model, tmp_path / "saved")
    again = PeftModel.from_pretrained(llama(), str(tmp_path / "saved"), is_trainable=True)
    assert trained(again) == {"A", "B"}
    plugin.post_lora_load(
        {"adapter": "lora", "lora_model_dir": str(tmp_path / "saved"), "lora_null_fused": False}, again
    )
    assert trained(again) == {"B"}
    for layer in lora_null.peft.lora_layers(again).values():
        assert layer.scaling["default"] == 3 and layer.lora_dropout["default"].p == 0.25
    run = type("Trainer", (), {"model": again})
    assert [type(callback) for callback in plugin.add_callbacks_post_trainer({}, run)] == [KeepFrozen]
    run.model = fresh(llama())
    assert plugin.add_callbacks_post_trainer({}, run) == []


def test_kernels_that_go_around_the_layers_are_switched_off(caplog):
    cfg = {"adapter": "lora", "lora_qkv_kernel": True}
    LoraNullPlugin().register(cfg)
    assert {cfg[key] for key in KERNELS} == {False}
    assert "lora_qkv_kernel" in caplog.text and "lora_mlp_kernel" not in caplog.text


def test_refusals(llama):
    plugin = LoraNullPlugin()
    with pytest.raises(ValueError, match="expected lora or qlora"):
        plugin.post_lora_load({"adapter": None}, llama())
    with pytest.raises(ValueError, match="lora-null calibrate MODEL"):
        plugin.post_lora_load({"adapter": "lora"}, fresh(llama()))


RUN = """
import sys

def main(path):
    from axolotl.cli.config import load_cfg
    from axolotl.common.datasets import load_datasets
    from axolotl.train import train

    cfg = load_cfg(path)
    assert not (cfg.lora_mlp_kernel or cfg.lora_qkv_kernel or cfg.lora_o_kernel)
    model = train(cfg=cfg, dataset_meta=load_datasets(cfg=cfg))[0]
    trained = {name.split(".lora_")[-1][0] for name, p in model.named_parameters() if p.requires_grad}
    layers = {type(layer).__name__ for name, layer in model.named_modules() if name.endswith("q_proj")}
    print("RESULT", *sorted(trained), *layers)

if __name__ == "__main__":  # its workers import this file again
    main(sys.argv[1])
"""


@pytest.mark.slow
def test_inside_axolotl(folder, covariance_file, tmp_path):
    """A run, one that resumes from its checkpoint, and one that goes on from its adapter."""
    pytest.importorskip("axolotl")
    import yaml

    (folder / "run.py").write_text(RUN)
    lines = [json.dumps({"text": text}) for text in (folder / "text.txt").read_text().split("\n\n")]
    (folder / "data.jsonl").write_text("\n".join(lines))
    common = {
        "base_model": str(folder / "model"), "plugins": ["lora_null.integrations.axolotl.LoraNullPlugin"],
        "adapter": "lora", "lora_r": 4, "lora_alpha": 4, "lora_target_linear": True, "sequence_len": 64,
        "datasets": [{"path": str(folder / "data.jsonl"), "ds_type": "json", "type": "completion"}],
        "dataset_prepared_path": str(folder / "prepared"), "dataset_num_proc": 1, "output_dir": str(folder / "out"),
        "micro_batch_size": 4, "gradient_accumulation_steps": 1, "max_steps": 4, "save_steps": 2, "learning_rate": 1e-2,
        "optimizer": "adamw_torch", "lr_scheduler": "constant", "bf16": False, "val_set_size": 0, "seed": 1,
        "attn_implementation": "eager", "special_tokens": {"pad_token": "<end>", "bos_token": "<end>"},
    }  # fmt: skip
    runs = [
        {"lora_null_covariances": covariance_file},
        {"lora_null_covariances": covariance_file, "resume_from_checkpoint": str(folder / "out" / "checkpoint-2")},
        {"lora_model_dir": str(folder / "out"), "output_dir": str(folder / "on")},
    ]
    environment = {**os.environ, "HF_DATASETS_OFFLINE": "1", "AXOLOTL_DO_NOT_TRACK": "1", "WANDB_MODE": "disabled"}
    for options in runs:
        (folder / "run.yaml").write_text(yaml.safe_dump({**common, **options}))
        command = [sys.executable, str(folder / "run.py"), str(folder / "run.yaml")]
        done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)
        assert "RESULT B FusedLoraLinear" in done.stdout, done.stderr[-3000:]
    assert json.loads((folder / "on" / "lora_null.json").read_text())["config"]["freeze_a"]

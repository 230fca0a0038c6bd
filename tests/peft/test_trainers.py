"""Other people's trainers, run as their users do; each test skips without the package that it is about."""

import os
import subprocess
import sys

import pytest
import torch
from adapter_tools import ids
from processes import free_port
from tiny_models import make_llama

import lora_null
from lora_null.adapters import export_adapter

KINDS = pytest.mark.parametrize("kind", ["patched", "peft"])
MODES = pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen A", "trained A"])


def pretrained():
    return make_llama(eos_token_id=0, pad_token_id=0)


def prepared(kind, freeze_a):
    """Initialise in one of the two ways, always from the same weights and covariances."""
    model = pretrained()
    batches = list(torch.randint(97, (6, 4, 32), generator=torch.Generator().manual_seed(1)))
    covariances = lora_null.calibrate(model, batches, progress=False)
    if kind == "patched":
        config = lora_null.LoraNullConfig(r=4, lora_alpha=8, freeze_a=freeze_a)
        return lora_null.initialize(model, covariances, config, progress=False)
    import peft

    model = peft.get_peft_model(model, peft.LoraConfig(r=4, lora_alpha=8, target_modules="all-linear"))
    lora_null.peft.initialize_lora_null_weights(model, covariances, freeze_a=freeze_a, progress=False)
    lora_null.peft.use_fused_kernels(model)
    return model


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids()).logits


def fits_stock_peft(adapter, model):
    """Compare with stock PEFT on the untouched base, measured by how far training has moved the outputs."""
    import peft

    base, want = logits(pretrained()), logits(model)
    got = logits(peft.PeftModel.from_pretrained(pretrained(), str(adapter)))
    assert (want - base).abs().max() > 1e-3
    return (got - want).abs().max() <= 1e-3 * (want - base).abs().max()


def sentences(count, seed):
    generator = torch.Generator().manual_seed(seed)
    return [" ".join(f"w{int(i)}" for i in torch.randint(96, (16,), generator=generator)) for _ in range(count)]


OPTIONS = {
    "use_cpu": True,
    "bf16": False,
    "per_device_train_batch_size": 4,
    "max_steps": 4,
    "save_steps": 2,
    "max_length": 48,
    "learning_rate": 1e-2,
    "lr_scheduler_type": "constant",
    "report_to": [],
    "disable_tqdm": True,
}


@MODES
@KINDS
def test_trl_sft(kind, freeze_a, tokenizer, tmp_path, monkeypatch):
    """Packed and checkpointed; a resumed run ends where the whole one does, and its checkpoint is exported."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    monkeypatch.setenv("LORA_NULL_STRICT", "1")
    data = datasets.Dataset.from_dict({"text": sentences(48, seed=0)})

    def trainer(folder):
        arguments = trl.SFTConfig(str(folder), packing=True, gradient_checkpointing=True, **OPTIONS)
        model = prepared(kind, freeze_a)
        return trl.SFTTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)

    whole, resumed = trainer(tmp_path / "whole"), trainer(tmp_path / "resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-2"))
    moved = {name.split(".lora_")[-1][0] for name, p in whole.model.named_parameters() if p.requires_grad}
    assert moved == ({"B"} if freeze_a else {"A", "B"})
    assert (logits(resumed.model) - logits(whole.model)).abs().max() <= 1e-5
    assert export_adapter(tmp_path / "resumed" / "checkpoint-4", tmp_path / "exported") == (4 if freeze_a else 8)
    assert fits_stock_peft(tmp_path / "exported", resumed.model)
    if kind == "peft":
        assert fits_stock_peft(tmp_path / "resumed" / "checkpoint-4", resumed.model)


@MODES
@KINDS
def test_trl_dpo_starts_at_its_reference(kind, freeze_a, tokenizer, tmp_path):
    """The first loss is log 2: policy and reference agree. The reference is the pre-trained model to the end."""
    trl = pytest.importorskip("trl")
    datasets = pytest.importorskip("datasets")
    from trl.trainer.utils import use_adapter

    columns = {"prompt": sentences(16, 1), "chosen": sentences(16, 2), "rejected": sentences(16, 3)}
    pretrained().save_pretrained(tmp_path / "base")
    model = prepared(kind, freeze_a)
    model.config._name_or_path = str(tmp_path / "base")
    arguments = trl.DPOConfig(str(tmp_path / "run"), logging_steps=1, **OPTIONS)
    data = datasets.Dataset.from_dict(columns)
    trainer = trl.DPOTrainer(model, args=arguments, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses[0] == pytest.approx(0.693147, abs=1e-5) and losses[-1] != losses[0]
    base = logits(pretrained())
    if trainer.ref_model is not None:
        assert torch.equal(logits(trainer.ref_model), base)
    else:
        with use_adapter(trainer.model, "ref"):
            assert (logits(trainer.model) - base).abs().max() <= 1e-6
    assert (logits(trainer.model) - base).abs().max() > 1e-3


@KINDS
def test_lightning_keeps_a_checkpoint(kind, tmp_path):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self, model):
            super().__init__()
            self.model = model

        def training_step(self, batch, _):
            return self.model(input_ids=batch, labels=batch).loss

        def configure_optimizers(self):
            return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)

    options = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "accelerator": "cpu"}
    trainer = lightning.Trainer(max_steps=4, enable_model_summary=False, **options)
    module = Module(prepared(kind, True))
    data = torch.randint(97, (16, 32), generator=torch.Generator().manual_seed(4))
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=4))
    trainer.save_checkpoint(tmp_path / "checkpoint")
    loaded = Module.load_from_checkpoint(tmp_path / "checkpoint", model=prepared(kind, True), weights_only=False)
    assert torch.equal(logits(loaded.model), logits(module.model))
    (lora_null if kind == "patched" else lora_null.peft).save_adapter(module, tmp_path / "adapter")
    assert fits_stock_peft(tmp_path / "adapter", module.model)


@KINDS
def test_liger_leaves_the_adapted_layers(kind):
    """Its kernels need a GPU; what it replaces shows on the CPU."""
    patching = pytest.importorskip("liger_kernel.transformers.monkey_patch")
    from transformers.models.llama import modeling_llama

    adapted = {"patched": "LoraNullLinear", "peft": "FusedLoraLinear"}[kind]
    model = prepared(kind, True)
    plain = model.get_base_model() if kind == "peft" else model
    before = dict(vars(modeling_llama))
    try:
        patching._apply_liger_kernel_to_instance(model=plain, fused_linear_cross_entropy=False)
    finally:
        # Models made later must not get its classes.
        vars(modeling_llama).update(before)
    for mlp in (layer.mlp for layer in plain.model.layers):
        assert "Liger" in mlp.forward.__qualname__
        assert {type(layer).__name__ for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj)} == {adapted}
        assert all("forward" not in layer.__dict__ for layer in (mlp.gate_proj, mlp.up_proj, mlp.down_proj))


@pytest.mark.parametrize("stage", [2, 3])
def test_deepspeed(stage, tmp_path):
    pytest.importorskip("deepspeed")
    environment = {**os.environ, "DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1", "LORA_NULL_NO_EXTENSION": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += [__file__, str(stage), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-4000:]


def _deepspeed_worker(stage, folder):
    """Train in two processes and in one; all call save_adapter, and stock PEFT reads what the first has written."""
    import deepspeed
    import torch.distributed as dist

    deepspeed.init_distributed("gloo")
    rank = dist.get_rank()
    batches = torch.randint(97, (3, 4, 32), generator=torch.Generator().manual_seed(4))
    for kind, freeze_a in (("patched", True), ("patched", False), ("peft", False), ("patched", None), ("peft", None)):
        alone = prepared(kind, freeze_a).train()
        optimizer = torch.optim.SGD([p for p in alone.parameters() if p.requires_grad], lr=1.0)
        for batch in batches:
            alone(input_ids=batch, labels=batch).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        model = prepared(kind, freeze_a).train()
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1.0)
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
        }
        engine = deepspeed.initialize(model=model, optimizer=optimizer, config=config)[0]
        for batch in batches:
            mine = batch.chunk(2)[rank]
            engine.backward(engine(input_ids=mine, labels=mine).loss)
            engine.step()
        if stage == 3 or rank == 0:
            path = f"{folder}/{kind}{freeze_a}"
            (lora_null if kind == "patched" else lora_null.peft).save_adapter(engine, path)
        if rank == 0:
            assert fits_stock_peft(path, alone), (kind, freeze_a)
        dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    _deepspeed_worker(int(sys.argv[1]), sys.argv[2])

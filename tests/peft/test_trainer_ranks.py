"""``transformers.Trainer`` under torchrun: two processes train the adapters of one, save checkpoints and resume."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import free_port
from tiny_models import make_llama

import lora_null
from lora_null import LoraNullConfig
from lora_null.system import extension

STEPS, SAVED = 4, 2


def data():
    ids = torch.randint(97, (16, 32), generator=torch.Generator().manual_seed(5))
    return [{"input_ids": row, "labels": row} for row in ids]


def covariances():
    tokens = torch.randint(97, (8, 4, 32), generator=torch.Generator().manual_seed(1))
    return lora_null.calibrate(make_llama(), list(tokens), progress=False)


def trainer(folder, covariances, freeze_a, batch):
    from transformers import Trainer, TrainingArguments

    config = LoraNullConfig(r=4, lora_alpha=8, freeze_a=freeze_a)
    model = lora_null.initialize(make_llama(), covariances, config, progress=False).train()
    arguments = TrainingArguments(
        str(folder),
        use_cpu=True,
        per_device_train_batch_size=batch,
        max_steps=STEPS,
        save_steps=SAVED,
        logging_steps=1,
        # Adam divides gradients by their own size, so that the rounding of the smallest is not small
        optim="sgd",
        learning_rate=1.0,
        lr_scheduler_type="constant",
        report_to=[],
        disable_tqdm=True,
        ddp_find_unused_parameters=False,
    )
    return Trainer(model, arguments, train_dataset=data())


def _worker(folder: Path, resume: bool) -> None:
    torch.set_num_threads(1)
    found = covariances()  # before the first trainer starts torch.distributed: the sums of one process, to the bit
    for freeze_a in (True, False):
        run = trainer(folder / str(freeze_a), found, freeze_a, batch=2)
        run.train(resume_from_checkpoint=str(folder / str(freeze_a) / f"checkpoint-{SAVED}") if resume else None)
        kind = type(run.model_wrapped).__name__
        if run.is_world_process_zero():
            lora_null.save_adapter(run.model_wrapped, folder / f"{freeze_a}.{'resumed' if resume else 'adapter'}")
            losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
            (folder / f"{freeze_a}.json").write_text(json.dumps({"kind": kind, "losses": losses}))


def torchrun(*arguments):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "LORA_NULL_NO_EXTENSION": "1", "LORA_NULL_STRICT": "1"}
    done = subprocess.run(
        [*command, __file__, *arguments], env=environment, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Train to the end, and once more in fresh processes from the checkpoint in the middle."""
    folder = tmp_path_factory.mktemp("trainer")
    torchrun(str(folder))
    for freeze_a in (True, False):
        end = folder / str(freeze_a) / f"checkpoint-{STEPS}"
        end.rename(end.with_name("uninterrupted"))
    torchrun(str(folder), "resume")
    return folder


@pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen A", "trained A"])
@pytest.mark.usefixtures("one_thread")
def test_two_processes_train_as_one_does(folder, tmp_path, freeze_a, monkeypatch):
    # As in the workers, down to the last bit of the covariances: a trained A feels which basis of the space it got.
    monkeypatch.setitem(extension._loaded, "module", None)
    found = json.loads((folder / f"{freeze_a}.json").read_text())
    alone = trainer(tmp_path / "run", covariances(), freeze_a, batch=4)
    alone.train()
    assert found["kind"] == "DistributedDataParallel"
    wanted = [entry["loss"] for entry in alone.state.log_history if "loss" in entry]
    assert len(wanted) == len(found["losses"]) == STEPS
    assert max(abs(a - b) for a, b in zip(wanted, found["losses"], strict=True)) <= 5e-5
    lora_null.save_adapter(alone.model, tmp_path / "alone")
    loaded = [
        lora_null.load_adapter(make_llama(), path) for path in (tmp_path / "alone", folder / f"{freeze_a}.adapter")
    ]
    ids = data()[0]["input_ids"][None]
    with torch.no_grad():
        base, want, got = (model(input_ids=ids).logits for model in (make_llama(), *loaded))
    assert (want - base).abs().max() > 1e-3
    assert (got - want).abs().max() <= 1e-3 * (want - base).abs().max()


@pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen A", "trained A"])
def test_a_resumed_run_gives_the_same_bits(folder, freeze_a):
    from safetensors.torch import load_file

    first, second = (
        load_file(str(folder / str(freeze_a) / name / "model.safetensors"))
        for name in ("uninterrupted", f"checkpoint-{STEPS}")
    )
    assert set(first) == set(second)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen A", "trained A"])
def test_its_checkpoint_exports_to_what_the_model_saves(folder, tmp_path, freeze_a):
    import peft

    from lora_null.adapters import export_adapter
    from lora_null.adapters.files import Adapter

    rank = export_adapter(folder / str(freeze_a) / "uninterrupted", tmp_path / "exported")
    assert rank == (4 if freeze_a else 8)
    want = Adapter.read(folder / f"{freeze_a}.adapter").factors
    got = Adapter.read(tmp_path / "exported").factors
    assert set(got) == set(want)
    for name, pair in want.items():
        assert all(torch.equal(a, b) for a, b in zip(got[name], pair, strict=True)), name
    stock = peft.PeftModel.from_pretrained(make_llama(), str(tmp_path / "exported"))
    ours = lora_null.load_adapter(make_llama(), folder / f"{freeze_a}.adapter")
    ids = data()[0]["input_ids"][None]
    with torch.no_grad():
        torch.testing.assert_close(stock(input_ids=ids).logits, ours(input_ids=ids).logits, rtol=0, atol=2e-6)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), len(sys.argv) > 2)

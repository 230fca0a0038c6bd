"""Every example runs as a user starts it, on a small random model, and leaves an adapter that stock PEFT loads."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from processes import free_port

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"trl_sft": ["trl", "datasets"], "qlora": ["bitsandbytes"]}
STEPS = {"trainer", "trl_sft"}


@pytest.fixture
def texts(folder):
    (folder / "learn.txt").write_text("\n\n".join((folder / "text.txt").read_text().split("\n\n")[:6]))
    return folder


def arguments(name, folder):
    words = [folder / "text.txt", folder / "learn.txt", folder / "adapter", "--model", folder / "model", "--rank", "4"]
    return [*map(str, words), *(["--steps", "3"] if name in STEPS else [])]


def moves_the_base(folder):
    """Load the adapter with stock PEFT: it fits, and training has changed what the model says."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "model")
    ids = torch.arange(12)[None]
    with torch.no_grad():
        before = base(input_ids=ids).logits
        tuned = PeftModel.from_pretrained(base, str(folder / "adapter"))
        return (tuned(input_ids=ids).logits - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["trainer", "trl_sft", "peft_model", "qlora"])
def test_example(name, texts, monkeypatch):
    for package in NEEDS.get(name, []):
        pytest.importorskip(package)
    monkeypatch.setattr(sys, "argv", [name, *arguments(name, texts)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")
    assert moves_the_base(texts)


def test_fsdp2_under_torchrun(texts):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += [str(EXAMPLES / "fsdp2.py"), *arguments("fsdp2", texts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert moves_the_base(texts)


def test_examples_are_short_and_all_of_them_are_run():
    run = {"trainer", "trl_sft", "peft_model", "qlora", "fsdp2"}
    files = sorted(EXAMPLES.glob("*.py"))
    assert {file.stem for file in files} == run
    for file in files:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 40, file.name

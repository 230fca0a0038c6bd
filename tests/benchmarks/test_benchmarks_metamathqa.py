"""The folder for PEFT's MetaMathQA comparison, on a tiny model with a stand-in for PEFT's runner."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import LoraConfig, PeftConfig

import lora_null
from lora_null.adapters.files import Adapter
from lora_null.calibration.texts import token_batches
from lora_null.evaluation.report import adapter_report

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks" / "metamathqa"
EXPERIMENTS = sorted(FOLDER.glob("experiments/*/*"))

# What PEFT's utils.py and run.py offer and do, as far as the folder depends on it.
UTILS = """
from peft import get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer
made = []
def get_tokenizer(*, model_id, max_seq_length):
    return AutoTokenizer.from_pretrained(model_id)
def get_model(*, model_id, peft_config, autocast_adapter_dtype):
    base = AutoModelForCausalLM.from_pretrained(model_id)
    return get_peft_model(base, peft_config, autocast_adapter_dtype=autocast_adapter_dtype)
"""
RUN = """
import argparse, torch, utils
from peft import PeftConfig
from utils import get_model
parser = argparse.ArgumentParser()
parser.add_argument("-v", action="store_true")
parser.add_argument("path_experiment")
config = PeftConfig.from_pretrained(parser.parse_args().path_experiment)
model = get_model(model_id="model", peft_config=config, autocast_adapter_dtype=True)
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
for _ in range(2):
    ids = torch.arange(40).view(2, 20)
    model(input_ids=ids, labels=ids).loss.backward()
    optimizer.step()
model.save_pretrained("out")
utils.made.append(model)
"""


@pytest.fixture
def runner(folder, monkeypatch):
    """PEFT's folder with ours in it; returns a function that runs an experiment, and the articles that calibrate."""
    (folder / "utils.py").write_text(UTILS)
    (folder / "run.py").write_text(RUN)
    shutil.copytree(FOLDER, folder, dirs_exist_ok=True)
    articles = [{"text": text} for text in (folder / "text.txt").read_text().split("\n\n")]
    taken = []

    class Stream(list):
        def skip(self, count):
            taken.append(count)
            return self

        def take(self, count):
            return self[:count]

    stub = SimpleNamespace(load_dataset=lambda *names, **options: Stream(articles))
    monkeypatch.setitem(sys.modules, "datasets", stub)
    for name in ("utils", "run_lora_null"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(str(folder))

    def run(experiment):
        monkeypatch.setattr(sys, "argv", ["run_lora_null.py", "-v", str(experiment)])
        import run_lora_null
        import utils

        try:
            run_lora_null.main()
        finally:
            for name in ("utils", "run_lora_null"):
                monkeypatch.delitem(sys.modules, name)
        assert taken == [1000]
        return utils.made[-1]

    return run, [entry["text"] for entry in articles]


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.name)
def test_an_experiment_starts_in_the_null_space_and_trains(experiment, runner, folder, llama, tokenizer):
    run, texts = runner
    # The layers of the tiny model are narrower than the rank of the real run.
    config = json.loads((experiment / "adapter_config.json").read_text())
    mine = folder / "experiments" / "lora_null" / experiment.name
    (mine / "adapter_config.json").write_text(json.dumps({**config, "r": 2}))
    model = run(mine.relative_to(folder))
    factors = {name: p for name, p in model.named_parameters() if "lora_B" in name}
    assert factors and all(float(p.detach().abs().max()) > 0 for p in factors.values())
    covariances = lora_null.calibrate(llama(), token_batches(tokenizer, texts, batch_size=4), progress=False)
    _, rows = adapter_report(folder / "out", covariances, progress=False)
    assert len(rows) == 4 and all(row.name.endswith(("q_proj", "v_proj")) for row in rows)
    start = json.loads((experiment / "start.json").read_text())
    if start["train"] == "b":
        assert max(row.row_energy for row in rows) == pytest.approx(1, abs=1e-2)
    else:
        saved = Adapter.read(folder / "out").factors
        leaks = [lora_null.null_basis(covariances[n], start["energy"]).leak(A) for n, (A, _) in saved.items()]
        assert max(leaks) < 1e-4


@pytest.mark.parametrize("experiment", EXPERIMENTS, ids=lambda path: path.name)
def test_the_folder_has_the_form_that_peft_reads(experiment):
    config = PeftConfig.from_pretrained(str(experiment))
    assert isinstance(config, LoraConfig) and (config.r, config.lora_alpha) == (32, 64)
    parameters = json.loads((experiment / "training_params.json").read_text())
    assert parameters.keys() == {"optimizer_kwargs"} and torch.optim.AdamW(
        [torch.ones(1)], **parameters["optimizer_kwargs"]
    )
    assert len(EXPERIMENTS) == 2

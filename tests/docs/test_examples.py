"""Every example runs as a user starts it, on a small random model, and leaves what stock PEFT and transformers load."""

import json
import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from processes import free_port
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import lora_null

EXAMPLES = Path(__file__).parents[2] / "examples"
NEEDS = {"trl_sft": ["trl", "datasets"], "qlora": ["bitsandbytes"], "qalora": ["torchao"]}
STEPS = {"trainer", "trl_sft"}


@pytest.fixture
def texts(folder):
    (folder / "learn.txt").write_text("\n\n".join((folder / "text.txt").read_text().split("\n\n")[:6]))
    return folder


def arguments(name, folder):
    words = [folder / "text.txt", folder / "learn.txt", folder / "adapter", "--model", folder / "model", "--rank", "4"]
    return [*map(str, words), *(["--steps", "3"] if name in STEPS else [])]


def start(name, monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
    runpy.run_path(str(EXAMPLES / f"{name}.py"), run_name="__main__")


def logits(model):
    with torch.no_grad():
        return model(input_ids=torch.arange(12)[None]).logits


def with_adapter(base, adapter):
    """Load an adapter with stock PEFT and merge it."""
    return PeftModel.from_pretrained(base, str(adapter)).merge_and_unload()


def load(folder):
    return AutoModelForCausalLM.from_pretrained(folder)


def moves_the_base(folder):
    """The adapter fits, and training has changed what the model says."""
    base = load(folder / "model")
    before = logits(base)
    return (logits(with_adapter(base, folder / "adapter")) - before).abs().max() > 1e-4


@pytest.mark.parametrize("name", ["trainer", "trl_sft", "peft_model", "qlora"])
def test_example(name, texts, monkeypatch):
    for package in NEEDS.get(name, []):
        pytest.importorskip(package)
    start(name, monkeypatch, *arguments(name, texts))
    assert moves_the_base(texts)


def test_a_4_bit_model_learns_and_stays_one(texts, monkeypatch):
    for package in NEEDS["qalora"]:
        pytest.importorskip(package)
    start("qalora", monkeypatch, *arguments("qalora", texts), "--group", "8")
    merged = AutoModelForCausalLM.from_pretrained(texts / "adapter", device_map="cpu")
    weight = merged.model.layers[0].mlp.up_proj.weight
    assert weight.qdata.dtype == torch.int8 and -8 <= weight.qdata.min() < weight.qdata.max() <= 7
    assert weight.zero_point.is_floating_point() and not torch.equal(weight.zero_point, weight.zero_point.round())


def test_fsdp2_under_torchrun(texts):
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2", f"--master-port={free_port()}"]
    command += [str(EXAMPLES / "fsdp2.py"), *arguments("fsdp2", texts)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    assert moves_the_base(texts)


def test_continual_tasks_leave_earlier_ones_alone(folder, monkeypatch):
    documents, output = (folder / "text.txt").read_text().split("\n\n"), folder / "out"
    parts = {"keep": documents[:20], "first": documents[20:26], "second": documents[26:32]}
    for name, part in parts.items():
        (folder / f"{name}.txt").write_text("\n\n".join(part))
    words = [folder / f"{name}.txt" for name in parts]
    start("continual", monkeypatch, *words, output, "--model", folder / "model", "--rank", 4, "--energy", 0.8)

    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    keep, first, _ = ([tokenizer(text, return_tensors="pt") for text in part] for part in parts.values())
    covariances = lora_null.calibrate(load(folder / "model"), keep, progress=False)
    model = with_adapter(load(folder / "model"), output / "first")
    covariances = covariances + lora_null.calibrate(model, first, progress=False)
    factors = load_file(output / "second" / "adapter_model.safetensors")
    leaks = {
        name: lora_null.null_basis(covariances[name], 0.8).leak(factors[f"base_model.model.{name}.lora_A.weight"])
        for name, module in model.named_modules()
        if f"base_model.model.{name}.lora_A.weight" in factors
    }
    assert len(leaks) == 14 and max(leaks.values()) < 1e-5, leaks
    before = logits(model)
    after = logits(with_adapter(model, output / "second"))
    assert (after - before).abs().max() > 1e-4
    assert torch.allclose(logits(load(output / "merged")), after, atol=1e-5)


@pytest.fixture
def adapted(texts, monkeypatch):
    """The folder, with an adapter in it and questions."""
    start("peft_model", monkeypatch, *arguments("peft_model", texts))
    asked = [{"question": "w1", "choices": ["w2", f"w{i}"], "answer": i % 2} for i in range(3, 9)]
    (texts / "questions.jsonl").write_text("\n".join(map(json.dumps, asked)))
    return texts


def test_evaluate_and_report_says_what_the_command_says(adapted, monkeypatch, capsys, run):
    words = [adapted / "text.txt", adapted / "learn.txt", adapted / "adapter", "--model", adapted / "model"]
    words += ["--questions", adapted / "questions.jsonl", "--json", adapted / "figures.json"]
    start("evaluate_and_report", monkeypatch, *words)
    printed = capsys.readouterr().out
    figures = json.loads((adapted / "figures.json").read_text())
    texts = {f"--{name}": adapted / file for name, file in (("keep", "text.txt"), ("task", "learn.txt"))}
    texts["--questions"] = adapted / "questions.jsonl"
    options = [word for pair in texts.items() for word in pair]
    code, out, _ = run("eval", adapted / "model", adapted / "adapter", *options, "--json")
    assert code == 0
    (asked,) = json.loads(out)["evaluations"].values()
    for name in ("keep", "task"):
        loss = figures[name]["cross_entropy"]
        assert set(loss) == {"before", "after", "change"}
        for figure, values in loss.items():
            assert values == pytest.approx(asked[name]["cross_entropy"][figure], abs=1e-6)
        assert f"{loss['before']['value']:.3f} to {loss['after']['value']:.3f} nats per token" in printed
        assert loss["before"]["value"] != loss["after"]["value"]
    assert figures["questions"]["questions"] == 6 and "questions: " in printed


def test_serve_writes_what_its_commands_name(adapted, monkeypatch, capsys):
    served = adapted / "served"
    start("serve", monkeypatch, adapted / "adapter", served, "--model", adapted / "model")
    commands = [shlex.split(line) for line in capsys.readouterr().out.splitlines() if not line.startswith("#")]
    assert len(commands) == 6 and ["--max-lora-rank", "8"] == commands[3][-2:]
    paths = {word.removeprefix("tuned=") for command in commands for word in command if str(adapted) in word}
    assert paths == {str(adapted / "model"), str(served / "adapter"), str(served / "merged")}
    whole, tuned = load(served / "merged"), with_adapter(load(adapted / "model"), served / "adapter")
    assert torch.allclose(logits(whole), logits(tuned), atol=1e-5)
    assert (logits(whole) - logits(load(adapted / "model"))).abs().max() > 1e-4
    assert AutoTokenizer.from_pretrained(served / "merged").eos_token == "<end>"


def test_examples_are_short_and_all_of_them_are_run():
    run = {"trainer", "trl_sft", "peft_model", "qlora", "qalora", "fsdp2", "continual", "evaluate_and_report", "serve"}
    files = sorted(EXAMPLES.glob("*.py"))
    assert {file.stem for file in files} == run
    for file in files:
        assert len(file.read_text(encoding="utf-8").splitlines()) <= 40, file.name

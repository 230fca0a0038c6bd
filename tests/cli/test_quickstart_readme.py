"""What README and pages show is what runs: the ten lines, the commands, the environment variables."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import typer
from benchmark_suite import suite

from lora_null import cli

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PAGES = {page.stem: page.read_text(encoding="utf-8") for page in (ROOT / "docs").rglob("*.md")}


def test_the_ten_lines_run(llama, monkeypatch, tmp_path):
    import transformers

    class Tokenizer:
        bos_token_id = 0

        def __call__(self, text, return_tensors):
            assert return_tensors == "pt"
            return {"input_ids": torch.tensor([[ord(letter) % 97 for letter in text]])}

    # wide enough for 32 free directions at 99 % of the energy
    sizes = {"hidden_size": 512, "intermediate_size": 1024}
    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda name: llama(**sizes))
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda name: Tokenizer())
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names = {"texts": [letter * 40 for letter in "abcdefgh"]}
    exec(compile(block, "README.md", "exec"), names)
    assert type(names["model"].model.layers[0].mlp.up_proj) is torch.nn.Linear
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists()


def shown(text):
    """Return the lines of a page that are set off by four blanks, as in a shell, outside of fenced blocks."""
    plain = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    blocks = re.findall(r"(?:^\n|\A)((?:    \S.*\n)+)", plain, re.MULTILINE)
    return [line.strip() for block in blocks for line in block.splitlines()]


def test_every_command_line_is_understood():
    """By the parser of the command itself, which reads the words and runs nothing."""
    commands = typer.main.get_command(cli.app).commands
    lines = [shlex.split(line, comments=True) for line in shown(PAGES["command_line"])]
    assert {name for _, name, *_ in lines} == set(commands)
    targets = set(re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1].split())
    # LLaMA-Factory's, which integrations/test_keep_frozen.py stands in for
    foreign = ("from llamafactory.", "from lora_null.", "run_exp(")
    for line in shown("\n".join([README, *PAGES.values()])):
        if line.startswith(foreign):
            continue
        words = shlex.split(line, comments=True)
        # several processes of a command: what torchrun starts stands behind its own words
        program, *words = words[words.index("--") + 1 :] if words[0] == "torchrun" else words
        assert program in ("lora-null", "make", "pip"), line
        if program == "lora-null":
            commands[words[0]].make_context(words[0], words[1:])
        assert program != "make" or words[0] in targets, line


def test_every_environment_variable_is_listed():
    sources = [*(ROOT / "lora_null").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]
    used = {name for path in sources for name in re.findall(r"\bLORA_NULL_[A-Z_]+\b", path.read_text(encoding="utf-8"))}
    listed = set(re.findall(r"^\| `(LORA_NULL_[A-Z_]+)`", PAGES["reference"], re.MULTILINE))
    assert listed == used


@pytest.mark.parametrize("name", ["calibrate", "initialize", "save_adapter", "load_adapter", "merge"])
def test_public_names_are_shown(name):
    assert name in README


def test_the_readme_fits_a_screen():
    """One picture, one table, one block of Python; the rest is in the pages."""
    assert len(README.splitlines()) <= 90
    assert len(re.findall(r"^!\[", README, re.MULTILINE)) == 1
    assert len(re.findall(r"^\| -", README, re.MULTILINE)) == 1


def test_the_counts_in_the_readme_are_those_of_the_records():
    kept = suite("kept")
    best = {record["method"]: record for record in kept.best(kept.finished(kept.read()))}
    lost = {n: round((best["before"]["accuracy"] - r["accuracy"]) * r["questions"]) for n, r in best.items()}
    words = re.search(r"lost (\d+) of 400 facts; Null-Basis lost (\d+), LoRA-Null (\d+)\.", README)
    assert tuple(map(int, words.groups())) == (lost["LoRA"], lost["Null-Basis"], lost["LoRA-Null"])

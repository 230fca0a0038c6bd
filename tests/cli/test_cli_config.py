"""Options from a YAML file, completion in a shell, and the examples in the help."""

import json
import os
import re
import shlex
import subprocess
import sys

import pytest
import typer

from lora_null import Covariances, cli


def written(folder, text):
    (folder / "run.yaml").write_text(text)
    return folder / "run.yaml"


def kept(folder):
    return json.loads((folder / "adapter" / "lora_null.json").read_text())["config"]


def test_a_file_gives_options_and_flags_win(calibrated_folder, run):
    folder = calibrated_folder
    options = """
        r: 6
        lora-alpha: 1e1
        target_modules: [q_proj, down_proj]
        layers_to_transform: [0, 1]
        rank_pattern: {down_proj: 3, 'layers\\.0\\..*q_proj': 5}
        train: b
        use_rslora: true
        energy: null
    """
    init = ("init", folder / "model", folder / "cov", folder / "adapter", "--config", written(folder, options))
    code, _, err = run(*init, "--r", 4)
    assert code == 0, err
    config = kept(folder)
    assert config["r"] == 4 and config["lora_alpha"] == 10 and config["use_rslora"] is True
    assert config["target_modules"] == ["q_proj", "down_proj"] and config["layers_to_transform"] == [0, 1]
    assert config["rank_pattern"] == {"down_proj": 3, r"layers\.0\..*q_proj": 5}
    assert run(*init, "--overwrite")[0] == 0
    assert kept(folder)["r"] == 6


def test_what_the_command_works_on_may_stand_in_it_too(folder, run):
    text, output = folder / "text.txt", folder / "cov"
    lines = [f"model: {folder / 'model'}", f"output: {output}", "low_memory: true", "progress: false"]
    lines += ["weights: [1, 0.5]", f"data: [{text}, {text}]"]
    code, out, err = run("calibrate", "--config", written(folder, "\n".join(lines)), "--json")
    assert code == 0, err
    assert json.loads(out)["texts"] == [str(text)] * 2
    assert run("calibrate", folder / "model", "--data", text, "--output", folder / "one")[0] == 0
    one, both = Covariances.load(folder / "one"), Covariances.load(output)
    assert all(((1.5 * one[key] - both[key]).abs().max() < 1e-5 * one[key].abs().max()) for key in one)
    code, _, err = run("calibrate", "--config", folder / "run.yaml", "--overwrite", "--weights", "1")
    assert code == 2 and "expected 2, one for each text" in err
    # one value where several may stand
    assert run("add", folder / "one", output, "--config", written(folder, f"output: {folder / 'sum'}"))[0] == 0
    settings = f"model: {folder / 'model'}\noutput: [{folder / 'sum'}, {folder / 'adapter'}]\nr: 4\ntrain: b\n"
    code, _, err = run("init", "--config", written(folder, settings))
    assert code == 0, err
    assert kept(folder)["r"] == 4


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("lora_alhpa: 3", r"run.yaml names 'lora_alhpa', which init does not have. Did you mean lora_alpha\?"),
        ("no-such-thing-anywhere: 3", "which init does not have. Expected accumulate, alpha_pattern, "),
        ("config: other.yaml", "names 'config', which init does not have"),
        ("- r", "holds a list; expected options, in lines such as r: 32"),
        ("r: [", "cannot be read as YAML"),
        ("# r: 4", "holds nothing; expected options, in lines such as r: 32"),
        ("target_modules: [[q_proj]]", r"target_modules holds \['q_proj'\]; expected a number or a word"),
    ],
)
def test_what_it_cannot_say_is_refused_in_one_sentence(calibrated_folder, run, text, said):
    folder = calibrated_folder
    init = ("init", folder / "model", folder / "cov", folder / "adapter", "--config", written(folder, text))
    code, _, err = run(*init)
    assert code == 2 and re.search(said, err) and len(err.splitlines()) == 1, err
    assert not (folder / "adapter").exists()
    code, _, err = run(*init[:-1], folder / "none.yaml")
    assert code == 2 and "none.yaml: no such file; expected a YAML file" in err
    code, _, err = run(*init[:-1], written(folder, "r: many"))
    assert code == 2 and "Invalid value for '--r'" in err and "where the file of --config says r: many" in err
    assert len(err.splitlines()) == 1
    code, _, err = run(*init, "--r", "few")
    assert code == 2 and "Invalid value for '--r'" in err and "the file" not in err


@pytest.mark.parametrize(
    ("words", "number", "offered"),
    [(["lora-null", "cal"], 1, "calibrate"), (["lora-null", "init", "--rank"], 2, "--rank-pattern")],
)
def test_a_shell_completes_commands_and_flags(words, number, offered):
    variables = {"_LORA_NULL_COMPLETE": "complete_bash", "COMP_WORDS": " ".join(words), "COMP_CWORD": str(number)}
    code = "import sys; sys.argv = ['lora-null']; from lora_null import cli; cli.main()"
    environment = {**os.environ, **variables}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert offered in done.stdout.split(), done.stderr


def commands():
    return typer.main.get_command(cli.app).commands


@pytest.mark.parametrize("name", [command.name or command.callback.__name__ for command in cli.app.registered_commands])
def test_help_shows_an_example_that_the_command_takes(name):
    example = re.search(r"^ *Example: lora-null (.*)$", commands()[name].help, re.MULTILINE)
    first, *words = shlex.split(example[1])
    assert first == name
    # reads the words, and runs nothing
    assert commands()[name].make_context(name, words).params


def test_every_command_has_json_and_that_has_options_a_file():
    flags = {name: {flag for p in command.params for flag in p.opts} for name, command in commands().items()}
    assert [name for name in flags if "--json" not in flags[name]] == []
    assert {name for name in flags if "--config" not in flags[name]} == {"doctor"}

"""The texts that calibrate and init read: several, with weights and roles, and those that the model writes."""

import importlib
import json
import re

import pytest
import torch

import lora_null
from lora_null import Covariances, text_batches

CHAT = [{"role": "user", "content": "w1 w2"}, {"role": "assistant", "content": "w3 w4 w5"}]


@pytest.fixture
def texts(folder, tokenizer):
    """The folder, with another text and conversations, and a chat template in the model's tokenizer."""
    lines = (folder / "text.txt").read_text().split("\n\n")
    (folder / "other=0.5,x.txt").write_text("\n\n".join(lines[:9][::-1]))
    (folder / "chat.jsonl").write_text("\n".join([json.dumps({"messages": CHAT})] * 5))
    (folder / "model" / "chat_template.jinja").write_text("{% for m in messages %}{{ m['content'] }} w9 {% endfor %}")
    return folder


def model_of(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(folder / "model"), AutoTokenizer.from_pretrained(folder / "model")


def assert_equal(found, wanted):
    assert found.tokens == wanted.tokens
    assert all(torch.equal(found[key], matrix) for key, matrix in wanted.items())


def test_several_texts_with_weights(texts, run):
    data = [texts / "text.txt", texts / "other=0.5,x.txt"]
    flags = [word for path in data for word in ("--data", path)] + ["--weights", "1,0.5,2", "--generate", 300]
    code, out, err = run("calibrate", texts / "model", *flags, "--output", texts / "cov", "--seed", 3, "--json")
    assert code == 0, err
    said = json.loads(out)
    assert said["texts"] == [*map(str, data), "text that the model wrote"] and said["output"] == str(texts / "cov")
    model, tokenizer = model_of(texts)
    batches = text_batches(tokenizer, data, weights=[1, 0.5], max_tokens=65536, seed=3)
    own = lora_null.own_text(model, tokenizer, 300, seed=3, progress=False)
    batches += [{**batch, "text_weight": 2.0} for batch in own]
    wanted = lora_null.calibrate(model, batches, progress=False)
    assert_equal(Covariances.load(texts / "cov"), wanted)
    assert said["tokens"] == max(wanted.tokens.values()) and said["matrices"] == 8 and said["layers"] == 14


@pytest.mark.parametrize("generate", [(), ("--generate", 256)])
def test_roles(texts, run, generate):
    flags = ("--data", texts / "chat.jsonl", "--roles", "assistant", *generate)
    assert run("calibrate", texts / "model", *flags, "--output", texts / "cov")[0] == 0
    assert set(Covariances.load(texts / "cov").tokens.values()) == {5 * 4 + (256 if generate else 0)}


def test_one_pass_takes_the_same(texts, run):
    flags = ("--data", texts / "text.txt", "--data", texts / "chat.jsonl", "--weights", "1,3", "--roles", "assistant")
    assert run("calibrate", texts / "model", *flags, "--low-memory", "--output", texts / "cov")[0] == 0
    init = ("init", texts / "model", texts / "out", *flags, "--r", 4, "--train", "b")
    code, out, err = run(*init, "--keep-covariances", texts / "kept", "--json")
    assert code == 0, err
    assert_equal(Covariances.load(texts / "kept"), Covariances.load(texts / "cov"))
    assert json.loads(out)["config"]["r"] == 4
    assert not [path.name for path in texts.iterdir() if path.name.startswith(".")]


def test_sizes_hold_for_what_the_model_writes(texts, run):
    calibrate = ("calibrate", texts / "model", "--output", texts / "cov", "--generate", 100, "--overwrite")
    for flags, tokens in (((), 128), (("--sequence-length", 20, "--batch-size", 2), 100)):
        assert run(*calibrate, *flags)[0] == 0
        assert set(Covariances.load(texts / "cov").tokens.values()) == {tokens}
    model, tokenizer = model_of(texts)
    own = lora_null.own_text(model, tokenizer, 100, sequence_length=20, batch_size=2, progress=False)
    assert_equal(Covariances.load(texts / "cov"), lora_null.calibrate(model, own, progress=False))


def test_a_dry_run_lets_the_model_write_nothing(texts, run, monkeypatch):
    # the function of that name hides the module
    module = importlib.import_module("lora_null.calibration.own_text")
    monkeypatch.setattr(module, "own_text", lambda *_, **__: pytest.fail("it wrote"))
    calibrate = ("calibrate", texts / "model", "--generate", 10000, "--sequence-length", 50, "--dry-run")
    code, out, err = run(*calibrate)
    assert code == 0, err
    assert "Tokens: 10,000\n" in out and "one batch of 1,600 positions" in out
    said = json.loads(run(*calibrate, "--json")[1])
    assert said["tokens"] == 10000 and said["measured"] == 1600
    assert {item["device"] for item in said["plan"]["items"]} == {"cpu"} and said["file_size"] > 0


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (("--generate", -3), "generate is -3; expected a positive integer"),
        (("--generate", 0), "generate is 0; expected a positive integer"),
        (("--generate", 9, "--max-tokens", 5), "max_tokens: of texts that are read, and there is no --data"),
        (("--generate", 9, "--roles", "user", "--field", "x"), "field and roles: of texts that are read"),
        (("--data", "text.txt", "--weights", "1,2"), r"weights are \[1.0, 2.0\]; expected 1, one for each text"),
        (("--data", "text.txt", "--weights", "one"), "weights is 'one'; expected numbers with commas, such as 1,0.5"),
        (("--data", "text.txt", "--weights", "1e300"), "weight is 1e\\+300; expected a positive number"),
        (("--data", "text.txt", "--roles", "user", "--mask", "none"), "mask is 'none' beside roles"),
        (("--data", "text.txt", "--output", "text.txt"), "a file of the calibration text"),
        ((), "expected --data FILE"),
    ],
)
def test_what_does_not_go_together_is_refused_before_a_model_is_loaded(texts, run, monkeypatch, flags, said):
    monkeypatch.chdir(texts)
    monkeypatch.setattr("lora_null.models.loading.load_weights", lambda *_, **__: pytest.fail("loaded"))
    monkeypatch.setattr("lora_null.models.loading.load_tokenizer", lambda *_, **__: pytest.fail("loaded"))
    before = {path: path.read_bytes() for path in texts.rglob("*") if path.is_file()}
    code, _, err = run("calibrate", "model", *flags)

    assert code == 2 and re.search(said, err) and len(err.splitlines()) == 1, err
    assert {path: path.read_bytes() for path in texts.rglob("*") if path.is_file()} == before


def test_a_checkpoint_in_use_is_named_and_its_lock_goes_with_its_holder(texts, run):
    from lora_null.calibration.checkpoint import Checkpoint

    calibrate = ("calibrate", texts / "model", "--data", texts / "text.txt", "--output", texts / "cov")
    with Checkpoint(texts / "run", {}).locked():
        assert (texts / ".run.lock").exists()
        code, _, err = run(*calibrate, "--checkpoint", texts / "run")
        assert code == 2 and "in use by another process" in err and (texts / ".run.lock").exists()
    assert not (texts / ".run.lock").exists()
    # what a killed process leaves is taken over
    (texts / ".run.lock").touch()
    assert run(*calibrate, "--checkpoint", texts / "run")[0] == 0
    assert not (texts / ".run.lock").exists()

"""Fixtures shared by the test files."""

import os
import sys
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Test files that run themselves in processes of their own find the helpers too.
os.environ["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent / "support"), os.environ.get("PYTHONPATH", "")])

import pytest
import torch
from tiny_models import make_llama


@pytest.fixture
def llama():
    """The factory, so that a test can make several models with the same weights."""
    return make_llama


@pytest.fixture
def token_batches():
    """Return a function that draws ``count`` batches of token ids ``(batch, length)``."""

    def draw(count=6, batch=4, length=32, vocab_size=97, seed=1):
        generator = torch.Generator().manual_seed(seed)
        return [torch.randint(vocab_size, (batch, length), generator=generator) for _ in range(count)]

    return draw


@pytest.fixture
def calibrated(llama, token_batches):
    """Return ``(model, covariances)`` of the small LLaMA."""
    import lora_null

    model = llama()
    return model, lora_null.calibrate(model, token_batches(), progress=False)


@pytest.fixture
def one_thread():
    """Run on one thread of torch, whatever the number was and will be."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def poisoned_memory(monkeypatch):
    """Fill everything that torch.empty returns with NaN: an element that no kernel writes shows."""
    empty = torch.empty

    def poisoned(*args, **kwargs):
        out = empty(*args, **kwargs)
        return out.fill_(float("nan")) if out.is_floating_point() else out

    monkeypatch.setattr(torch, "empty", poisoned)


@pytest.fixture(scope="session")
def tokenizer():
    """A tokenizer of 97 words, one token each."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {word: index for index, word in enumerate(["<end>", *(f"w{i}" for i in range(96))])}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<end>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<end>", pad_token="<end>")


@pytest.fixture
def folder(llama, tokenizer, tmp_path):
    """A folder with a saved model and a text file; commands write beside them."""
    llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    generator = torch.Generator().manual_seed(0)
    lines = [" ".join(f"w{int(i)}" for i in torch.randint(96, (20,), generator=generator)) for _ in range(40)]
    (tmp_path / "text.txt").write_text("\n\n".join(lines))
    return tmp_path


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process; returns ``(exit code, stdout, stderr)``."""
    from lora_null import cli

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lora-null", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


@pytest.fixture
def calibrated_folder(folder, run):
    """The folder, with the covariances in the file ``cov``."""
    assert run("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "cov")[0] == 0
    return folder


@pytest.fixture
def projections(monkeypatch):
    """Shapes of the projections that were computed, in Python for the purpose."""
    from lora_null.ops import dispatch, vendor
    from lora_null.system import extension

    monkeypatch.setattr(extension, "ready", lambda: None)
    monkeypatch.setattr(dispatch, "_uniform", dispatch._uniform.__wrapped__)
    seen = []
    project = vendor.project

    def counting(x, lora_A, **options):
        seen.append(tuple(x.shape))
        return project(x, lora_A, **options)

    monkeypatch.setattr(vendor, "project", counting)
    return seen


@pytest.fixture
def own_tables(monkeypatch, tmp_path):
    """Neither read nor write the user's tuned data of kernels."""
    from lora_null.kernels import config

    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path))
    config.table.cache_clear()
    yield
    config.table.cache_clear()

"""What the command line refuses: one clear message on stderr, exit code 2, nothing written."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_null


def refused(run, *arguments, match):
    code, _, err = run(*arguments)
    assert code == 2 and "Traceback" not in err
    assert re.search(match, err), err
    return err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        ("init --lora-alhpa 3", "No such option: --lora-alhpa .*--lora-alpha.* See lora-null init --help."),
        ("--verison", "No such option: --verison .*--version.* See lora-null --help."),
        ("calibrate", "Missing argument 'model'. See lora-null calibrate --help."),
        ("calibrat model", "No such command 'calibrat'. Did you mean 'calibrate'. See lora-null --help."),
        ("doctor twice", r"Got unexpected extra argument.* See lora-null doctor --help."),
        ("bench --d many", "Invalid value for '--d': .*integer.* See lora-null bench --help."),
        ("init model out --method x", "'x' is not one of 'auto', 'exact', 'filtered'. See lora-null init --help."),
        ("init --config", "Option '--config' requires an argument. See lora-null --help."),
        ("init --config /", "/ is a folder; expected a YAML file"),
    ],
)
def test_what_the_parser_refuses_is_one_sentence(run, words, said):
    err = refused(run, *words.split(), match=f"^error: .*{said}")
    assert len(err.splitlines()) == 1, err


def test_without_a_command_there_is_help(run):
    code, out, err = run()
    assert code == 2 and out == "" and err.startswith("Usage: lora-null") and "quickstart" in err


def test_missing_and_foreign_files(folder, run):
    refused(run, "inspect", folder / "nowhere", match="no such file")
    refused(run, "inspect", folder / "text.txt", match="damaged|safetensors")
    refused(run, "inspect", folder / "model", match="not an adapter folder")
    refused(run, "export", folder / "nowhere", folder / "out", match=r"adapter_config.json")
    refused(run, "export", folder / "model", folder / "out", match="plain or merged model")
    save_file({"other": torch.ones(1)}, folder / "other.safetensors")
    refused(run, "init", folder / "model", folder / "other.safetensors", folder / "out", match="covariances")
    refused(run, "calibrate", folder / "model", "--data", folder / "nowhere", match="no such file")
    refused(run, "merge", folder / "nowhere", folder / "adapter", folder / "out", match="not a folder")
    assert not (folder / "out").exists()


def test_a_model_without_its_tokenizer(folder, run):
    ignored = shutil.ignore_patterns("*token*")
    shutil.copytree(folder / "model", folder / "bare", ignore=ignored)
    data = folder / "text.txt"
    err = refused(run, "calibrate", folder / "bare", "--data", data, match="^error: .*holds no tokenizer")
    assert len(err.splitlines()) == 1, err


def test_existing_output(calibrated_folder, run):
    folder = calibrated_folder
    before = (folder / "cov").read_bytes()
    text = folder / "text.txt"
    refused(run, "calibrate", folder / "model", "--data", text, "--output", folder / "cov", match="--overwrite")
    assert (folder / "cov").read_bytes() == before
    init = ("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
    assert run(*init)[0] == 0
    refused(run, *init, match="--overwrite")
    assert run(*init, "--overwrite")[0] == 0
    merge = ("merge", folder / "model", folder / "adapter", folder / "merged")
    assert run(*merge)[0] == 0
    refused(run, *merge, match="--overwrite")
    assert run(*merge, "--overwrite")[0] == 0
    (folder / "mine").mkdir()
    (folder / "mine" / "notes.txt").write_text("keep")
    refused(run, *merge[:3], folder / "mine", "--overwrite", match="not a model folder")
    assert (folder / "mine" / "notes.txt").read_text() == "keep"
    assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]


@pytest.mark.parametrize("name", ["notes.txt", "checkpoint-5/state.json"])
def test_merge_keeps_other_files(calibrated_folder, run, name):
    folder = calibrated_folder
    run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
    merge = ("merge", folder / "model", folder / "adapter")
    assert run(*merge, folder / "merged")[0] == 0
    mine = folder / "merged" / name
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("keep")
    refused(run, *merge, folder / "merged", "--overwrite", match=name.split("/")[0])
    assert mine.read_text() == "keep"


def test_merge_replaces_what_its_tokenizer_wrote(calibrated_folder, run, monkeypatch):
    """Vocabulary files have many names, which no list holds."""
    from transformers import PreTrainedTokenizerFast

    folder = calibrated_folder
    run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
    save = PreTrainedTokenizerFast.save_pretrained

    def with_vocabulary(self, path, **options):
        (Path(path) / "spiece.model").write_text("pieces")
        return save(self, path, **options)

    monkeypatch.setattr(PreTrainedTokenizerFast, "save_pretrained", with_vocabulary)
    merge = ("merge", folder / "model", folder / "adapter", folder / "merged")
    (folder / "merged").mkdir()
    assert run(*merge)[0] == 0 and (folder / "merged" / "spiece.model").exists()
    assert run(*merge, "--overwrite")[0] == 0
    (folder / "merged" / "LICENSE").write_text("mine")
    refused(run, *merge, "--overwrite", match="LICENSE.* which overwriting would delete")


def test_merge_onto_its_inputs(calibrated_folder, run):
    folder = calibrated_folder
    run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
    merge = ("merge", folder / "model", folder / "adapter")
    before = {path: path.read_bytes() for path in folder.glob("*/*")}
    (folder / "link").symlink_to(folder / "model")
    for output in ("model", "adapter", "link", "model/../model"):
        refused(run, *merge, folder / output, "--overwrite", match="that the merge reads")
    (folder / "link").unlink()
    assert {path: path.read_bytes() for path in folder.glob("*/*")} == before


def test_devices_and_expressions(calibrated_folder, run):
    folder = calibrated_folder
    init = ("init", folder / "model", folder / "cov", folder / "out", "--r", 4)
    refused(run, *init, "--device", "foo", match="device is 'foo'")
    refused(run, *init, "--device", "cuda:99", match="device is 'cuda:99'")
    refused(run, *init, "--target-modules", "[", match="no regular expression")
    calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "out")
    refused(run, *calibrate, "--target-modules", "(", match="no regular expression")
    assert not (folder / "out").exists()


def test_meta_is_no_device_to_run_on(calibrated_folder, run):
    folder = calibrated_folder
    refused(run, "bench", "--device", "meta", match="device is 'meta', which holds no data")
    init = ("init", folder / "model", folder / "cov", folder / "out", "--r", 4)
    refused(run, *init, "--device", "meta:0", match="expected auto, cpu, cuda or cuda:N")


def test_checkpoint_that_cannot_be_written(folder, run, monkeypatch):
    monkeypatch.setattr("lora_null.models.loading.load_weights", lambda *_, **__: pytest.fail("loaded"))
    calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "out")
    refused(run, *calibrate, "--checkpoint", folder, match="is a folder; expected the name of a file")
    refused(run, *calibrate, "--checkpoint", folder / "text.txt", match="cannot be read as a safetensors")
    refused(run, *calibrate, "--checkpoint", folder / "text.txt" / "c", match="text.txt is a file")
    refused(run, *calibrate, "--checkpoint", folder / "out", match="expected a file for each")
    assert (folder / "text.txt").read_text().startswith("w")


def test_a_checkpoint_of_a_patched_model_is_no_base(calibrated_folder, run):
    from transformers import AutoModelForCausalLM

    folder = calibrated_folder
    model = AutoModelForCausalLM.from_pretrained(folder / "model")
    config = lora_null.LoraNullConfig(r=4, freeze_a=False)
    lora_null.initialize(model, lora_null.Covariances.load(folder / "cov"), config, progress=False)
    model.save_pretrained(folder / "checkpoint")
    shutil.copy(folder / "model" / "tokenizer.json", folder / "checkpoint")
    shutil.copy(folder / "model" / "tokenizer_config.json", folder / "checkpoint")
    calibrate = ("calibrate", folder / "checkpoint", "--data", folder / "text.txt", "--output", folder / "out")
    refused(run, *calibrate, match="would lack its adapters.* lora-null export")


def test_output_that_cannot_be_written(calibrated_folder, run, monkeypatch):
    folder = calibrated_folder
    monkeypatch.setattr("lora_null.models.loading.load_weights", lambda *_, **__: pytest.fail("loaded"))
    calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt")
    refused(run, *calibrate, "--output", folder / "model", "--overwrite", match="is a folder")
    refused(run, *calibrate, "--output", folder / "text.txt", "--overwrite", match="a file of the calibration text")
    below = folder / "text.txt" / "below" / "out"
    refused(run, *calibrate, "--output", below, match="text.txt is a file")
    refused(run, "init", folder / "model", folder / "cov", below, match="text.txt is a file")
    refused(run, "merge", folder / "model", folder / "cov", below, match="text.txt is a file")
    refused(run, "export", folder / "model", below, match="text.txt is a file")


def test_overwrite_is_for_covariances_only(calibrated_folder, run, monkeypatch):
    folder = calibrated_folder
    calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt", "--overwrite", "--output")
    assert run(*calibrate, folder / "cov")[0] == 0
    monkeypatch.setattr("lora_null.models.loading.load_weights", lambda *_, **__: pytest.fail("loaded"))
    for name in ("model/model.safetensors", "model/config.json"):
        before = (folder / name).read_bytes()
        refused(run, *calibrate, folder / name, match="exists and is no covariance file")
        assert (folder / name).read_bytes() == before
    refused(run, *calibrate, folder / ("x" * 256), match="has 256 bytes; expected names of at most")


def test_a_folder_that_may_not_be_written_to(folder, run, monkeypatch):
    monkeypatch.setattr("lora_null.models.loading.load_weights", lambda *_, **__: pytest.fail("loaded"))
    # The administrator, who may run the tests, may write anywhere, but nobody can write there.
    calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt")
    refused(run, *calibrate, "--output", "/proc/below/out", match="may not write to /proc")
    refused(run, *calibrate, "--output", folder / "below" / ("x" * 256), match="has 256 bytes; expected names of")


def test_sizes_and_options_without_effect(calibrated_folder, run):
    folder = calibrated_folder
    calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "out")
    for name in ("batch-size", "sequence-length", "max-tokens"):
        refused(run, *calibrate, f"--{name}", 0, match=f"{name.replace('-', '_')} is 0")
    refused(run, "inspect", folder / "cov", "--covariances", folder / "cov", match="adapter folder")
    refused(run, "inspect", folder / "model", "--against", folder / "cov", match="file of covariances")
    refused(run, "inspect", folder / "cov", "--r", 4, "--against", folder / "cov", match="the same text")
    init = ("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
    refused(run, *init, "--lora-dropout", 1, match="lora_dropout is 1")
    assert run(*init, "--lora-dropout", 0.25)[0] == 0
    own = json.loads((folder / "adapter" / "lora_null.json").read_text())
    assert own["config"]["lora_dropout"] == 0.25


def test_impossible_settings(calibrated_folder, run):
    folder = calibrated_folder
    init = ("init", folder / "model", folder / "cov", folder / "out")
    refused(run, *init, "--r", 400, match="larger than d=48")
    refused(run, *init, "--target-modules", "no_proj", match="no_proj")
    refused(run, *init, "--dtype", "int8", match="dtype")
    refused(run, "inspect", folder / "cov", "--r", 400, match="expected 1 <= r < 48")
    refused(run, "bench", "--r", 0, match="positive")
    refused(run, "bench", "--d", 10**7, "--m", 64, match="needed on cpu, .* Choose smaller sizes")
    refused(run, "quickstart", "--steps", 0, "--output", folder / "q", match="steps=0")
    assert not (folder / "out").exists()


def test_adapter_for_another_model(calibrated_folder, run, llama):
    folder = calibrated_folder
    run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
    llama(seed=1).save_pretrained(folder / "other")
    from transformers import AutoTokenizer

    AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "other")
    merge = ("merge", folder / "other", folder / "adapter", folder / "merged")
    refused(run, *merge, match="other weights")
    assert run(*merge, "--no-verify-base")[0] == 0
    init = ("init", folder / "other", folder / "cov", folder / "start", "--r", 4)
    refused(run, *init, match="other weights")
    assert run(*init, "--no-verify-base")[0] == 0


def test_pickled_weights_are_never_opened(folder, run):
    weights = folder / "model" / "model.safetensors"
    torch.save(load_file(weights), folder / "model" / "pytorch_model.bin")
    weights.unlink()
    calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "cov")
    refused(run, *calibrate, match="holds no weights as safetensors; expected model.safetensors")


def test_incomplete_checkpoint(folder, run):
    (folder / "broken").mkdir()
    save_file({"layer.lora_A.weight": torch.ones(2, 3)}, folder / "broken" / "model.safetensors")
    refused(run, "export", folder / "broken", folder / "out", match="incomplete")


def test_a_defect_of_the_package_keeps_its_traceback(run, monkeypatch, folder):
    def fail(*_, **__):
        raise RuntimeError("defect")

    monkeypatch.setattr("lora_null.evaluation.report.adapter_report", fail)
    with pytest.raises(RuntimeError, match="defect"):
        run("inspect", folder)

"""The command line on a small model: every command, its refusals, its help."""

import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file, save_file

import lora_null
from lora_null import cli
from lora_null._cli_inputs import parse_dtype, read_texts, token_batches
from lora_null._cli_options import parse_targets

COMMANDS = ("calibrate", "init", "export", "merge", "inspect", "bench", "quickstart")


@pytest.fixture(scope="module")
def tokenizer():
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

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["lora-null", *map(str, arguments)])
        with pytest.raises(SystemExit) as ended:
            cli.main()
        captured = capsys.readouterr()
        return ended.value.code, captured.out, captured.err

    return call


@pytest.fixture
def calibrated_folder(folder, run):
    assert run("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "cov")[0] == 0
    return folder


def logits(model):
    with torch.inference_mode():
        return model(torch.arange(60).view(2, 30)).logits


def load(folder, name="model"):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder / name)


class TestHelp:
    @pytest.mark.parametrize("command", ["", *COMMANDS])
    def test_fits_a_screen(self, run, monkeypatch, command):
        monkeypatch.setenv("COLUMNS", "80")
        code, out, _ = run(*filter(None, [command]), "--help")
        assert code == 0 and len(out.splitlines()) <= 40
        assert max(map(len, out.splitlines())) <= 80
        assert not command or all(name in out for name in ("Usage", "Options"))

    def test_flags_are_the_names_of_the_python_arguments(self):
        """What a flag sets must be an argument of the function behind the command."""
        from lora_null.export import export_adapter
        from lora_null.quickstart.run import Settings
        from lora_null.report import adapter_report, spectrum_report

        fields = set(lora_null.LoraNullConfig.__dataclass_fields__)
        behind = {
            "calibrate": [lora_null.calibrate, token_batches, read_texts],
            "init": [lora_null.initialize],
            "export": [export_adapter],
            "inspect": [adapter_report, spectrum_report],
            "quickstart": [Settings],
        }
        common = {"output", "overwrite", "dtype", "device", "json"}
        for name, functions in behind.items():
            (command,) = [c.callback for c in cli.app.registered_commands if c.callback.__name__ == name]
            known = fields | common | {p for f in functions for p in inspect.signature(f).parameters}
            assert set(inspect.signature(command).parameters) <= known | {"path", "covariances"}, name

    def test_version_and_no_heavy_import(self):
        code = (
            "import sys; sys.argv = ['lora-null', '--version']\n"
            "from lora_null import cli\n"
            "try: cli.main()\n"
            "except SystemExit: pass\n"
            "print([name for name in ('torch', 'transformers', 'peft', 'triton') if name in sys.modules])"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.stdout.splitlines() == [f"lora_null {lora_null.__version__}", "[]"], done.stderr


class TestCommands:
    def test_calibrate_equals_the_library(self, calibrated_folder, tokenizer):
        folder = calibrated_folder
        covariances = lora_null.Covariances.load(folder / "cov")
        batches = token_batches(tokenizer, read_texts(folder / "text.txt"), max_tokens=65536)
        expected = lora_null.calibrate(load(folder), batches, progress=False)
        assert covariances.tokens == expected.tokens and covariances.groups == expected.groups
        assert all(torch.equal(covariances[key], matrix) for key, matrix in expected.items())

    @pytest.mark.parametrize("mode", ["--freeze-a", "--no-freeze-a"])
    def test_init_changes_no_output_and_can_be_trained_on(self, calibrated_folder, run, mode):
        folder = calibrated_folder
        code, out, err = run(
            "init", folder / "model", folder / "cov", folder / "adapter", "--r", 4, "--lora-alpha", 8, mode
        )
        assert code == 0, err
        assert "is_trainable=True" in out
        base = load(folder)
        expected = logits(base)
        model = lora_null.load_adapter(base, folder / "adapter", is_trainable=True)
        torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
        trainable = {name.split(".")[-2] for name, p in model.named_parameters() if p.requires_grad}
        assert trainable == ({"lora_B"} if mode == "--freeze-a" else {"lora_A", "lora_B"})

    def test_export_and_merge_agree_with_the_trained_model(self, calibrated_folder, run):
        folder = calibrated_folder
        run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
        model = lora_null.load_adapter(load(folder), folder / "adapter", is_trainable=True)
        torch.manual_seed(0)
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B.weight"):
                torch.nn.init.normal_(parameter, std=0.3)
        expected = logits(model)
        lora_null.save_adapter(model, folder / "trained")
        assert run("merge", folder / "model", folder / "trained", folder / "merged")[0] == 0
        torch.testing.assert_close(logits(load(folder, "merged")), expected, rtol=1e-4, atol=1e-5)
        assert (folder / "merged" / "tokenizer.json").exists()
        assert run("export", folder / "trained", folder / "plain", "--dtype", "bf16")[0] == 0
        tensors = load_file(folder / "plain" / "adapter_model.safetensors")
        assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
        config = json.loads((folder / "plain" / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 4 and config["init_lora_weights"] is True
        assert config["target_modules"] == ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"]

    @pytest.mark.parametrize("freeze_a", [True, False])
    @pytest.mark.parametrize("sharded", [False, True])
    def test_export_of_a_trainers_checkpoint(self, llama, calibrated_folder, run, freeze_a, sharded):
        """A model saved as a trainer saves it becomes an adapter that stock PEFT reads on the untouched base."""
        from peft import PeftModel

        folder = calibrated_folder
        covariances = lora_null.Covariances.load(folder / "cov")
        config = lora_null.LoraNullConfig(r=4, lora_alpha=6, freeze_a=freeze_a)
        model = lora_null.initialize(load(folder), covariances, config, progress=False)
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        expected = logits(model)
        model.save_pretrained(folder / "checkpoint", max_shard_size="60KB" if sharded else "1GB")
        assert (folder / "checkpoint" / "model.safetensors.index.json").exists() == sharded
        code, out, err = run("export", folder / "checkpoint", folder / "plain", "--lora-alpha", 6)
        assert code == 0, err
        assert f"rank {4 if freeze_a else 8}" in out
        reloaded = PeftModel.from_pretrained(load(folder), folder / "plain")
        torch.testing.assert_close(logits(reloaded), expected, rtol=1e-4, atol=1e-5)

    @pytest.mark.parametrize("freeze_a", [True, False])
    @pytest.mark.parametrize("given", [(), ("--lora-alpha", 6)])
    def test_export_takes_scaling_and_mode_from_the_checkpoint(self, calibrated_folder, run, caplog, freeze_a, given):
        folder = calibrated_folder
        config = lora_null.LoraNullConfig(r=4, lora_alpha=6, freeze_a=freeze_a, lora_dropout=0.1)
        covariances = lora_null.Covariances.load(folder / "cov")
        model = lora_null.initialize(load(folder), covariances, config, progress=False).eval()
        torch.manual_seed(0)
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data.add_(torch.randn_like(parameter), alpha=0.1)
        expected = logits(model)
        model.save_pretrained(folder / "checkpoint")
        written = json.loads((folder / "checkpoint" / "config.json").read_text())
        # An explicit --lora-alpha wins over what the checkpoint states.
        stated = {**config.to_dict(), "lora_alpha": 999 if given else 6}
        own = {"format": 1, "version": "0", "config": stated, "base_fingerprint": None, "energies": {"a": 0.5}}
        written["lora_null"] = own
        (folder / "checkpoint" / "config.json").write_text(json.dumps(written))
        caplog.clear()
        code, _, err = run("export", folder / "checkpoint", folder / "plain", *given)
        assert code == 0, err
        assert "lora_alpha" not in caplog.text
        kept = json.loads((folder / "plain" / "lora_null.json").read_text())
        assert kept == {**own, "config": config.to_dict(), "stacked": not freeze_a}
        reloaded = lora_null.load_adapter(load(folder), folder / "plain", is_trainable=True).eval()
        torch.testing.assert_close(logits(reloaded), expected, rtol=1e-4, atol=1e-5)
        written["lora_null"] = {"config": {"r": "many"}}
        (folder / "checkpoint" / "config.json").write_text(json.dumps(written))
        code, _, err = run("export", folder / "checkpoint", folder / "other")
        assert code == 2 and "damaged" in err

    def test_export_of_a_checkpoint_without_scaling_warns(self, calibrated_folder, run, caplog):
        folder = calibrated_folder
        covariances = lora_null.Covariances.load(folder / "cov")
        model = lora_null.initialize(load(folder), covariances, lora_null.LoraNullConfig(r=4), progress=False)
        model.save_pretrained(folder / "checkpoint")
        written = json.loads((folder / "checkpoint" / "config.json").read_text())
        written.pop("lora_null", None)
        (folder / "checkpoint" / "config.json").write_text(json.dumps(written))
        assert run("export", folder / "checkpoint", folder / "plain")[0] == 0
        assert "lora_alpha = r is assumed" in caplog.text
        caplog.clear()
        assert run("export", folder / "checkpoint", folder / "given", "--lora-alpha", 4)[0] == 0
        assert not caplog.text

    def test_inspect_covariances(self, calibrated_folder, run):
        code, out, _ = run("inspect", calibrated_folder / "cov", "--r", 4)
        assert code == 0
        for column in ("null energy", "eff. rank", "condition", "tokens"):
            assert column in out
        assert out.count("model.layers.") == 8
        code, out, _ = run("inspect", calibrated_folder / "cov", "--r", 4, "--json")
        values = json.loads(out)
        assert len(values["layers"]) == 8 and all(0 < row["null_energy"] < 4 / row["d"] for row in values["layers"])

    def test_inspect_adapter(self, calibrated_folder, run):
        folder = calibrated_folder
        run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
        code, out, _ = run("inspect", folder / "adapter", "--covariances", folder / "cov", "--json")
        values = json.loads(out)
        assert code == 0 and values["r"] == 4 and len(values["updates"]) == 14
        assert all(row["norm"] == 0 and row["row_energy"] == pytest.approx(1, abs=1e-2) for row in values["updates"])
        code, out, _ = run("inspect", folder / "adapter")
        assert code == 0 and "|dW|" in out and "freeze_a=True" in out

    def test_bench(self, run):
        code, out, _ = run("bench", "--d", 48, "--m", 40, "--r", 4, "--tokens", 32, "--repeats", 2, "--json")
        timings = json.loads(out)["timings"]
        assert code == 0 and {"lora_linear, A frozen", "null_space"} <= {row["operation"] for row in timings}
        assert all(0 < row["ms_20"] <= row["ms"] <= row["ms_80"] for row in timings)


class TestRefusals:
    """One clear message on stderr, exit code 2, nothing written."""

    def refused(self, run, *arguments, match):
        code, _, err = run(*arguments)
        assert code == 2 and "Traceback" not in err
        assert re.search(match, err), err
        return err

    def test_missing_and_foreign_files(self, folder, run):
        self.refused(run, "inspect", folder / "nowhere", match="no such file")
        self.refused(run, "inspect", folder / "text.txt", match="damaged|safetensors")
        self.refused(run, "inspect", folder / "model", match="not an adapter folder")
        self.refused(run, "export", folder / "nowhere", folder / "out", match=r"adapter_config.json")
        self.refused(run, "export", folder / "model", folder / "out", match="plain or merged model")
        save_file({"other": torch.ones(1)}, folder / "other.safetensors")
        self.refused(run, "init", folder / "model", folder / "other.safetensors", folder / "out", match="covariances")
        self.refused(run, "calibrate", folder / "model", "--data", folder / "nowhere", match="not a file")
        self.refused(run, "merge", folder / "nowhere", folder / "adapter", folder / "out", match="not a folder")
        assert not (folder / "out").exists()

    def test_existing_output(self, calibrated_folder, run):
        folder = calibrated_folder
        before = (folder / "cov").read_bytes()
        text = folder / "text.txt"
        self.refused(
            run, "calibrate", folder / "model", "--data", text, "--output", folder / "cov", match="--overwrite"
        )
        assert (folder / "cov").read_bytes() == before
        init = ("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
        assert run(*init)[0] == 0
        self.refused(run, *init, match="--overwrite")
        assert run(*init, "--overwrite")[0] == 0
        merge = ("merge", folder / "model", folder / "adapter", folder / "merged")
        assert run(*merge)[0] == 0
        self.refused(run, *merge, match="--overwrite")
        assert run(*merge, "--overwrite")[0] == 0
        (folder / "mine").mkdir()
        (folder / "mine" / "notes.txt").write_text("keep")
        self.refused(run, *merge[:3], folder / "mine", "--overwrite", match="not a model folder")
        assert (folder / "mine" / "notes.txt").read_text() == "keep"
        assert not [path.name for path in folder.iterdir() if path.name.startswith(".")]

    @pytest.mark.parametrize("name", ["notes.txt", "checkpoint-5/state.json"])
    def test_merge_keeps_other_files(self, calibrated_folder, run, name):
        folder = calibrated_folder
        run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
        merge = ("merge", folder / "model", folder / "adapter")
        assert run(*merge, folder / "merged")[0] == 0
        mine = folder / "merged" / name
        mine.parent.mkdir(exist_ok=True)
        mine.write_text("keep")
        self.refused(run, *merge, folder / "merged", "--overwrite", match=name.split("/")[0])
        assert mine.read_text() == "keep"

    def test_merge_onto_its_inputs(self, calibrated_folder, run):
        folder = calibrated_folder
        run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
        merge = ("merge", folder / "model", folder / "adapter")
        before = {path: path.read_bytes() for path in folder.glob("*/*")}
        (folder / "link").symlink_to(folder / "model")
        for output in ("model", "adapter", "link", "model/../model"):
            self.refused(run, *merge, folder / output, "--overwrite", match="that the merge reads")
        (folder / "link").unlink()
        assert {path: path.read_bytes() for path in folder.glob("*/*")} == before

    def test_devices_and_expressions(self, calibrated_folder, run):
        folder = calibrated_folder
        init = ("init", folder / "model", folder / "cov", folder / "out", "--r", 4)
        self.refused(run, *init, "--device", "foo", match="device is 'foo'")
        self.refused(run, *init, "--device", "cuda:99", match="device is 'cuda:99'")
        self.refused(run, *init, "--target-modules", "[", match="no regular expression")
        calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "out")
        self.refused(run, *calibrate, "--target-modules", "(", match="no regular expression")
        assert not (folder / "out").exists()

    def test_output_that_cannot_be_written(self, calibrated_folder, run, monkeypatch):
        folder = calibrated_folder
        monkeypatch.setattr("lora_null._cli_inputs.load_model", lambda *_, **__: pytest.fail("loaded"))
        calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt")
        self.refused(run, *calibrate, "--output", folder / "model", "--overwrite", match="is a folder")
        below = folder / "text.txt" / "below" / "out"
        self.refused(run, *calibrate, "--output", below, match="text.txt is a file")
        self.refused(run, "init", folder / "model", folder / "cov", below, match="text.txt is a file")
        self.refused(run, "merge", folder / "model", folder / "cov", below, match="text.txt is a file")
        self.refused(run, "export", folder / "model", below, match="text.txt is a file")

    def test_sizes_and_options_without_effect(self, calibrated_folder, run):
        folder = calibrated_folder
        calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "out")
        for name in ("batch-size", "sequence-length", "max-tokens"):
            self.refused(run, *calibrate, f"--{name}", 0, match=f"{name.replace('-', '_')} is 0")
        self.refused(run, "inspect", folder / "cov", "--covariances", folder / "cov", match="adapter folder")
        init = ("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
        self.refused(run, *init, "--lora-dropout", 1, match="lora_dropout is 1")
        assert run(*init, "--lora-dropout", 0.25)[0] == 0
        own = json.loads((folder / "adapter" / "lora_null.json").read_text())
        assert own["config"]["lora_dropout"] == 0.25

    def test_impossible_settings(self, calibrated_folder, run):
        folder = calibrated_folder
        init = ("init", folder / "model", folder / "cov", folder / "out")
        self.refused(run, *init, "--r", 400, match="min")
        self.refused(run, *init, "--target-modules", "no_proj", match="no_proj")
        self.refused(run, *init, "--dtype", "int8", match="dtype")
        self.refused(run, "inspect", folder / "cov", "--r", 400, match="expected 1 <= r < 48")
        self.refused(run, "bench", "--r", 0, match="positive")
        self.refused(run, "quickstart", "--steps", 0, "--output", folder / "q", match="steps=0")
        assert not (folder / "out").exists()

    def test_adapter_for_another_model(self, calibrated_folder, run, llama):
        folder = calibrated_folder
        run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
        llama(seed=1).save_pretrained(folder / "other")
        from transformers import AutoTokenizer

        AutoTokenizer.from_pretrained(folder / "model").save_pretrained(folder / "other")
        merge = ("merge", folder / "other", folder / "adapter", folder / "merged")
        self.refused(run, *merge, match="other weights")

    def test_incomplete_checkpoint(self, folder, run):
        (folder / "broken").mkdir()
        save_file({"layer.lora_A.weight": torch.ones(2, 3)}, folder / "broken" / "model.safetensors")
        self.refused(run, "export", folder / "broken", folder / "out", match="incomplete")

    def test_a_defect_of_the_package_keeps_its_traceback(self, run, monkeypatch, folder):
        def fail(*_, **__):
            raise RuntimeError("defect")

        monkeypatch.setattr("lora_null.report.adapter_report", fail)
        with pytest.raises(RuntimeError, match="defect"):
            run("inspect", folder)


class TestInputs:
    def test_text_file_is_read_by_paragraphs(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"one\ntwo\r\n\r\nthree\n\n\n\nfour\n")
        assert read_texts(tmp_path / "a.txt") == ["one\ntwo", "three", "four"]

    def test_jsonl_fields(self, tmp_path):
        path = tmp_path / "a.jsonl"
        path.write_text('{"text": "a"}\n\n{"question": "b", "answer": "c"}\n"d"\n')
        assert read_texts(path) == ["a", "b\nc", "d"]
        path.write_text('{"text": "a", "body": "b"}\n')
        assert read_texts(path, field="body") == ["b"]

    @pytest.mark.parametrize(
        ("content", "match"),
        [('{"text": 1}', "line 1 has"), ("[1]", "a list"), ("{", "line 1 is not JSON"), ("", "holds no text")],
    )
    def test_bad_jsonl(self, tmp_path, content, match):
        (tmp_path / "a.jsonl").write_text(content)
        with pytest.raises(ValueError, match=match):
            read_texts(tmp_path / "a.jsonl")

    def test_binary_file(self, tmp_path):
        (tmp_path / "a.txt").write_bytes(b"\xff\xfe\x00")
        with pytest.raises(ValueError, match="UTF-8"):
            read_texts(tmp_path / "a.txt")

    def test_batches_keep_every_token_and_cut_long_documents(self, tokenizer):
        texts = ["w1 w2 w3 w4 w5", "w6", "w7 w8"]
        batches = token_batches(tokenizer, texts, sequence_length=3, batch_size=2)
        kept = [ids[mask.bool()].tolist() for b in batches for ids, mask in zip(*b.values(), strict=True)]
        assert sorted(kept) == [[2, 3, 4], [5, 6], [7], [8, 9]]

    def test_max_tokens_draws_whole_documents_in_a_seeded_order(self, tokenizer):
        texts = [f"w{i} w{i}" for i in range(50)]

        def drawn(seed):
            batches = token_batches(tokenizer, texts, max_tokens=20, seed=seed)
            return sorted(int(row[0]) for batch in batches for row in batch["input_ids"])

        assert len(drawn(0)) == 10 and drawn(0) == drawn(0) != drawn(1)

    def test_targets_and_dtypes(self):
        assert parse_targets("all-linear") == "all-linear"
        assert parse_targets("q_proj, v_proj") == ("q_proj", "v_proj")
        assert parse_targets(r".*\.q_proj") == r".*\.q_proj"
        assert parse_dtype("bf16") == parse_dtype("bfloat16") == torch.bfloat16 and parse_dtype("auto") is None
        with pytest.raises(ValueError, match="bfloat16"):
            parse_dtype("bool")

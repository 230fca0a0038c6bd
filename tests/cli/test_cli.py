"""The command line on a small model: every command and its help."""

import inspect
import json
import re
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file

import lora_null
from lora_null import cli
from lora_null.calibration.sources import read_texts
from lora_null.calibration.texts import token_batches

COMMANDS = (
    "calibrate",
    "add",
    "init",
    "export",
    "merge",
    "eval",
    "inspect",
    "report",
    "tune",
    "bench",
    "doctor",
    "quickstart",
)


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
        assert not command or all(word in out for word in ("Usage", "Options", f"Example: lora-null {command}"))

    def test_flags_are_the_names_of_the_python_arguments(self):
        """What a flag sets must be an argument of the function behind the command."""
        from lora_null.adapters import export_adapter
        from lora_null.evaluation import write_report
        from lora_null.evaluation.report import adapter_report, spectrum_report
        from lora_null.models.settings import Loading
        from lora_null.quickstart.settings import Settings

        fields = set(lora_null.LoraNullConfig.__dataclass_fields__)
        behind = {
            "calibrate": [lora_null.calibrate, lora_null.text_batches],
            "init": [lora_null.initialize, lora_null.initialize_streaming, lora_null.text_batches],
            "export": [export_adapter],
            "evaluate": [lora_null.evaluate, lora_null.load_adapter],
            "inspect": [adapter_report, spectrum_report],
            "report": [write_report],
            "quickstart": [Settings],
        }
        common = {"config", "output", "overwrite", "dry_run", "json", "data", *Loading.__dataclass_fields__}
        for name, functions in behind.items():
            (command,) = [c.callback for c in cli.app.registered_commands if c.callback.__name__ == name]
            known = fields | common | {p for f in functions for p in inspect.signature(f).parameters}
            assert set(inspect.signature(command).parameters) <= known | {
                "path",
                "covariances",
                "adapters",
                "eval",
                "generate",
            }, name

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

    def test_calibrate_on_text_that_the_model_writes(self, folder, run, tokenizer):
        calibrate = ("calibrate", folder / "model", "--generate", 300, "--seed", 4, "--output", folder / "own")
        code, out, _ = run(*calibrate, "--data", folder / "text.txt")
        assert code == 0 and out.endswith(f"from {folder / 'text.txt'} and text that the model wrote\n")
        covariances, model = lora_null.Covariances.load(folder / "own"), load(folder)
        batches = token_batches(tokenizer, read_texts(folder / "text.txt"), max_tokens=65536, seed=4)
        batches += lora_null.own_text(model, tokenizer, 300, seed=4, progress=False)
        expected = lora_null.calibrate(model, batches, progress=False)
        assert covariances.tokens == expected.tokens
        assert all(torch.equal(covariances[key], matrix) for key, matrix in expected.items())
        assert run(*calibrate, "--overwrite")[0] == 0
        assert set(lora_null.Covariances.load(folder / "own").tokens.values()) == {384}
        code, _, err = run(*calibrate[:2])
        assert code == 2 and "expected --data FILE" in err

    @pytest.mark.parametrize("options", [(), ("--low-memory",)])
    def test_a_dry_run_says_what_it_would_take_and_writes_nothing(self, folder, run, tokenizer, options):
        before = sorted(folder.rglob("*"))
        calibrate = ("calibrate", folder / "model", "--data", folder / "text.txt", "--output", folder / "new" / "cov")
        code, out, err = run(*calibrate, "--checkpoint", folder / "new" / "run", "--dry-run", *options)
        assert code == 0, err
        assert sorted(folder.rglob("*")) == before
        model, batches = load(folder), token_batches(tokenizer, read_texts(folder / "text.txt"), max_tokens=65536)
        tokens = sum(batch["attention_mask"].numel() for batch in batches)
        plan = lora_null.memory_plan(
            model, batches[0], tokens=tokens, low_memory=bool(options), checkpoint=folder / "new" / "run"
        )
        assert str(plan) in out
        assert f"Tokens: {sum(int(batch['attention_mask'].sum()) for batch in batches):,}\n" in out
        assert f"extrapolated from one batch of {max(b['input_ids'].numel() for b in batches)} positions" in out
        assert run(*calibrate)[0] == 0
        [size] = re.findall(r"File: ([\d.]+) KiB", out)
        header = 2**13
        assert 0 < (folder / "new" / "cov").stat().st_size - 2**10 * float(size) < header

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

    def test_init_takes_the_options_of_peft(self, calibrated_folder, run):
        folder = calibrated_folder
        flags = ("--rank-pattern", "q_proj=2", "--rank-pattern", r"1\..*v_proj=3", "--alpha-pattern", "v_proj=1.5")
        flags += ("--exclude-modules", "k_proj,o_proj", "--layers-to-transform", "0,1", "--layers-pattern", "layers")
        init = ("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4, "--use-rslora")
        code, _, err = run(*init, *flags)
        assert code == 0, err
        config = json.loads((folder / "adapter" / "lora_null.json").read_text())["config"]
        assert config["rank_pattern"] == {"q_proj": 2, r"1\..*v_proj": 3} and config["alpha_pattern"] == {"v_proj": 1.5}
        assert config["exclude_modules"] == ["k_proj", "o_proj"] and config["layers_to_transform"] == [0, 1]
        assert config["layers_pattern"] == ["layers"] and config["use_rslora"] is True
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        assert not any("k_proj" in name or "o_proj" in name for name in tensors)

    def test_export_and_merge_agree_with_the_trained_model(self, calibrated_folder, run):
        folder = calibrated_folder
        run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
        covariances = lora_null.Covariances.load(folder / "cov")
        model = lora_null.load_adapter(load(folder), folder / "adapter", is_trainable=True, covariances=covariances)
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
        own = {
            "format": 1,
            "version": "0",
            "config": stated,
            "base_fingerprint": None,
            "energies": {"a": 0.5},
            "free": {},
        }
        written["lora_null"] = own
        (folder / "checkpoint" / "config.json").write_text(json.dumps(written))
        caplog.clear()
        code, _, err = run("export", folder / "checkpoint", folder / "plain", *given)
        assert code == 0, err
        assert "lora_alpha" not in caplog.text
        kept = json.loads((folder / "plain" / "lora_null.json").read_text())
        assert len(kept.pop("files")) == 2 and kept.pop("checksum")
        assert kept == {**own, "format": 2, "config": config.to_dict(), "stacked": not freeze_a}
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
        table, words = out.split("Tokens:")
        assert table.count("model.layers.") == 8 and "Learning rate:" in words
        code, out, _ = run("inspect", calibrated_folder / "cov", "--r", 4, "--json")
        values = json.loads(out)
        assert len(values["layers"]) == 8 and all(0 < row["null_energy"] < 4 / row["d"] for row in values["layers"])

    def test_inspect_covariances_against_another_half(self, calibrated_folder, run):
        folder = calibrated_folder
        lines = (folder / "text.txt").read_text().splitlines()
        (folder / "half.txt").write_text("\n".join(lines[: len(lines) // 2]))
        assert run("calibrate", folder / "model", "--data", folder / "half.txt", "--output", folder / "half")[0] == 0
        compare = ("inspect", folder / "cov", "--r", 4, "--against", folder / "half")
        code, out, _ = run(*compare)
        assert code == 0 and "other text" in out and "/ optimum" in out
        assert [line.split(":")[0] for line in out.splitlines()[-5:]] == [
            "Tokens",
            "Other text",
            "Rank",
            "Null space",
            "Learning rate",
        ]
        values = json.loads(run(*compare, "--json")[1])
        assert len(values["advice"]["sentences"]) == 5
        assert all(row["against_energy"] > 0 and row["generalisation"] >= 1 for row in values["layers"])

    def test_inspect_adapter(self, calibrated_folder, run):
        folder = calibrated_folder
        run("init", folder / "model", folder / "cov", folder / "adapter", "--r", 4)
        code, out, _ = run("inspect", folder / "adapter", "--covariances", folder / "cov", "--json")
        values = json.loads(out)
        assert code == 0 and values["r"] == 4 and len(values["updates"]) == 14
        assert all(row["norm"] == 0 and row["row_energy"] == pytest.approx(1, abs=1e-2) for row in values["updates"])
        code, out, _ = run("inspect", folder / "adapter")
        assert code == 0 and "|dW|" in out and "train=b_in_basis" in out

    def test_bench_waits_for_the_device_that_it_times(self, monkeypatch):
        from lora_null.cli import bench

        waited = []
        monkeypatch.setattr(torch.cuda, "synchronize", waited.append)
        bench._time(lambda: None, 3, "cuda:1")
        assert waited == ["cuda:1"] * 6

    def test_bench(self, run):
        code, out, _ = run("bench", "--d", 48, "--m", 40, "--r", 4, "--tokens", 32, "--repeats", 2, "--json")
        timings = json.loads(out)["timings"]
        assert code == 0 and {"lora_linear, A frozen", "null_space"} <= {row["operation"] for row in timings}
        assert all(0 < row["ms_20"] <= row["ms"] <= row["ms_80"] for row in timings)


class TestDoctor:
    def test_it_says_what_is_here_and_what_will_be_used(self, run, monkeypatch, tmp_path):
        monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path / "cache"))
        code, out, err = run("doctor", "--json")
        assert code == 0, err
        found = json.loads(out)
        assert found["torch"] == torch.__version__ and found["LORA_NULL_CACHE"] == str(tmp_path / "cache")
        assert found["cache"] == f"{tmp_path / 'cache'} (not made yet)" and not (tmp_path / "cache").exists()
        x, weight, A, B = (torch.empty(shape) for shape in ((2048, 2048), (2048, 2048), (32, 2048), (2048, 32)))
        if not torch.cuda.is_available():
            assert found["linear, float32"] == lora_null.ops.explain(x, weight, A, B)
        assert run("doctor")[1].startswith("lora_null")

    def test_an_extension_that_is_switched_off(self, run, monkeypatch):
        monkeypatch.setenv("LORA_NULL_NO_EXTENSION", "1")
        assert json.loads(run("doctor", "--json")[1])["extension"] == "switched off by LORA_NULL_NO_EXTENSION"

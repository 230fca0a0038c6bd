"""Adapter folders: nothing is lost when one is written, and bad files are refused when one is read."""

import json

import pytest
import torch
from adapter_tools import R, trained
from safetensors.torch import save_file

import lora_null
from lora_null.adapters import export_adapter
from lora_null.adapters.layer import adapter_layers


class TestNothingIsLost:
    def test_an_existing_folder_is_refused(self, llama, token_batches, tmp_path):
        model = trained(llama, token_batches)
        lora_null.save_adapter(model, tmp_path / "adapter")
        before = (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes()
        with pytest.raises(FileExistsError, match="overwrite=True"):
            lora_null.save_adapter(model, tmp_path / "adapter")
        assert (tmp_path / "adapter" / "adapter_model.safetensors").read_bytes() == before

    def test_overwriting_replaces_an_adapter_but_never_other_files(self, llama, token_batches, tmp_path):
        model = trained(llama, token_batches)
        lora_null.save_adapter(model, tmp_path / "adapter")
        lora_null.save_adapter(trained(llama, token_batches, seed=1), tmp_path / "adapter", overwrite=True)
        (tmp_path / "adapter" / "thesis.tex").write_text("years of work")
        with pytest.raises(FileExistsError, match=r"thesis\.tex"):
            lora_null.save_adapter(model, tmp_path / "adapter", overwrite=True)
        assert (tmp_path / "adapter" / "thesis.tex").read_text() == "years of work"
        (tmp_path / "file").write_text("mine")
        with pytest.raises(FileExistsError, match="not an adapter folder"):
            lora_null.save_adapter(model, tmp_path / "file", overwrite=True)

    def test_an_empty_folder_is_filled(self, llama, token_batches, tmp_path):
        (tmp_path / "adapter").mkdir()
        lora_null.save_adapter(trained(llama, token_batches), tmp_path / "adapter")
        assert adapter_layers(lora_null.load_adapter(llama(), tmp_path / "adapter"))

    def test_a_model_card_is_kept(self, llama, token_batches, tmp_path):
        model = trained(llama, token_batches)
        lora_null.save_adapter(model, tmp_path / "adapter")
        (tmp_path / "adapter" / "README.md").write_text("written by hand")
        lora_null.save_adapter(model, tmp_path / "adapter", overwrite=True)
        assert (tmp_path / "adapter" / "README.md").read_text() == "written by hand"

    def test_a_link_is_followed(self, llama, token_batches, tmp_path):
        model = trained(llama, token_batches)
        (tmp_path / "large").mkdir()
        (tmp_path / "adapter").symlink_to(tmp_path / "large" / "adapter")
        for overwrite in (False, True):
            lora_null.save_adapter(model, tmp_path / "adapter", overwrite=overwrite)
            assert (tmp_path / "adapter").is_symlink()
            assert (tmp_path / "large" / "adapter" / "adapter_model.safetensors").exists()

    def test_values_too_large_for_the_type_are_not_saved(self, llama, token_batches, tmp_path):
        model = trained(llama, token_batches)
        next(iter(adapter_layers(model).values())).lora_B.weight.data[0, 0] = 1e5
        with pytest.raises(ValueError, match=r"q_proj holds NaN or Inf in torch\.float16.* save in another"):
            lora_null.save_adapter(model, tmp_path / "adapter", dtype=torch.float16)
        assert not list(tmp_path.iterdir())
        lora_null.save_adapter(model, tmp_path / "adapter", dtype=torch.bfloat16)

    @pytest.mark.parametrize("interrupt", [KeyboardInterrupt, OSError], ids=["interrupt", "disk_full"])
    def test_an_interrupted_save_leaves_the_old_adapter_whole(
        self, llama, token_batches, tmp_path, monkeypatch, interrupt
    ):
        import lora_null.adapters.files

        model = trained(llama, token_batches)
        lora_null.save_adapter(model, tmp_path / "adapter")
        before = {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()}

        def fail(*_):
            raise interrupt("stopped")

        monkeypatch.setattr(lora_null.adapters.files, "write_json", fail)
        with pytest.raises(interrupt):
            lora_null.save_adapter(trained(llama, token_batches, seed=1), tmp_path / "adapter", overwrite=True)
        assert {file.name: file.read_bytes() for file in (tmp_path / "adapter").iterdir()} == before
        assert [entry.name for entry in tmp_path.iterdir()] == ["adapter"]

    def test_a_diverged_adapter_is_not_saved(self, llama, token_batches, tmp_path):
        model = trained(llama, token_batches)
        next(iter(adapter_layers(model).values())).lora_B.weight.data[0, 0] = float("nan")
        with pytest.raises(ValueError, match=r"layers\.0\.self_attn\.q_proj holds NaN"):
            lora_null.save_adapter(model, tmp_path / "adapter")
        assert not list(tmp_path.iterdir())

    def test_a_model_without_adapters_has_nothing_to_save_or_merge(self, llama, tmp_path):
        for call in (lambda model: lora_null.save_adapter(model, tmp_path / "adapter"), lora_null.merge):
            with pytest.raises(ValueError, match="carries no lora_null adapter"):
                call(llama())


class TestForeignFiles:
    @pytest.fixture
    def saved(self, llama, token_batches, tmp_path):
        lora_null.save_adapter(trained(llama, token_batches), tmp_path / "adapter")
        return tmp_path / "adapter"

    def refused(self, model, path, match, error=ValueError):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(error, match=match):
            lora_null.load_adapter(model, path)
        assert not adapter_layers(model)
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())

    def test_another_architecture(self, llama, saved):
        self.refused(llama(hidden_size=32), saved, "belongs to another model")
        self.refused(llama(num_hidden_layers=1), saved, r"layers\.1\.\S+, which is no module")

    def test_other_weights_of_the_same_shape(self, llama, saved):
        other = llama(seed=7)
        self.refused(other, saved, "the shapes agree, the values do not")
        assert adapter_layers(lora_null.load_adapter(other, saved, verify_base=False))

    def test_the_same_weights_in_another_dtype_are_the_same_model(self, llama, saved):
        assert adapter_layers(lora_null.load_adapter(llama(torch.bfloat16), saved))

    def test_truncated_weights(self, llama, saved):
        file = saved / "adapter_model.safetensors"
        file.write_bytes(file.read_bytes()[:-100])
        self.refused(llama(), saved, "not a readable safetensors file")

    def test_a_pickle_is_never_opened(self, llama, saved, tmp_path):
        import pickle

        class Bomb:
            def __reduce__(self):
                return (open, (str(tmp_path / "exploded"), "w"))

        (saved / "adapter_model.safetensors").write_bytes(pickle.dumps(Bomb()))
        self.refused(llama(), saved, "not a readable safetensors file")
        assert not (tmp_path / "exploded").exists()

    def test_strange_tensors(self, llama, saved):
        save_file({"conv.weight": torch.zeros(2)}, str(saved / "adapter_model.safetensors"))
        self.refused(llama(), saved, r"conv\.weight")

    def test_damaged_or_missing_configuration(self, llama, saved):
        (saved / "adapter_config.json").write_text('{"r": ')
        self.refused(llama(), saved, "is damaged")
        (saved / "adapter_config.json").unlink()
        self.refused(llama(), saved, "not an adapter folder", FileNotFoundError)

    def test_a_file_instead_of_a_folder(self, llama, saved):
        self.refused(llama(), saved / "adapter_model.safetensors", "is not an adapter folder", FileNotFoundError)

    @pytest.mark.parametrize(
        "change",
        [
            {"peft_type": "IA3"},
            {"use_dora": True},
            {"bias": "some"},
            {"r": 0},
            {"alora_invocation_tokens": [1, 2]},
            {"init_lora_weights": "pissa_niter_4"},
        ],
        ids=lambda change: next(iter(change)),
    )
    def test_adapters_of_another_kind(self, llama, saved, change):
        config = json.loads((saved / "adapter_config.json").read_text())
        (saved / "adapter_config.json").write_text(json.dumps({**config, **change}))
        self.refused(llama(), saved, "expected (a LoRA adapter|plain LoRA|one for the pre-trained)")

    def test_files_that_do_not_belong_together(self, llama, saved):
        config = json.loads((saved / "adapter_config.json").read_text())
        (saved / "adapter_config.json").write_text(json.dumps({**config, "r": 2 * R}))
        self.refused(llama(), saved, f"says r={2 * R}, but the factors of .* have rank {R}")

    @pytest.mark.parametrize("config", [[1], {"r": "six"}], ids=str)
    def test_a_damaged_file_of_our_own(self, llama, saved, config):
        own = json.loads((saved / "lora_null.json").read_text())
        (saved / "lora_null.json").write_text(json.dumps({**own, "config": config}))
        self.refused(llama(), saved, r"lora_null\.json is damaged")

    def test_entries_of_other_types(self, llama, saved):
        own = json.loads((saved / "lora_null.json").read_text())
        for change in ({"energies": [1]}, {"stacked": "yes"}, {"base_fingerprint": 7}, {"format": 0}, {"format": True}):
            (saved / "lora_null.json").write_text(json.dumps({**own, **change}))
            self.refused(llama(), saved, rf"lora_null\.json is damaged .*{next(iter(change))}")
        (saved / "lora_null.json").write_text(json.dumps({"format": 1}))
        self.refused(llama(), saved, r"lora_null\.json is damaged .*entries \['format'\]")


class TestNewerFormats:
    """What a later version writes may mean something else, so that nobody reads it as of today."""

    MATCH = r"has format 3, of lora_null 9\.0;.* Install a newer lora_null"

    @pytest.fixture
    def newer(self, llama, token_batches, tmp_path):
        lora_null.save_adapter(trained(llama, token_batches), tmp_path / "adapter")
        self.change(tmp_path / "adapter" / "lora_null.json")
        return tmp_path / "adapter"

    def change(self, file, key=None):
        values = json.loads(file.read_text())
        (values[key] if key else values).update(format=3, version="9.0")
        file.write_text(json.dumps(values))

    @pytest.mark.parametrize("read", ["load_adapter", "load_trainable", "adapter_report", "export_adapter"])
    def test_every_reader_refuses_an_adapter(self, llama, newer, tmp_path, read):
        from lora_null.evaluation.report import adapter_report

        model = llama()
        names = list(model.state_dict())
        readers = {
            "load_adapter": lambda: lora_null.load_adapter(model, newer),
            "load_trainable": lambda: lora_null.peft.load_trainable(model, newer),
            "adapter_report": lambda: adapter_report(newer, progress=False),
            "export_adapter": lambda: export_adapter(newer, tmp_path / "exported"),
        }
        with pytest.raises(ValueError, match=self.MATCH):
            readers[read]()
        assert list(model.state_dict()) == names and not (tmp_path / "exported").exists()

    def test_a_checkpoint_is_not_exported(self, llama, token_batches, tmp_path):
        trained(llama, token_batches).save_pretrained(tmp_path / "checkpoint")
        self.change(tmp_path / "checkpoint" / "config.json", "lora_null")
        with pytest.raises(ValueError, match=rf"config\.json: the entry 'lora_null' {self.MATCH}"):
            export_adapter(tmp_path / "checkpoint", tmp_path / "exported")
        assert not (tmp_path / "exported").exists()


def test_folders_of_before_are_read(llama, token_batches, tmp_path):
    """Without a format, and with the empty file that was written beside the adapters of other programs."""
    lora_null.save_adapter(trained(llama, token_batches, train="b"), tmp_path / "adapter")
    file = tmp_path / "adapter" / "lora_null.json"
    own = json.loads(file.read_text())
    for kept, is_frozen in (({"config": own["config"]}, True), ({}, False)):
        file.write_text(json.dumps(kept))
        assert lora_null.load_adapter(llama(), tmp_path / "adapter").lora_null_state.config.freeze_a == is_frozen
        resumed = lora_null.peft.load_trainable(llama(), tmp_path / "adapter")
        assert is_frozen != any(p.requires_grad for name, p in resumed.named_parameters() if "lora_A" in name)
        assert export_adapter(tmp_path / "adapter", tmp_path / f"exported{is_frozen}") == R


def test_names_from_before_transformers_4_52_are_refused_by_name(tmp_path):
    from peft import LoraConfig, get_peft_model

    def model(outer, inner):
        block = torch.nn.ModuleDict({"q_proj": torch.nn.Linear(4, 4)})
        return torch.nn.ModuleDict({outer: torch.nn.ModuleDict({inner: block})})

    old = get_peft_model(model("language_model", "model"), LoraConfig(r=2, target_modules=["q_proj"]))
    old.save_pretrained(tmp_path / "old")
    with pytest.raises(ValueError, match=r"transformers calls model\.language_model\.q_proj since 4\.52; expected"):
        lora_null.load_adapter(model("model", "language_model"), tmp_path / "old")

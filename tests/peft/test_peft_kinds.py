"""What users of PEFT, transformers and Trainer do to an adapter is kept in its file, or refused beforehand."""

import copy
import json
import pickle
from pathlib import Path

import pytest
import torch
from adapter_tools import ids, learn
from peft import LoraConfig, PeftModel, get_peft_model, inject_adapter_in_model
from peft.utils.hotswap import prepare_model_for_compiled_hotswap
from tiny_models import make_llama

import lora_null
from lora_null import peft as lora_null_peft

R = 4
MODES = pytest.mark.parametrize("freeze_a", [True, False], ids=["frozen A", "trained A"])


def config(**options):
    return LoraConfig(**{"r": R, "lora_alpha": 2 * R, "target_modules": ["q_proj", "up_proj"]} | options)


@pytest.fixture
def start(calibrated):
    """Give a model's adapter its start."""

    def initialize(model, freeze_a=True, **options):
        return lora_null_peft.initialize_lora_null_weights(
            model, calibrated[1], freeze_a=freeze_a, progress=False, **options
        )

    return initialize


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=ids()).logits


def fits(loaded, want):
    base = logits(make_llama())
    return (logits(loaded) - want).norm() <= 1e-5 * (want - base).norm()


def unchanged(model, before):
    after = model.state_dict()
    return before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


def trainer(model, folder):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        str(folder), use_cpu=True, max_steps=4, save_steps=2, learning_rate=1e-2, report_to=[], disable_tqdm=True,
        per_device_train_batch_size=4, lr_scheduler_type="constant",
    )  # fmt: skip
    rows = torch.randint(97, (16, 16), generator=torch.Generator().manual_seed(5))
    return Trainer(model, arguments, train_dataset=[{"input_ids": row, "labels": row} for row in rows])


@MODES
def test_a_trainer_resumes_where_it_was(start, llama, tmp_path, freeze_a):
    """With scaling that differs between layers, dropout and biases, from a checkpoint and from our own folder."""
    options = {"use_rslora": True, "alpha_pattern": {"q_proj": 3}, "lora_dropout": 0.25, "lora_bias": True}
    whole, resumed = (trainer(start(get_peft_model(llama(), config(**options)), freeze_a), tmp_path) for _ in range(2))
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    base = logits(llama())
    assert (logits(resumed.model) - logits(whole.model)).norm() <= 1e-4 * (logits(whole.model) - base).norm()
    lora_null_peft.save_adapter(whole.model, tmp_path / "own")
    again = start(get_peft_model(llama(), config(**options)), freeze_a)
    again.load_adapter(str(tmp_path / "own"), "default", is_trainable=True)
    assert fits(again, logits(whole.model))


class TestModelsOfTransformers:
    """``add_adapter`` and ``save_pretrained``, where transformers writes the configuration before the weights."""

    @MODES
    def test_a_folder_fits_the_untouched_base(self, start, llama, tmp_path, freeze_a):
        model = llama()
        model.add_adapter(config())
        want = logits(learn(start(model, freeze_a)))
        # the second time, files of the first lie there
        for folder in (tmp_path / "one", tmp_path / "one", tmp_path / "own"):
            save = (
                model.save_pretrained if folder.name == "one" else lambda path: lora_null_peft.save_adapter(model, path)
            )
            save(str(folder))
            assert fits(PeftModel.from_pretrained(llama(), str(folder)), want)
            assert fits(lora_null.load_adapter(llama(), folder, is_trainable=True), want)
            state = json.loads((folder / "lora_null.json").read_text())
            assert state["stacked"] == (not freeze_a) and state["config"]["freeze_a"] == freeze_a
        assert torch.equal(logits(model), want) and model.peft_config["default"].r == R

    @MODES
    def test_checkpoints_of_a_trainer(self, start, llama, tmp_path, freeze_a):
        model = llama()
        model.add_adapter(config())
        trainer(start(model, freeze_a), tmp_path).train()
        assert fits(PeftModel.from_pretrained(llama(), str(tmp_path / "checkpoint-4")), logits(model))

    def test_injected_adapters(self, start, llama, tmp_path):
        model = inject_adapter_in_model(config(), llama())
        want = logits(learn(start(model, freeze_a=False)))
        lora_null_peft.save_adapter(model, tmp_path / "adapter")
        assert fits(PeftModel.from_pretrained(llama(), str(tmp_path / "adapter")), want)

    def test_mixed_models_are_refused(self, start, llama):
        model = get_peft_model(llama(), config(), mixed=True)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="mixed=True"):
            start(model)
        assert unchanged(model, before)


class TestTheBase:
    """What has moved the base weights is seen before it is taken for the pre-trained one."""

    @pytest.mark.parametrize("init", ["pissa", "pissa_niter_2", "olora"])
    def test_starts_of_pefts_own(self, start, llama, tmp_path, init):
        model = get_peft_model(llama(), config(init_lora_weights=init))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"began with init_lora_weights='{init}'"):
            start(model)
        assert unchanged(model, before)
        with pytest.raises(ValueError, match=f"began with init_lora_weights='{init}'"):
            lora_null_peft.save_adapter(model, tmp_path / "adapter")
        assert not (tmp_path / "adapter").exists()

    def test_another_adapter_may_have_done_it(self, start, llama):
        model = get_peft_model(llama(), config())
        model.add_adapter("other", config(init_lora_weights="pissa", target_modules=["k_proj"]))
        with pytest.raises(ValueError, match="The adapter 'other' began with"):
            start(model)

    def test_a_second_adapter_in_other_layers_of_a_shifted_base(self, start, llama):
        model = start(get_peft_model(llama(), config()), freeze_a=False)
        model.add_adapter("second", config(target_modules=["k_proj"]))
        with pytest.raises(ValueError, match="was initialised with freeze_a=False before"):
            start(model, adapter_name="second")

    def test_factors_padded_for_hot_swapping(self, start, llama):
        model = get_peft_model(llama(), config())
        prepare_model_for_compiled_hotswap(model, target_rank=8)
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="prepare_model_for_compiled_hotswap"):
            start(model, freeze_a=False)
        assert unchanged(model, before)

    def test_factors_without_values(self, start, llama):
        model = get_peft_model(llama(), config(), low_cpu_mem_usage=True)
        with pytest.raises(ValueError, match="which holds no values"):
            start(model)

    def test_a_shift_beyond_the_range_of_the_base(self, start, llama, token_batches):
        model = llama(torch.float16)
        weight = model.model.layers[1].mlp.up_proj.weight
        weight.data[0, 0] = 6e4
        covariances = lora_null.calibrate(llama(), token_batches(), progress=False)
        model = get_peft_model(model, config(r=40, lora_alpha=4000))
        before = {name: value.clone() for name, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=r"layers\.1\.mlp\.up_proj would hold NaN or Inf"):
            lora_null_peft.initialize_lora_null_weights(
                model, covariances, freeze_a=False, verify_base=False, progress=False
            )
        assert unchanged(model, before)


class TestSeveralAdapters:
    def test_each_is_remembered_by_its_name(self, start, llama, tmp_path):
        model = get_peft_model(llama(), config(use_rslora=True, lora_dropout=0.5))
        model.add_adapter("second", config(r=3, alpha_pattern={"q_proj": 5}))
        start(model)
        start(model, adapter_name="second")
        for name, folder in (("default", tmp_path), ("second", tmp_path / "second")):
            model.set_adapter(name)
            want = logits(learn(model))
            model.save_pretrained(str(tmp_path))
            lora_null_peft.save_adapter(model, tmp_path / f"own {name}", adapter_name=name)
            for path in (folder, tmp_path / f"own {name}"):
                resumed = lora_null_peft.load_trainable(llama(), path)
                assert fits(resumed, want)
                layers = lora_null_peft.lora_layers(resumed)
                for key, layer in lora_null_peft.lora_layers(model, name).items():
                    assert layers[key].scaling["default"] == pytest.approx(layer.scaling[name], rel=1e-12)
                    assert str(layers[key].lora_dropout["default"]) == str(layer.lora_dropout[name])
                    assert torch.equal(layers[key].lora_A["default"].weight[: layer.r[name]], layer.lora_A[name].weight)

    def test_one_that_replaces_another_of_its_name_is_not_taken_for_it(self, start, llama, tmp_path):
        model = start(get_peft_model(llama(), config()))
        model.save_pretrained(str(tmp_path))
        assert (tmp_path / "lora_null.json").exists()
        model.add_adapter("other", config())
        model.delete_adapter("default")
        model.add_adapter("default", config(r=2))
        model.save_pretrained(str(tmp_path))
        assert not (tmp_path / "lora_null.json").exists()

    def test_a_folder_is_loaded_beside_the_adapter_that_wrote_it(self, start, llama, tmp_path):
        model = learn(start(get_peft_model(llama(), config()), freeze_a=False))
        want = logits(model)
        model.save_pretrained(str(tmp_path))
        model.load_adapter(str(tmp_path), "again")
        model.set_adapter("again")
        assert fits(model, want)


class TestBesideTheFactors:
    def test_norms_that_were_trained(self, start, llama, tmp_path):
        model = start(get_peft_model(llama(), config()))
        norm = model.get_base_model().model.norm
        for save in (model.save_pretrained, lambda path: lora_null_peft.save_adapter(model, path)):
            norm.weight.requires_grad_(True)
            with pytest.raises(
                ValueError, match=r"1 tensors outside the adapters .*model\.norm\.weight.*modules_to_save"
            ):
                save(str(tmp_path / "adapter"))
            norm.weight.requires_grad_(False)
            norm.weight.data.mul_(1.5)
            with pytest.raises(ValueError, match=r"model\.norm\.weight"):
                save(str(tmp_path / "adapter"))
            norm.weight.data.div_(1.5)
            assert not (tmp_path / "adapter").exists()
        model.save_pretrained(str(tmp_path / "adapter"))

    def test_tied_embeddings(self, start, llama, tmp_path):
        """One tensor under two names, of which PEFT writes one."""

        def tied():
            return llama(tie_word_embeddings=True)

        for number, options in enumerate(
            ({"trainable_token_indices": [3, 5]}, {"modules_to_save": ["embed_tokens", "lm_head"]})
        ):
            model = learn(start(get_peft_model(tied(), config(**options)), freeze_a=False))
            model.save_pretrained(str(tmp_path / f"pefts {number}"))
            lora_null_peft.save_adapter(model, tmp_path / f"own {number}")
            for name in ("pefts", "own"):
                got = logits(PeftModel.from_pretrained(tied(), str(tmp_path / f"{name} {number}")))
                assert (got - logits(model)).norm() <= 1e-5 * got.norm()

    @MODES
    def test_a_resized_vocabulary(self, start, llama, tmp_path, freeze_a):
        """Carried where PEFT finds the base's own size, as its own save_pretrained does."""
        llama().save_pretrained(tmp_path / "base")
        model = type(llama()).from_pretrained(tmp_path / "base")
        model.resize_token_embeddings(101)
        model = learn(start(get_peft_model(model, config()), freeze_a))
        want = logits(model)
        again = type(llama()).from_pretrained(tmp_path / "base")
        lora_null_peft.save_adapter(model, tmp_path / "adapter")
        again.resize_token_embeddings(101)
        got = logits(PeftModel.from_pretrained(again, str(tmp_path / "adapter")))
        assert (got - want).norm() <= 1e-5 * want.norm()

    def test_experts_by_target_parameters(self, token_batches, tmp_path):
        from transformers import MixtralConfig, MixtralForCausalLM

        def mixtral():
            torch.manual_seed(0)
            sizes = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}
            sizes |= {"vocab_size": 97, "num_key_value_heads": 1, "num_local_experts": 2}
            return MixtralForCausalLM(MixtralConfig(**sizes)).eval()

        covariances = lora_null.calibrate(mixtral(), token_batches(), progress=False)
        options = {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.gate_up_proj"]}
        for freeze_a in (True, False):
            model = get_peft_model(mixtral(), config(**options))
            lora_null_peft.initialize_lora_null_weights(model, covariances, freeze_a=freeze_a, progress=False)
            want = logits(learn(model))
            lora_null_peft.save_adapter(model, tmp_path / "own", overwrite=True)
            model.save_pretrained(str(tmp_path / "pefts"))
            for name in ("own", "pefts"):
                got = logits(PeftModel.from_pretrained(mixtral(), str(tmp_path / name)))
                assert (got - want).norm() <= 1e-5 * want.norm(), (freeze_a, name)


def test_copies_and_pickles_save_the_same(start, llama, tmp_path):
    model = learn(start(get_peft_model(llama(), config()), freeze_a=False))
    want = logits(model)
    for name, other in (("copy", copy.deepcopy(model)), ("pickle", pickle.loads(pickle.dumps(model)))):
        learn(model)
        other.save_pretrained(str(tmp_path / name))
        assert fits(PeftModel.from_pretrained(llama(), str(tmp_path / name)), want)


def test_the_base_by_the_name_that_was_given(start, llama, tmp_path):
    llama().save_pretrained(tmp_path / "base")
    model = start(get_peft_model(type(llama()).from_pretrained(tmp_path / "base"), config()))
    lora_null_peft.save_adapter(model, tmp_path / "adapter")
    found = tmp_path / "adapter" / "adapter_config.json"
    assert json.loads(found.read_text())["base_model_name_or_path"] == "base"
    given = str(Path(tmp_path / "base"))
    lora_null_peft.save_adapter(model, tmp_path / "adapter", base_model_name_or_path=given, overwrite=True)
    assert json.loads(found.read_text())["base_model_name_or_path"] == given


def test_a_model_merged_by_peft_is_a_plain_one(start, llama, tmp_path):
    merged = start(get_peft_model(llama(), config()), freeze_a=False).merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    assert "lora_null" not in (tmp_path / "merged" / "config.json").read_text()


class TestWhatMemoryHolds:
    """What differs from the start in memory, and would be lost or wrong elsewhere."""

    @MODES
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_a_base_weight_that_was_moved_by_hand(self, start, llama, tmp_path, freeze_a, dtype):
        model = learn(start(get_peft_model(llama(dtype), config()), freeze_a))
        for _ in range(3):
            model.merge_adapter()
            model.save_pretrained(str(tmp_path / "merged"))
            model.unmerge_adapter()
        model.save_pretrained(str(tmp_path / "unmerged"))
        weight = next(iter(lora_null_peft.lora_layers(model).values())).get_base_layer().weight
        weight.data.mul_(1.25)
        for save in (model.save_pretrained, lambda path: lora_null_peft.save_adapter(model, path)):
            with pytest.raises(ValueError, match=r"1 tensors outside .*q_proj\.base_layer\.weight"):
                save(str(tmp_path / "moved"))
        weight.data.div_(1.25)
        model.to(torch.bfloat16).save_pretrained(str(tmp_path / "rounded"))
        assert not (tmp_path / "moved").exists()

    @pytest.mark.parametrize("train", ["b", "b_in_basis", "ab"])
    @pytest.mark.parametrize("name", ["default", "second"])
    def test_transformers_puts_a_file_into_the_layers(self, calibrated, llama, tmp_path, train, name):
        def made():
            model, options = llama(), {"energy": 0.9} if train == "b_in_basis" else {}
            model.add_adapter(config())
            return lora_null_peft.initialize_lora_null_weights(
                model, calibrated[1], train=train, progress=False, **options
            )

        model = learn(made())
        model.save_pretrained(str(tmp_path))
        again = made()
        before = {key: value.clone() for key, value in again.state_dict().items()}
        if train != "b" and name == "default":
            with pytest.raises(ValueError, match="to be put into the adapter 'default' as they are"):
                again.load_adapter(str(tmp_path), name)
            assert unchanged(again, before)
        else:
            again.load_adapter(str(tmp_path), name, hotswap=name == "default")
            again.set_adapter(name)
            assert fits(again, logits(model))

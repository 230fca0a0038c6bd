"""A base that one adapter has shifted is seen by nobody else, whatever PEFT is asked to do with the model."""

import copy
import pickle

import pytest
import torch
from adapter_tools import ids, learn
from peft import (
    LoraConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.helpers import rescale_adapter_scale
from peft.utils.hotswap import hotswap_adapter
from safetensors.torch import load_file

from lora_null import peft as lora_null_peft

R = 4
MODES = pytest.mark.parametrize("train", ["b", "b_in_basis", "ab"])


def config(**options):
    return LoraConfig(**{"r": R, "lora_alpha": 2 * R, "target_modules": ["q_proj", "up_proj"]} | options)


@pytest.fixture
def start(llama, calibrated):
    """Make the same initialised model again and again, of PEFT or, without ``wrapped``, of transformers."""

    def make(train="ab", dtype=torch.float32, wrapped=True, fused=False, **options):
        model = llama(dtype)
        if wrapped:
            model = get_peft_model(model, config(**options))
        else:
            model.add_adapter(config(**options))
        energy = {"energy": 0.9} if train == "b_in_basis" else {}
        lora_null_peft.initialize_lora_null_weights(model, calibrated[1], train=train, progress=False, **energy)
        if fused:
            lora_null_peft.use_fused_kernels(model)
        return model

    return make


@torch.no_grad()
def logits(model, **options):
    return model.eval()(input_ids=ids(), **options).logits.float()


@pytest.fixture
def same(llama):
    """Tell whether two models give the same, on the scale of what an adapter does or, without one, of the logits."""
    base = logits(llama())

    def compare(got, want=None, bound=1e-5):
        want = base if want is None else want
        scale = (want - base).norm() if not torch.equal(want, base) else base.norm()
        return (got - want).norm() <= bound * scale

    return compare


def foreign(llama, folder, **options):
    """Write an adapter that was trained elsewhere, on the untouched base; return its logits."""
    model = learn(get_peft_model(llama(), config(**options)), seed=7)
    model.save_pretrained(str(folder))
    return logits(model)


class TestWithoutTheAdapter:
    @pytest.mark.parametrize("fused", [False, True], ids=["plain", "fused"])
    def test_disabled(self, start, same, fused):
        model = learn(start(fused=fused))
        want = logits(model)
        with model.disable_adapter():
            assert same(logits(model), bound=1e-6)
        assert torch.equal(logits(model), want)
        model.merge_adapter()
        with model.disable_adapter():
            assert same(logits(model), bound=1e-6)

    def test_disabled_in_a_model_of_transformers(self, start, same):
        model = learn(start(wrapped=False))
        model.disable_adapters()
        assert same(logits(model), bound=1e-6)
        model.enable_adapters()
        assert not same(logits(model), bound=1e-3)

    def test_rows_of_a_batch_that_are_the_bases(self, start, llama, same, tmp_path):
        other = foreign(llama, tmp_path)
        model = learn(start())
        want = logits(model)
        model.load_adapter(str(tmp_path), "foreign")
        for names, rows in (
            (["__base__", "default"], (logits(llama())[:1], want[1:])),
            (["default", "foreign"], (want[:1], other[1:])),
        ):
            assert same(logits(model, adapter_names=names), torch.cat(rows))

    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
    def test_unloaded(self, start, llama, same, dtype):
        model = learn(start(dtype=dtype))
        base = model.unload()
        own = llama(dtype).state_dict()
        assert base.state_dict().keys() == own.keys()
        for name, value in base.state_dict().items():
            # of bf16 the two roundings of shift and return
            bound = 1e-6 if dtype == torch.float32 else 2**-7
            assert (value - own[name]).float().norm() <= bound * own[name].float().norm()
        assert same(logits(base), logits(llama(dtype)), 1e-6) or dtype != torch.float32

    def test_unloaded_while_merged_and_merged_for_good(self, start, same):
        want = logits(learn(start()))
        model = learn(start())
        model.merge_adapter()
        assert same(logits(model.unload()), want)
        assert same(logits(learn(start()).merge_and_unload(safe_merge=True)), want)

    def test_the_state_dict_of_the_base(self, start, llama, same, tmp_path):
        model = learn(start())
        want, own = logits(model), get_base_model_state_dict(model)
        plain = llama()
        plain.load_state_dict(own)
        assert same(logits(plain), bound=1e-6) and torch.equal(logits(model), want)
        # a base that PEFT puts back is shifted again
        set_base_model_state_dict(model, llama().state_dict())
        assert same(logits(model), want)
        whole = {key: value.clone() for key, value in model.state_dict().items()}
        bare = {key: value for key, value in whole.items() if "lora_" not in key}
        model.load_state_dict(bare, strict=False)
        key = next(key for key in reversed(bare) if ".base_layer." in key)
        bare[key] = bare[key] * 1.5
        bare["base_model.model.model.norm.weight"] = 2 * bare["base_model.model.model.norm.weight"]
        with pytest.raises(ValueError, match="to be replaced by another than the shifted one"):
            model.load_state_dict(bare, strict=False)
        assert all(torch.equal(value, whole[key]) for key, value in model.state_dict().items())


@pytest.mark.parametrize("wrapped", [True, False], ids=["peft", "transformers"])
def test_the_scaling_is_that_of_the_change(start, llama, same, tmp_path, wrapped):
    model = learn(start(wrapped=wrapped))
    want = logits(model)
    with rescale_adapter_scale(model, 0.0):
        assert same(logits(model), bound=1e-6)
    model.save_pretrained(str(tmp_path / "whole"))
    plain = PeftModel.from_pretrained(llama(), str(tmp_path / "whole"))
    with rescale_adapter_scale(model, 0.5), rescale_adapter_scale(plain, 0.5):
        half = logits(plain)
        assert same(logits(model), half)
        model.save_pretrained(str(tmp_path / "half"))
        assert same(logits(PeftModel.from_pretrained(llama(), str(tmp_path / "half"))), half)
        assert same(logits(lora_null_peft.load_trainable(llama(), tmp_path / "half")), half)
        if wrapped:
            assert same(logits(copy.deepcopy(model).merge_and_unload()), half)
        # a state dict has the factors and not what they are scaled by for a while
        torch.save(model.state_dict(), tmp_path / "state")
        learn(model, seed=5)
        model.load_state_dict(torch.load(tmp_path / "state"))
        assert same(logits(model), half)
    assert torch.equal(logits(model), want)
    learn(model, seed=5)
    model.load_state_dict(torch.load(tmp_path / "state"))
    assert torch.equal(logits(model), want)
    kept = {key: value.clone() for key, value in get_peft_model_state_dict(model).items()}
    learn(model, seed=5)
    with rescale_adapter_scale(model, 0.5):
        set_peft_model_state_dict(model, kept)
        assert same(logits(model), half)


class TestOtherAdapters:
    @pytest.mark.parametrize(
        "options",
        [{}, {"r": 2}, {"alpha_pattern": {"q_proj": 3}}, {"target_modules": ["k_proj", "up_proj"], "lora_alpha": 8}],
        ids=str,
    )
    @pytest.mark.parametrize("wrapped", [True, False], ids=["peft", "transformers"])
    def test_a_new_one_changes_nothing_and_is_saved_for_itself(self, start, llama, same, tmp_path, options, wrapped):
        model = start(wrapped=wrapped)
        if wrapped:
            model.add_adapter("second", config(**options))
        else:
            model.add_adapter(config(**options), "second")
        model.set_adapter("second")
        assert same(logits(model), bound=1e-6)
        want = logits(learn(model))
        model.save_pretrained(str(tmp_path))
        loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "second" if wrapped else tmp_path))
        assert same(logits(loaded), want)
        if wrapped:
            kept = {k: v.clone() for k, v in get_peft_model_state_dict(model, adapter_name="second").items()}
            learn(model, seed=5)
            set_peft_model_state_dict(model, kept, adapter_name="second")
            assert same(logits(model), want)
        lora_null_peft.save_adapter(model, tmp_path / "own", adapter_name="second")
        assert same(logits(PeftModel.from_pretrained(llama(), str(tmp_path / "own"))), want)

    @pytest.mark.parametrize("options", [{}, {"r": 2}, {"lora_alpha": 5}], ids=str)
    @pytest.mark.parametrize("wrapped", [True, False], ids=["peft", "transformers"])
    def test_a_foreign_one_is_as_in_its_file(self, start, llama, same, tmp_path, options, wrapped):
        want = foreign(llama, tmp_path / "foreign", **options)
        model = learn(start(wrapped=wrapped))
        own = logits(model)
        model.load_adapter(str(tmp_path / "foreign"), "foreign")
        model.set_adapter("foreign")
        assert same(logits(model), want)
        lora_null_peft.save_adapter(model, tmp_path / "again", adapter_name="foreign")
        assert same(logits(PeftModel.from_pretrained(llama(), str(tmp_path / "again"))), want)
        model.set_adapter("default")
        assert same(logits(model), own)
        model.delete_adapter("default") if wrapped else model.delete_adapter(["default"])
        model.set_adapter("foreign")
        assert same(logits(model), want)
        if wrapped:
            assert same(logits(copy.deepcopy(model).merge_and_unload()), want)
            assert same(logits(pickle.loads(pickle.dumps(model)).unload()), bound=1e-6)
            model.add_adapter("default", config())
            model.set_adapter("default")
            assert same(logits(model), bound=1e-6)

    def test_several_at_once_add_up(self, start, llama, same, tmp_path):
        foreign(llama, tmp_path / "foreign")
        model = learn(start())
        model.add_adapter("alike", config())
        model.set_adapter("alike")
        learn(model, seed=2)
        model.load_adapter(str(tmp_path / "foreign"), "foreign")
        names = ["default", "alike", "foreign"]
        model.base_model.set_adapter(names)
        want = logits(model)
        model.save_pretrained(str(tmp_path / "all"))
        loaded = PeftModel.from_pretrained(llama(), str(tmp_path / "all"))
        for name in names[1:]:
            loaded.load_adapter(str(tmp_path / "all" / name), name)
        loaded.base_model.set_adapter(names)
        assert same(logits(loaded), want)
        model.merge_adapter()
        assert same(logits(model), want)
        assert same(logits(model.merge_and_unload()), want)

    def test_combined_by_factors(self, start, llama, same, tmp_path):
        want = foreign(llama, tmp_path / "foreign")
        model = learn(start())
        model.load_adapter(str(tmp_path / "foreign"), "foreign")
        with pytest.raises(ValueError, match=r"those of \['default'\] count on a base"):
            model.add_weighted_adapter(["default", "foreign"], [0.5, 0.5], "mixed", combination_type="cat")
        assert "mixed" not in model.peft_config
        model.add_weighted_adapter(["foreign"], [1.0], "alone", combination_type="cat")
        model.set_adapter("alone")
        assert same(logits(model), want)


class TestFactorsAsTheyAre:
    @MODES
    def test_hot_swapping(self, start, llama, same, tmp_path, train):
        want = foreign(llama, tmp_path / "foreign")
        model = learn(start(train))
        before = {key: value.clone() for key, value in model.state_dict().items()}
        if train == "b":
            hotswap_adapter(model, str(tmp_path / "foreign"), "default")
            assert same(logits(model), want)
            return
        for each in (model, torch.compile(model)):
            with pytest.raises(ValueError, match="'default' as they are, but its base is shifted"):
                hotswap_adapter(each, str(tmp_path / "foreign"), "default")
        after = model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())
        model.load_adapter(str(tmp_path / "foreign"), "another")
        hotswap_adapter(model, str(tmp_path / "foreign"), "another")
        model.set_adapter("another")
        assert same(logits(model), want)

    def test_a_foreign_one_under_the_name_of_the_first(self, start, llama, tmp_path):
        foreign(llama, tmp_path)
        model = learn(start())
        want = logits(model)
        with pytest.raises(ValueError, match="started from other factors"):
            model.load_adapter(str(tmp_path), "default")
        assert torch.equal(logits(model), want)

    @pytest.mark.parametrize("name", ["default", "alike"])
    def test_a_foreign_one_by_its_state_dict(self, start, llama, tmp_path, name):
        foreign(llama, tmp_path)
        model = learn(start())
        model.add_adapter("alike", config())
        before = {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match=f"{name} started from other factors"):
            set_peft_model_state_dict(model, load_file(tmp_path / "adapter_model.safetensors"), adapter_name=name)
        after = model.state_dict()
        assert all(torch.equal(value, after[key]) for key, value in before.items())

    def test_a_foreign_one_past_the_models_own_method(self, start, llama, same, tmp_path):
        want = foreign(llama, tmp_path)
        model = learn(start())
        PeftModel.load_adapter(model, str(tmp_path), "foreign")
        model.set_adapter("foreign")
        assert same(logits(model), want)

    @pytest.mark.parametrize("options", [{"use_dora": True}, {"init_lora_weights": "pissa"}], ids=str)
    def test_one_that_reads_or_moves_the_base(self, start, llama, tmp_path, options):
        foreign(llama, tmp_path, **options)
        model = learn(start())
        want, keys = logits(model), model.state_dict().keys()
        for add in (
            lambda: model.add_adapter("other", config(**options)),
            lambda: model.load_adapter(str(tmp_path), "other"),
        ):
            with pytest.raises(ValueError, match="those in memory are shifted for another adapter"):
                add()
            assert torch.equal(logits(model), want) and model.state_dict().keys() == keys

    @pytest.mark.parametrize("loaded", [False, True], ids=["added", "loaded"])
    @pytest.mark.parametrize(
        "options",
        [{"use_dora": True}, {"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}],
        ids=str,
    )
    def test_one_that_reads_or_moves_the_base_of_a_model_of_transformers(self, start, llama, tmp_path, loaded, options):
        foreign(llama, tmp_path, **options)
        # up_proj, which is shifted, comes after q_proj, which the other one would have changed by then
        model = learn(start(wrapped=False, target_modules=["up_proj"]))
        want, state = logits(model), {key: value.clone() for key, value in model.state_dict().items()}
        with pytest.raises(ValueError, match="those in memory are shifted for another adapter"):
            if loaded:
                model.load_adapter(str(tmp_path), "other")
            else:
                model.add_adapter(config(**options), "other")
        after = model.state_dict()
        assert torch.equal(logits(model), want) and after.keys() == state.keys()
        assert all(torch.equal(value, after[key]) for key, value in state.items())
        for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert list(other.peft_config) == ["default"]
            other.add_adapter(config(), "other")

    def test_the_class_is_asked_to_save(self, start, llama, same, tmp_path):
        for train in ("b", "b_in_basis"):
            model = learn(start(train))
            PeftModel.save_pretrained(model, str(tmp_path / train))
            assert same(logits(PeftModel.from_pretrained(llama(), str(tmp_path / train))), logits(model))
        model = learn(start())
        for options in ({}, {"state_dict": model.state_dict()}):
            with pytest.raises(ValueError, match=r"Call model\.save_pretrained"):
                PeftModel.save_pretrained(model, str(tmp_path / "ab"), **options)
            assert not any((tmp_path / "ab").iterdir())

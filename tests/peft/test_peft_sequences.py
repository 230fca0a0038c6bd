"""Random sequences of what PEFT does to a model: after each, every adapter gives what it gave, and none the base."""

import copy
import pickle
import random

import pytest
import torch
from adapter_tools import learn
from peft import (
    LoraConfig,
    PeftModel,
    get_base_model_state_dict,
    get_peft_model,
    get_peft_model_state_dict,
    set_base_model_state_dict,
    set_peft_model_state_dict,
)
from peft.utils.hotswap import hotswap_adapter
from tiny_models import make_llama

import lora_null
from lora_null import peft as lora_null_peft

SIZES = {
    "vocab_size": 40, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip
IDS = torch.arange(18).view(2, 9) % 40
OPTIONS = ({"use_rslora": True}, {"rank_pattern": {"q_proj": 2}}, {"alpha_pattern": {"up_proj": 3}}, {"r": 2})


def base():
    return make_llama(torch.float32, **SIZES)


@torch.no_grad()
def logits(model):
    return model.eval()(input_ids=IDS).logits


@pytest.fixture(scope="module")
def covariances():
    draw = torch.Generator().manual_seed(1)
    return lora_null.calibrate(base(), [torch.randint(40, (4, 16), generator=draw) for _ in range(4)], progress=False)


class Sequence:
    """A model, what each of its adapters should give, and the steps: each a method, some of which refuse."""

    def __init__(self, seed, covariances, folder):
        self.draw, self.folder, self.plain, self.count = random.Random(seed), folder, logits(base()), 0
        self.train = self.draw.choice(("b", "b_in_basis", "ab"))
        self.model = get_peft_model(base(), self.config())
        energy = {"energy": 0.9} if self.train == "b_in_basis" else {}
        lora_null_peft.initialize_lora_null_weights(self.model, covariances, train=self.train, progress=False, **energy)
        if self.draw.random() < 0.4:
            lora_null_peft.use_fused_kernels(self.model)
        self.want = {"default": logits(learn(self.model))}

    def config(self):
        options = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "up_proj"]}
        for more in OPTIONS:
            options |= more if self.draw.random() < 0.25 else {}
        return LoraConfig(**options)

    def place(self):
        self.count += 1
        return self.folder / f"place{self.count}"

    def any(self):
        name = self.draw.choice(list(self.want))
        self.model.set_adapter(name)
        return name

    def near(self, got, want, bound=3e-5):
        scale = max((want - self.plain).norm(), 0.1 * self.plain.norm())
        assert (got - want).norm() <= bound * scale, self.train

    def check(self):
        for name, want in self.want.items():
            self.model.set_adapter(name)
            self.near(logits(self.model), want)
            with self.model.disable_adapter():
                assert (logits(self.model) - self.plain).norm() <= 2e-6 * self.plain.norm(), self.train

    def reads(self, folder, want, adapter="default"):
        folder = folder if adapter == "default" else folder / adapter
        self.near(logits(PeftModel.from_pretrained(base(), str(folder))), want)

    def foreign(self):
        model, folder = learn(get_peft_model(base(), self.config()), seed=self.count + 9), self.place()
        model.save_pretrained(str(folder))
        return folder, logits(model)

    def add(self):
        name, alike = self.place().name, self.draw.random() < 0.5
        self.model.add_adapter(name, self.model.peft_config[self.any()] if alike else self.config())
        if not alike:
            self.model.set_adapter(name)
            self.near(logits(self.model), self.plain)
        self.model.set_adapter(name)
        self.want[name] = logits(learn(self.model, seed=self.count))

    def load(self):
        folder, want = self.foreign()
        self.model.load_adapter(str(folder), folder.name)
        self.want[folder.name] = want

    def delete(self):
        if len(self.want) > 1:
            name = self.any()
            self.model.delete_adapter(name)
            del self.want[name]

    def train_on(self):
        name = self.any()
        self.want[name] = logits(learn(self.model, seed=self.count + 3))

    def merge(self):
        name, folder = self.any(), self.place()
        self.model.merge_adapter()
        self.near(logits(self.model), self.want[name], 1e-4)
        self.model.save_pretrained(str(folder))
        self.model.unmerge_adapter()
        self.reads(folder, self.want[name], name)

    def copy(self):
        self.model = copy.deepcopy(self.model)

    def pickle(self):
        self.model = pickle.loads(pickle.dumps(self.model))

    def save_whole(self):
        path = self.place()
        torch.save(self.model, path)
        self.model = torch.load(path, weights_only=False)

    def put_back(self):
        path, name = self.place(), self.any()
        torch.save(self.model.state_dict(), path)
        learn(self.model, seed=99)
        self.model.load_state_dict(torch.load(path, weights_only=True))
        kept = get_peft_model_state_dict(self.model, adapter_name=name)
        kept = {key: value.clone() for key, value in kept.items()}
        learn(self.model, seed=98)
        set_peft_model_state_dict(self.model, kept, adapter_name=name)

    def accelerate(self):
        from accelerate import Accelerator

        accelerator, folder = Accelerator(cpu=True), self.place()
        accelerator.prepare(self.model)
        accelerator.save_state(str(folder))
        self.any()
        learn(self.model, seed=97)
        accelerator.load_state(str(folder))
        accelerator.free_memory()

    def save(self):
        folder = self.place()
        self.model.save_pretrained(str(folder))
        for name, want in self.want.items():
            self.reads(folder, want, name)
            lora_null_peft.save_adapter(self.model, folder / "own" / name, adapter_name=name)
            self.reads(folder / "own" / name, want)

    def resume(self):
        folder, name = self.place(), self.any()
        self.model.save_pretrained(str(folder))
        learn(self.model, seed=96)
        self.model.load_adapter(str(folder if name == "default" else folder / name), name, is_trainable=True)

    def take_base(self):
        model = base()
        model.load_state_dict(get_base_model_state_dict(self.model))
        assert (logits(model) - self.plain).norm() <= 2e-6 * self.plain.norm()
        set_base_model_state_dict(self.model, base().state_dict())

    def swap(self):
        model = get_peft_model(base(), LoraConfig(r=4, target_modules=["q_proj", "up_proj"]))
        folder, name = self.place(), self.any()
        learn(model, seed=self.count).save_pretrained(str(folder))
        try:
            hotswap_adapter(self.model, str(folder), name)
        except ValueError as refusal:
            assert "as they are" in str(refusal) or "Configs are incompatible" in str(refusal)
        else:
            self.near(logits(self.model), logits(model))
            self.want[name] = logits(model)

    def combine(self):
        names, folder = self.draw.sample(list(self.want), min(2, len(self.want))), self.place()
        try:
            self.model.add_weighted_adapter(names, [0.5, 0.25][: len(names)], "sum", combination_type="cat")
        except ValueError as refusal:
            assert self.train == "ab" and "count on a base" in str(refusal)
            return
        self.model.set_adapter("sum")
        want = logits(self.model)
        self.model.save_pretrained(str(folder))
        self.reads(folder, want, "sum")
        self.any()
        self.model.delete_adapter("sum")

    def several(self):
        names, folder = list(self.want), self.place()
        self.model.base_model.set_adapter(names)
        want = logits(self.model)
        self.model.save_pretrained(str(folder))
        places = {name: str(folder if name == "default" else folder / name) for name in names}
        loaded = PeftModel.from_pretrained(base(), places[names[0]], adapter_name=names[0])
        for name in names[1:]:
            loaded.load_adapter(places[name], name)
        loaded.base_model.set_adapter(names)
        self.near(logits(loaded), want)

    def end(self):
        assert (logits(copy.deepcopy(self.model).unload()) - self.plain).norm() <= 2e-6 * self.plain.norm()
        name = self.any()
        self.near(logits(copy.deepcopy(self.model).merge_and_unload()), self.want[name], 1e-4)


STEPS = [name for name, value in vars(Sequence).items() if callable(value) and name not in
         ("__init__", "config", "place", "any", "near", "check", "reads", "foreign")]  # fmt: skip


@pytest.mark.parametrize("seed", range(60))
def test_every_adapter_stays_what_it_is(seed, covariances, tmp_path):
    run = Sequence(seed, covariances, tmp_path)
    steps = [run.draw.choice(STEPS) for _ in range(8)]
    for done, step in enumerate(steps):
        getattr(run, step)()
        try:
            run.check()
        except AssertionError as error:
            raise AssertionError(f"{run.train}: after {steps[: done + 1]}") from error

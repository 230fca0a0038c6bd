import json
from dataclasses import replace

import pytest

from lora_null import LoraNullConfig


def test_scaling_defaults_to_one_and_follows_alpha():
    assert LoraNullConfig(r=24).scaling == 1.0
    assert LoraNullConfig(r=24, lora_alpha=48).scaling == 2.0
    assert LoraNullConfig(r=16, lora_alpha=8, use_rslora=True).scaling == 2.0


def test_patterns_give_layers_their_rank_and_scaling():
    config = LoraNullConfig(r=24, rank_pattern={"q_proj": 4, r"layers\.1\..*": 6}, alpha_pattern={"v_proj": 12})
    ranks = [config.rank_of(name) for name in ("layers.1.q_proj", "layers.1.v_proj", "layers.2.v_proj", "q_proj2")]
    assert ranks == [4, 6, 24, 24]
    # Without a pattern lora_alpha is the layer's own rank: the scaling of 1 holds for all.
    assert [config.scaling_of(name) for name in ("layers.1.q_proj", "layers.1.v_proj", "v_proj")] == [1.0, 2.0, 0.5]
    hash(config)


def test_survives_its_own_dictionary_and_newer_keys():
    config = LoraNullConfig(
        r=4,
        lora_alpha=2.0,
        target_modules=["q_proj", "k_proj"],
        train="b_in_basis",
        energy=0.9,
        basis_dtype="bfloat16",
        lora_dropout=0.1,
        exclude_modules={"k_proj", "a"},
        layers_to_transform=1,
        layers_pattern="layers",
        rank_pattern={"q_proj": 3},
        alpha_pattern={"q_proj": 0.5},
        use_rslora=True,
        modules_to_save=["score"],
    )
    assert config.layers_to_transform == (1,) and config.exclude_modules == ("a", "k_proj")
    assert LoraNullConfig.from_dict({**json.loads(json.dumps(config.to_dict())), "of_a_later_version": 1}) == config


def test_freeze_a_is_a_short_word_for_two_ways_to_train():
    for given, (train, freeze_a, energy) in (
        ({}, ("b_in_basis", False, None)),
        ({"freeze_a": True}, ("b", True, None)),
        ({"freeze_a": False}, ("ab", False, None)),
        ({"train": "b", "energy": 0.5}, ("b", True, 0.5)),
        ({"energy": 0.5}, ("b_in_basis", False, 0.5)),
        ({"train": "ab", "freeze_a": False}, ("ab", False, None)),
    ):
        config = LoraNullConfig(**given)
        assert (config.train, config.freeze_a, config.energy) == (train, freeze_a, energy)
        assert replace(config, r=4) == LoraNullConfig(**given, r=4)
    assert LoraNullConfig().protected == 0.99 and LoraNullConfig(train="b").protected is None
    assert replace(LoraNullConfig(), train="ab", freeze_a=None).freeze_a is False


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"r": 0}, "r is 0"),
        ({"r": 1.5}, "r is 1.5"),
        ({"r": True}, "r is True"),
        ({"lora_alpha": 0}, "lora_alpha is 0"),
        ({"lora_alpha": float("nan")}, "lora_alpha is nan"),
        ({"lora_dropout": 1.0}, "lora_dropout is 1.0"),
        ({"target_modules": ()}, "target_modules is empty"),
        ({"layers_to_transform": [0], "target_modules": ".*proj"}, "layers_to_transform is .* beside the regular"),
        ({"layers_pattern": "layers"}, "layers_pattern is .* without layers_to_transform"),
        ({"rank_pattern": {"q_proj": 0}}, "rank_pattern is .*, but 'q_proj' has 0"),
        ({"rank_pattern": {"(": 1}}, r"rank_pattern is .*: '\(' is no regular expression"),
        ({"alpha_pattern": {"q_proj": float("inf")}}, "alpha_pattern is .*, but 'q_proj' has inf"),
        ({"train": "a"}, "train is 'a'; expected one of b, b_in_basis, ab"),
        ({"train": "ab", "freeze_a": True}, "freeze_a is True beside train='ab', which means False"),
        ({"train": "b_in_basis", "freeze_a": True}, "freeze_a is True beside train='b_in_basis'"),
        ({"train": "b", "freeze_a": False}, "freeze_a is False beside train='b'"),
        ({"energy": 1}, "energy is 1; expected a share"),
        ({"energy": float("nan")}, "energy is nan"),
        ({"basis_dtype": "float16"}, "basis_dtype is 'float16'; expected one of"),
    ],
)
def test_impossible_values_are_refused_by_name(arguments, named):
    with pytest.raises(ValueError, match=named):
        LoraNullConfig(**arguments)


@pytest.mark.parametrize(
    "arguments",
    [
        {"lora_alpha": "a"},
        {"lora_alpha": float("inf")},
        {"lora_dropout": None},
        {"freeze_a": "yes"},
        {"train": True},
        {"energy": "most"},
        {"energy": False},
        {"seed": "a"},
        {"target_modules": None},
        {"use_rslora": 1},
        {"exclude_modules": 3},
        {"layers_to_transform": "0"},
        {"layers_to_transform": [True]},
        {"layers_pattern": [0], "layers_to_transform": [0]},
        {"modules_to_save": "score"},
        {"modules_to_save": [""]},
        {"rank_pattern": [4]},
        {"rank_pattern": {0: 4}},
        {"alpha_pattern": {"q_proj": "4"}},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_values_of_the_wrong_type_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
        LoraNullConfig(**arguments)

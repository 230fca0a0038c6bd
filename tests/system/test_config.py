import pytest

from lora_null import LoraNullConfig


def test_scaling_defaults_to_one_and_follows_alpha():
    assert LoraNullConfig(r=24).scaling == 1.0
    assert LoraNullConfig(r=24, lora_alpha=48).scaling == 2.0


def test_survives_its_own_dictionary_and_newer_keys():
    config = LoraNullConfig(r=4, lora_alpha=2.0, target_modules=["q_proj", "k_proj"], freeze_a=False, lora_dropout=0.1)
    assert LoraNullConfig.from_dict({**config.to_dict(), "of_a_later_version": 1}) == config


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
        {"seed": "a"},
        {"target_modules": None},
    ],
    ids=lambda arguments: next(iter(arguments)),
)
def test_values_of_the_wrong_type_are_refused_by_name(arguments):
    with pytest.raises(ValueError, match=f"{next(iter(arguments))} is"):
        LoraNullConfig(**arguments)

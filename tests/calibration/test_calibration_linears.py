"""Subclasses of nn.Linear: those that compute something else than x W^T are observed, and left out with the reason."""

import logging
import re

import pytest
import torch
from calibration_tools import VOCABULARY, token_ids
from torch import nn

import lora_null
from lora_null import LoraNullConfig, calibrate, memory_plan

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")


class Router(nn.Linear):
    def forward(self, x):
        scores = super().forward(x)
        return scores.softmax(-1), scores.argmax(-1)


class Choice(nn.Linear):
    def forward(self, x):
        return super().forward(x).argmax(-1, keepdim=True)


class Probabilities(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Wide(nn.Linear):
    """Computes x W^T; nothing is wrong with it."""

    def forward(self, x):
        return x @ self.weight.T + self.bias


class Ternary(nn.Linear):
    """Rounds its weight on the way, as BitNet does: an adapter beside it is as good as beside any other."""

    def forward(self, x):
        scale = self.weight.abs().mean()
        return nn.functional.linear(x, (self.weight / scale).round().clamp(-1, 1) * scale, self.bias)


class Model(nn.Module):
    def __init__(self, kind):
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, 16)

        class Layer(nn.Module):
            def __init__(self):
                super().__init__()
                self.odd, self.up, self.down = kind(16, 8), nn.Linear(16, 24), nn.Linear(24, 16)

            def forward(self, hidden_states):
                self.odd(hidden_states)
                return hidden_states + self.down(self.up(hidden_states).relu())

        self.layers = nn.ModuleList(Layer() for _ in range(2))

    def forward(self, input_ids):
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x)
        return x


WAYS = {
    "streaming": lambda model, ids: calibrate(model, [ids]),
    "layerwise": lambda model, ids: calibrate(model, [ids], low_memory=True),
    "callback": lambda model, ids: calibrate(model, lambda: model(ids)),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        (Router, "it returns a tuple, where x W"),
        (Choice, r"it returns torch.int64 \(\d, \d+, 1\), where x W\^T is \(\d, \d+, 8\)"),
        (Probabilities, "its output is another than x W"),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_layers_that_are_linear_in_name_only_are_left_out(kind, reason, way, caplog):
    model, plain, ids = Model(kind), Model(nn.Linear), token_ids(6, 30)
    with caplog.at_level(logging.WARNING, logger="lora_null"):
        got = WAYS[way](model, ids)
    assert caplog.messages and "2 of 6 target layers are linear in name only" in caplog.messages[0]
    assert "layers.0.odd and its like" in caplog.messages[0] and len(caplog.messages) == 1
    assert re.search(reason, caplog.messages[0])
    assert got.groups == {f"layers.{i}.{name}": (f"layers.{i}.{name}",) for i in range(2) for name in ("up", "down")}
    wanted = WAYS[way](plain, ids)
    for key, matrix in got.items():
        assert torch.equal(matrix, wanted[key]), key
    assert "odd" not in str(memory_plan(model, ids)) and "4 covariances for 4 linear" in str(memory_plan(model, ids))
    before = model(ids)
    assert torch.equal(lora_null.initialize(model, got, LoraNullConfig(r=2), progress=False)(ids), before)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", [Wide, Ternary], ids=lambda kind: kind.__name__)
def test_subclasses_that_are_linear_share_and_count_as_any_other(kind, way, caplog):
    ids = token_ids(6, 30)
    with caplog.at_level(logging.WARNING, logger="lora_null"):
        got = WAYS[way](Model(kind), ids)
    assert not caplog.messages
    assert got.groups["layers.0.odd"] == ("layers.0.odd", "layers.0.up")
    wanted = WAYS[way](Model(nn.Linear), ids)
    assert got.tokens == wanted.tokens and all(torch.equal(got[key], matrix) for key, matrix in wanted.items())


def test_a_model_of_such_layers_alone_has_nothing_to_calibrate():
    with pytest.raises(ValueError, match=r"No token was counted.*called and linear"):
        calibrate(Model(Router), [token_ids(2, 20)], LoraNullConfig(target_modules=["odd"]))


def test_the_routers_of_phimoe():
    from transformers import PhimoeConfig, PhimoeForCausalLM

    config = PhimoeConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=VOCABULARY,
        num_local_experts=4,
    )
    model, ids = PhimoeForCausalLM(config).eval(), token_ids(4, 40)
    before = model(ids).logits
    covariances = calibrate(model, [ids])
    assert not any("router" in name for names in covariances.groups.values() for name in names)
    lora_null.initialize(model, covariances, LoraNullConfig(r=2), progress=False)
    torch.testing.assert_close(model(ids).logits, before)

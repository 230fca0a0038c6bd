"""Calibration against sums formed in float64 from the model's own activations."""

import logging

import pytest
import torch
from calibration_tools import (
    VOCABULARY,
    assert_as_good_as_torch,
    assert_equal,
    llama,
    padded_batches,
    token_ids,
    truth,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import lora_null
from lora_null import LoraNullConfig, calibrate

# Tiny products are faster on one thread, and the bits of a sum depend on the number of threads.
pytestmark = pytest.mark.usefixtures("one_thread")


def test_llama_has_four_inputs_per_layer():
    covariances = calibrate(llama(), [token_ids(2, 80)])
    assert covariances.groups == {
        f"model.layers.{i}.{names[0]}": tuple(f"model.layers.{i}.{name}" for name in names)
        for i in range(2)
        for names in (
            ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
            ("self_attn.o_proj",),
            ("mlp.gate_proj", "mlp.up_proj"),
            ("mlp.down_proj",),
        )
    }
    assert set(covariances.tokens.values()) == {160}
    assert covariances.metadata["model"] == "LlamaForCausalLM" and covariances.metadata["data"]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("queue_tokens", [1, 50, 4096])
def test_padding_does_not_count(dtype, queue_tokens):
    model, batches = llama(dtype=dtype), padded_batches()
    covariances = calibrate(model, batches, queue_tokens=queue_tokens)
    masks = [batch["attention_mask"].bool() for batch in batches]
    assert_as_good_as_torch(covariances, *truth(model, batches, masks))
    assert set(covariances.tokens.values()) == {sum(int(mask.sum()) for mask in masks)}


def test_labels_leave_out_prompts_and_none_counts_everything():
    model, batches = llama(), padded_batches()
    for batch in batches:
        batch["labels"] = batch["input_ids"].masked_fill(torch.arange(batch["input_ids"].shape[1]) < 5, -100)
    masks = [batch["attention_mask"].bool() & (batch["labels"] != -100) for batch in batches]
    assert_as_good_as_torch(calibrate(model, batches, mask="labels"), *truth(model, batches, masks))
    assert_as_good_as_torch(calibrate(model, batches, mask="none"), *truth(model, batches))
    with pytest.raises(ValueError, match="has no labels"):
        calibrate(model, [token_ids(2, 9)], mask="labels")


@settings(max_examples=8, deadline=None, derandomize=True)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 4), st.integers(1, 24)), min_size=1, max_size=4),
    queue_tokens=st.integers(1, 70),
    seed=st.integers(0, 99),
)
def test_any_batches_any_queue(shapes, queue_tokens, seed):
    model = llama(layers=1)
    generator = torch.Generator().manual_seed(seed)
    batches, masks = [], []
    for rows, columns in shapes:
        mask = torch.rand(rows, columns, generator=generator) < 0.8
        mask[:, 0] = True
        batches.append({"input_ids": token_ids(rows, columns, seed), "attention_mask": mask.long()})
        masks.append(mask)
    assert_as_good_as_torch(calibrate(model, batches, queue_tokens=queue_tokens), *truth(model, batches, masks))


def test_fp64_sums_are_nearer_to_the_truth():
    model, batches = llama(), [{"input_ids": token_ids(4, 60, seed)} for seed in range(6)]
    exact, _ = truth(model, batches)
    single = calibrate(model, batches, queue_tokens=16)
    double = calibrate(model, batches, queue_tokens=16, accumulate="fp64")
    for key in single:
        assert double[key].dtype == torch.float64
        assert (double[key] - exact[key]).norm() < 1e-2 * (single[key] - exact[key]).norm()


def test_float64_models_are_taken():
    model, batches = llama(dtype=torch.float64), [{"input_ids": token_ids(2, 40)}]
    exact, _ = truth(model, batches)
    for accumulate, tolerance in (("fp32", 1e-5), ("fp64", 1e-13)):
        got = calibrate(model, batches, accumulate=accumulate)
        for key, matrix in got.items():
            assert (matrix - exact[key]).norm() <= tolerance * exact[key].norm()


def test_offloaded_sums_are_the_same_to_rounding():
    model, batches = llama(), padded_batches()
    exact, plain = truth(model, batches, [batch["attention_mask"].bool() for batch in batches])
    for options in ({"offload": "cpu"}, {"device": "cpu"}, {"device": "cpu", "offload": "cpu"}):
        assert_as_good_as_torch(calibrate(model, batches, **options), exact, plain)


def test_weights_offloaded_by_accelerate():
    from accelerate import cpu_offload

    wanted = calibrate(llama(), padded_batches())
    model = cpu_offload(llama(), execution_device="cpu")
    assert all(parameter.is_meta for parameter in model.parameters())
    got = calibrate(model, padded_batches())
    assert_equal(got, wanted)
    low_memory = calibrate(model, padded_batches(), low_memory=True)
    for key, matrix in wanted.items():
        assert torch.equal(low_memory[key], matrix)
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_sums_lie_where_they_are_wanted():
    batches = padded_batches()
    wanted = calibrate(llama(), batches)
    for home, options, place in [
        ("cuda", {}, "cuda"),
        ("cuda", {"offload": "cpu"}, "cpu"),
        ("cuda", {"accumulate": "fp64", "offload": "cpu"}, "cpu"),
        ("cuda", {"device": "cpu"}, "cpu"),
        ("cpu", {"device": "cuda"}, "cuda"),
    ]:
        got = calibrate(llama().to(home), batches, queue_tokens=64, **options)
        for key, matrix in wanted.items():
            assert got[key].device.type == place
            assert (got[key].cpu() - matrix).norm() < 1e-4 * matrix.norm()


def test_the_output_head_runs_on_one_token_only_unless_it_is_calibrated():
    model, seen = llama(), []
    handle = model.lm_head.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[1]))
    calibrate(model, [{"input_ids": token_ids(2, 40), "labels": token_ids(2, 40)}])
    assert set(seen) == {1}
    seen.clear()
    got = calibrate(model, [token_ids(2, 40)], LoraNullConfig(target_modules=["lm_head"]))
    assert 40 in seen and got.tokens == {"lm_head": 80}
    handle.remove()


@pytest.mark.parametrize("layout", ["flat", "one head", "plain"])
def test_rows_are_found_in_other_layouts(layout):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.linear = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask=None):
            x = self.embedding(input_ids)
            return self.linear({"flat": x.flatten(0, 1), "one head": x[:, None], "plain": x}[layout])

    model, [batch, *_] = Model(), padded_batches()
    rows = model.embedding(batch["input_ids"])[batch["attention_mask"].bool()].detach()
    got = calibrate(model, [batch])
    assert got.tokens == {"linear": len(rows)}
    torch.testing.assert_close(got["linear"], rows.T @ rows)


def test_autocast_in_the_callers_loop_does_not_touch_the_sums():
    model, ids = llama(), token_ids(2, 50)

    def run_model():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            model(ids)

    inputs = []
    handle = model.model.layers[0].self_attn.q_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    got = calibrate(model, run_model)
    handle.remove()
    rows = inputs[0].double().flatten(0, 1)
    wanted = rows.T @ rows
    assert (got["model.layers.0.self_attn.q_proj"] - wanted).norm() < 1e-6 * wanted.norm()


def test_too_few_tokens_give_one_warning_that_says_what_to_do(caplog):
    with caplog.at_level(logging.WARNING, logger="lora_null"):
        calibrate(llama(), [token_ids(1, 100)])
    [record] = caplog.records
    assert "4 of 8" not in record.getMessage() and "2 of 8 covariances" in record.getMessage()
    assert "at least 112 tokens" in record.getMessage()
    caplog.clear()
    with caplog.at_level(logging.WARNING, logger="lora_null"):
        calibrate(llama(), [token_ids(1, 112)])
    assert not caplog.records


def test_layers_that_no_batch_reaches_are_reported(caplog):
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x):
            return self.used(x)

    with caplog.at_level(logging.WARNING, logger="lora_null"):
        got = calibrate(Branches(), [torch.randn(30, 4)])
    assert got.keys() == ["used"]
    assert "1 of 2 target layers received no token" in caplog.text and "unused" in caplog.text


def test_the_quickstart_chain_accepts_the_result(tmp_path):
    model = llama()
    calibrate(model, [token_ids(4, 60)]).save(tmp_path / "c.safetensors")
    covariances = lora_null.Covariances.load(tmp_path / "c.safetensors")
    space = lora_null.null_space(covariances["model.layers.0.mlp.up_proj"], 4)
    assert space.basis.shape == (32, 4)

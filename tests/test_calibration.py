"""Calibration against sums formed in float64 from the model's own activations."""

import logging

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader
from transformers import LlamaConfig, LlamaForCausalLM

import lora_null
from lora_null import LoraNullConfig, calibrate
from lora_null.targets import target_linears

VOCABULARY = 128


@pytest.fixture(autouse=True)
def one_thread():
    """Tiny products are faster on one thread, and the bits of a sum depend on the number of threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def llama(layers=2, dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=256,
    )
    return LlamaForCausalLM(config).to(dtype).eval()


def token_ids(rows, columns, seed=0):
    return torch.randint(0, VOCABULARY, (rows, columns), generator=torch.Generator().manual_seed(seed))


def padded_batches():
    batches = []
    for seed, (rows, columns) in enumerate([(3, 20), (1, 33), (4, 9)]):
        mask = torch.ones(rows, columns, dtype=torch.long)
        mask[0, columns // 2 :] = 0  # right padding
        if rows > 1:
            mask[1, :4] = 0  # left padding
        batches.append({"input_ids": token_ids(rows, columns, seed), "attention_mask": mask})
    return batches


def truth(model, batches, masks=None):
    """Sum every target layer's inputs in float64, and in float32 with torch's own product, layer by layer."""
    inputs = {name: [] for name in target_linears(model)}
    handles = [
        module.register_forward_pre_hook(lambda _, args, name=name: inputs[name].append(args[0].detach().clone()))
        for name, module in target_linears(model).items()
    ]
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    for handle in handles:
        handle.remove()
    exact, plain = {}, {}
    for name, seen in inputs.items():
        kept = [x.flatten(0, -2) if masks is None else x[mask] for x, mask in zip(seen, masks or seen, strict=True)]
        rows = torch.cat(kept)
        exact[name] = rows.double().T @ rows.double()
        plain[name] = rows.float().T @ rows.float()
    return exact, plain


def assert_as_good_as_torch(covariances, exact, plain):
    for name, wanted in exact.items():
        got = covariances[name]
        assert torch.equal(got, got.T), name
        error, own = (got - wanted).abs().max(), (plain[name] - wanted).abs().max()
        assert error <= 2 * own + 1e-7 * wanted.abs().max(), f"{name}: error {error:.2e}, torch's own {own:.2e}"


def assert_equal(one, other):
    assert one.groups == other.groups and one.tokens == other.tokens
    for key, matrix in one.items():
        assert torch.equal(matrix, other[key]), key


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


def test_every_form_of_batches_gives_the_same_bits():
    model, ids = llama(), token_ids(6, 30)
    rows = [ids[i : i + 2] for i in range(0, 6, 2)]
    wanted = calibrate(model, rows)

    def run_model():
        for batch in rows:
            model(input_ids=batch)

    def run_base_model():
        for batch in rows:
            model.model(batch)

    class Texts(torch.utils.data.Dataset):
        def __len__(self):
            return 6

        def __getitem__(self, i):
            return {"input_ids": ids[i], "attention_mask": torch.ones(30, dtype=torch.long)}

    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            return iter(rows)

    def run_under_inference_mode():
        with torch.inference_mode():
            run_model()

    forms = {
        "iterator": iter(rows),
        "DataLoader without length": DataLoader(Stream(), batch_size=None),
        "mapping": [{"input_ids": batch} for batch in rows],
        "extra columns": [{"input_ids": batch, "text": ["a", "b"], "length": [30, 30]} for batch in rows],
        "lists of numbers": [{"input_ids": batch.tolist()} for batch in rows],
        "tuples": [(batch, torch.ones_like(batch)) for batch in rows],
        "DataLoader": DataLoader(Texts(), batch_size=2),
        "callback": run_model,
        "callback of the base model": run_base_model,
        "callback under inference mode": run_under_inference_mode,
    }
    for form, batches in forms.items():
        got = calibrate(model, batches)
        assert got.groups == wanted.groups and got.tokens == wanted.tokens, form
        for key, matrix in wanted.items():
            assert torch.equal(got[key], matrix), f"{form}: {key}"


def test_one_tensor_is_cut_into_rows_and_rows_may_be_bare():
    model, ids = llama(), token_ids(6, 30)
    wanted, plain = truth(model, [{"input_ids": ids}])
    for batches in (ids, {"input_ids": ids, "attention_mask": torch.ones_like(ids)}, list(ids)):
        assert_as_good_as_torch(calibrate(model, batches, queue_tokens=64), wanted, plain)


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


def test_the_reference_normalization_is_the_published_one():
    model, batches = llama(), padded_batches()
    masks = [batch["attention_mask"].bool() for batch in batches]
    got = calibrate(model, batches, normalize="reference")
    inputs = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    with torch.no_grad():
        for batch in batches:
            model(**batch)
    handle.remove()
    wanted = torch.zeros(56, 56, dtype=torch.float64)
    for x, mask in zip(inputs, masks, strict=True):
        for sample, keep in zip(x.double(), mask, strict=True):
            rows = sample[keep] / sample[keep].max().abs()
            wanted += rows.T @ rows
    got = got["model.layers.1.mlp.down_proj"]
    assert (got - wanted).norm() < 1e-5 * wanted.norm()


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


class Reader(nn.Module):
    """Two linear layers that read one tensor, as ``routing`` says."""

    def __init__(self, routing):
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.routing, self.calls = routing, 0

    def forward(self, ids):
        x = self.embedding(ids)
        self.calls += 1
        y = self.first(x.view(-1, 8) if self.routing == "views" else x)
        if self.routing == "overwritten":
            x.mul_(2)
        elif self.routing == "transposed":
            x = x.transpose(0, 1)
        elif self.routing == "copied" or (self.routing == "changing" and self.calls == 4):
            x = x.clone()
        elif self.routing == "recycled":
            # the allocator may well give the freed block to the next tensor of this size
            shape = x.shape
            del x
            x = torch.ones(shape)
        return y.sum() + self.second(x.view(-1, 8) if self.routing == "views" else x).sum()


@pytest.mark.parametrize("routing", ["same", "views", "overwritten", "transposed", "copied", "recycled"])
@pytest.mark.parametrize("inference", [False, True], ids=["no_grad", "inference_mode"])
def test_only_the_very_same_tensor_is_shared(routing, inference):
    model, ids = Reader(routing), token_ids(9, 9)

    def run_model():
        with torch.inference_mode(inference):
            model(ids)

    got = calibrate(model, run_model)
    assert len(got) == (1 if routing in ("same", "views") else 2)
    x = model.embedding(ids).detach().double().flatten(0, 1)
    second = {"overwritten": 2 * x, "recycled": torch.ones_like(x)}.get(routing, x)
    torch.testing.assert_close(got["first"].double(), x.T @ x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got["second"].double(), second.T @ second, rtol=1e-5, atol=1e-5)


def test_routing_that_changes_later_is_an_error_with_a_way_out():
    batches = [token_ids(3, 3, seed) for seed in range(6)]
    with pytest.raises(ValueError, match=r"second was grouped with first.*share_inputs=False"):
        calibrate(Reader("changing"), batches)
    got = calibrate(Reader("changing"), batches, share_inputs=False)
    assert got.groups == {"first": ("first",), "second": ("second",)}
    assert torch.equal(got["first"], got["second"])


def test_watching_keeps_no_activation_alive():
    from torch.multiprocessing.reductions import StorageWeakRef

    from lora_null._observe import SharedInputs

    shared, x = SharedInputs(), torch.randn(4, 4)
    assert shared.receive("first", x) and not shared.receive("second", x)
    weak = StorageWeakRef(x.untyped_storage())
    del x
    assert weak.expired()
    for _ in range(5):
        x = torch.randn(4, 4)
        assert shared.receive("first", x) and not shared.receive("second", x)
    assert len(shared._latest) == 1


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


def _state(model):
    return (
        [(name, module.training) for name, module in model.named_modules()],
        [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        [len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules()],
        [sorted(vars(m)) for m in model.modules()],
        model.config.to_dict(),
    )


@pytest.mark.parametrize("low_memory", [False, True], ids=["streaming", "layerwise"])
@pytest.mark.parametrize("fault", [None, "data", "model", "callback", "interrupt"])
def test_the_model_is_left_as_it_was(fault, low_memory):
    model = llama().train()
    model.model.layers[1].eval()
    model.model.layers[0].mlp.requires_grad_(False)
    model(token_ids(1, 3))  # transformers sets up what it keeps on first use
    before = _state(model)

    def batches():
        yield token_ids(2, 40)
        if fault == "data":
            raise OSError("broken file")
        yield token_ids(2, 40)

    def run_model():
        model(token_ids(1, 5))
        raise OSError("broken loop")

    if fault == "model":
        norm, forward = model.model.layers[1].input_layernorm, model.model.layers[1].input_layernorm.forward
        calls = []

        def fail(x):
            calls.append(x)
            if len(calls) == 3:
                raise OSError("broken layer")
            return forward(x)

        norm.forward = fail
    if fault == "interrupt":
        handle = model.model.norm.register_forward_pre_hook(lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))

    if fault is None:
        calibrate(model, batches(), low_memory=low_memory)
    elif fault == "callback":
        with pytest.raises(OSError, match="broken"):
            calibrate(model, run_model)
    elif fault == "interrupt":
        with pytest.raises(KeyboardInterrupt):
            calibrate(model, batches(), low_memory=low_memory)
        handle.remove()
    else:
        with pytest.raises(OSError, match="broken"):
            calibrate(model, batches(), low_memory=low_memory)
    if fault == "model":
        del norm.forward
    assert _state(model) == before


@pytest.mark.parametrize("queue_tokens", [8, 300, 100_000], ids=["direct", "queued", "flushed at the end"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_names_the_layer_and_the_batch(queue_tokens, value):
    model = llama()
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = 0
        model.model.embed_tokens.weight[77] = value
    batches = [token_ids(2, 40, seed) % 77 for seed in range(5)]
    batches[3][1, 20] = 77
    with pytest.raises(ValueError, match=r"model\.layers\.0\.self_attn\.q_proj, batch 3 .*bfloat16"):
        calibrate(model, batches, queue_tokens=queue_tokens)


def test_nan_on_padding_does_not_matter():
    model = llama()
    with torch.no_grad():
        model.model.embed_tokens.weight[77] = torch.nan
    ids, mask = token_ids(3, 70) % 77, torch.ones(3, 70, dtype=torch.long)
    ids[:, 60:], mask[:, 60:] = 77, 0
    # after the first attention block the model itself has spread the NaN
    config = LoraNullConfig(target_modules=r"model\.layers\.0\.self_attn\.q_proj")
    for queue_tokens in (8, 4096):
        got = calibrate(model, [{"input_ids": ids, "attention_mask": mask}], config, queue_tokens=queue_tokens)
        assert all(bool(matrix.isfinite().all()) for _, matrix in got.items())


def test_bad_input_gets_a_clear_error():
    model, ids = llama(), token_ids(2, 40)
    with pytest.raises(ValueError, match="No token was counted"):
        calibrate(model, [])
    with pytest.raises(ValueError, match="No token was counted"):
        calibrate(model, [{"input_ids": ids, "attention_mask": torch.zeros_like(ids)}])
    with pytest.raises(ValueError, match="no linear layer"):
        calibrate(nn.Sequential(nn.LayerNorm(4)), [torch.ones(2, 4)])
    with pytest.raises(ValueError, match="match no linear layer"):
        calibrate(model, [ids], LoraNullConfig(target_modules=["query"]))
    with pytest.raises(TypeError, match="tokenized first"):
        calibrate(model, ["Paris is the capital of France."])
    with pytest.raises(TypeError, match=r"Batch 0 holds no tensor"):
        calibrate(model, {"text": ["Paris is the capital of France."]})
    with pytest.raises(TypeError, match="batches is a str"):
        calibrate(model, "Paris is the capital of France.")
    with pytest.raises(ValueError, match=r"attention_mask of batch 0 is \(2, 1, 40, 40\)"):
        calibrate(model, [{"input_ids": ids, "attention_mask": torch.ones(2, 1, 40, 40)}])
    for option, value in [
        ("mask", "padding"),
        ("accumulate", "bf16"),
        ("normalize", "max"),
        ("offload", "disk"),
        ("queue_tokens", 0),
        ("checkpoint_every", 0),
    ]:
        with pytest.raises(ValueError, match=f"{option} is {value!r}"):
            calibrate(model, [ids], **{option: value})


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
    for normalize in (None, "reference"):
        got = calibrate(model, [batch], normalize=normalize)
        assert got.tokens == {"linear": len(rows)}
        if normalize is None:
            torch.testing.assert_close(got["linear"], rows.T @ rows)


def test_layers_whose_rows_are_not_tokens_refuse_padding():
    class Pooled(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(VOCABULARY, 4), nn.Linear(4, 4)

        def forward(self, input_ids, attention_mask=None):
            return self.head(self.embedding(input_ids).mean(1))

    ids = token_ids(40, 7)
    assert calibrate(Pooled(), [ids]).tokens == {"head": 40}
    mask = torch.ones_like(ids)
    mask[0, 3:] = 0
    with pytest.raises(ValueError, match=r'batch 0|Batch 0 has padding.*mask="none"'):
        calibrate(Pooled(), [{"input_ids": ids, "attention_mask": mask}])


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

"""A posterior: its samples leave no trace, one forward for all equals one each, and files come back or are refused."""

import pytest
import torch
from bayes_tools import KINDS, SoftmaxRegression, adapted, labelled_batches, with_peft
from safetensors.torch import load_file, save_file

import lora_null
from lora_null.adapters.layer import attach_adapter
from lora_null.bayes import Posterior, laplace, tfb
from lora_null.bayes.layers import adapted_layers, norms_of
from lora_null.bayes.noise import Gaussian


def wide(model, which=("lora_A", "lora_B"), std=0.3):
    """A posterior wide enough that a missing deviation shows."""
    noise = {}
    for name, layer in adapted_layers(model).items():
        for factor in which:
            shape = tuple(layer.factor(factor).shape)
            noise[f"{name}.{factor}"] = Gaussian(shape, torch.full((1, 1), std))
    return Posterior(noise, norms_of(adapted_layers(model), noise), "test", {})


def state(model):
    return {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()}


def unchanged(model, before):
    after = state(model)
    return after.keys() == before.keys() and all(
        torch.equal(after[name][0], value) and after[name][1] == trained for name, (value, trained) in before.items()
    )


@pytest.fixture(params=KINDS)
def model(request, llama, token_batches):
    return adapted(request.param, llama, token_batches)


def test_a_sample_changes_the_outputs_and_leaves_the_mean_bit_by_bit(model):
    ids, before = labelled_batches()[0]["input_ids"], state(model)
    posterior = wide(model)
    with torch.no_grad():
        mean = model(ids).logits
        with pytest.raises(RuntimeError, match="inside"), posterior.sample(model, seed=1):
            first = model(ids).logits
            raise RuntimeError("inside")
        with posterior.sample(model, seed=2):
            second = model(ids).logits
        with posterior.sample(model, seed=1):
            assert torch.equal(model(ids).logits, first)
        assert torch.equal(model(ids).logits, mean)
    assert len({float(logits.sum()) for logits in (mean, first, second)}) == 3
    assert unchanged(model, before)


def test_samples_are_seen_within_one_autocast(llama):
    """Which keeps its copies of weights that require gradients until it ends."""
    model, ids = with_peft(llama()), labelled_batches()[0]["input_ids"]
    posterior = wide(model)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        mean = model(ids).logits
        with posterior.sample(model, seed=1):
            assert not torch.equal(model(ids).logits, mean)
        assert torch.equal(model(ids).logits, mean)


@pytest.mark.parametrize("positions", ["last", "all"])
@pytest.mark.parametrize("factors", [("lora_A",), ("lora_B",), ("lora_A", "lora_B")], ids="+".join)
def test_samples_in_one_batch_equal_samples_one_by_one(llama, token_batches, factors, positions):
    model = adapted("shifted", llama, token_batches, torch.float64)
    posterior, batch = wide(model, factors), labelled_batches()[0]
    options = {"samples": 3, "seed": 4, "positions": positions}
    together = posterior.predict(model, batch, **options)
    assert together.shape == ((3, 97) if positions == "last" else (3, 12, 97))
    torch.testing.assert_close(together, posterior.predict(model, batch, batched=False, **options))
    assert not torch.allclose(together, posterior.predict(model, batch, samples=3, seed=5, positions=positions))


def test_one_forward_for_all_samples_in_every_kind_of_layer(model):
    posterior, ids = wide(model), labelled_batches()[0]["input_ids"]
    together = posterior.predict(model, ids, samples=4)
    apart = torch.stack([posterior.predict(model, ids, samples=1, seed=seed, batched=False) for seed in range(4)])
    torch.testing.assert_close(together, apart.mean(0), atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(together.sum(-1), torch.ones(len(ids)))


@pytest.mark.parametrize("factors", [("lora_A",), ("lora_B",), ("lora_A", "lora_B")], ids="+".join)
@pytest.mark.parametrize("kind", KINDS)
def test_the_linearised_model_has_the_slope_of_the_samples(kind, factors, llama, token_batches):
    model, ids = adapted(kind, llama, token_batches, torch.float64), labelled_batches()[0]["input_ids"]
    before, attributes = state(model), [{*module.__dict__} for module in model.modules()]
    step = 1e-3

    def moved(share):
        posterior = wide(model, factors, share)
        with torch.no_grad(), posterior.sample(model, seed=1):
            return model(ids).logits

    with torch.no_grad(), wide(model, factors, 1.0).linearised(model, seed=1):
        mean, slope = torch.autograd.forward_ad.unpack_dual(model(ids).logits)
    want = (moved(step) - moved(-step)) / (2 * step)
    # norms are computed in fp32, the differences of outputs are a thousandth of them
    assert (slope - want).norm() < 1e-3 * want.norm()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, mean, rtol=1e-5, atol=1e-5)
    assert unchanged(model, before) and attributes == [{*module.__dict__} for module in model.modules()]
    found = wide(model, factors, 0.05).predict(model, ids, samples=2, seed=1, positions="all", linearised=True)
    with torch.no_grad(), wide(model, factors, 1.0).linearised(model, seed=2):
        other = torch.autograd.forward_ad.unpack_dual(model(ids).logits).tangent
    expected = ((mean + 0.05 * slope).softmax(-1) + (mean + 0.05 * other).softmax(-1)) / 2
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_inference_mode_drops_no_tangent(llama):
    model, ids = with_peft(llama()), labelled_batches()[0]["input_ids"]
    posterior = wide(model)
    want = posterior.predict(model, ids, samples=2, linearised=True)
    with torch.inference_mode():
        assert torch.equal(posterior.predict(model, ids, samples=2, linearised=True), want)
    assert not want.requires_grad
    with (
        posterior.linearised(model),
        torch.inference_mode(),
        pytest.raises(RuntimeError, match=r"Expected torch\.no_grad"),
    ):
        model(ids)


def test_samples_of_one_matrix_are_linear_already():
    model = SoftmaxRegression()
    attach_adapter(model.linear, torch.randn(2, 5).double(), torch.randn(4, 2).double())
    posterior, x = wide(model, ("lora_B",)), {"x": torch.randn(7, 5).double()}
    apart = posterior.predict(model, x, batched=False)
    torch.testing.assert_close(posterior.predict(model, x, linearised=True), apart)
    both = wide(model)
    assert not torch.allclose(both.predict(model, x, linearised=True), both.predict(model, x, batched=False))


def test_the_last_position_is_the_last_one_that_is_no_padding(llama, token_batches):
    model = adapted("peft", llama, token_batches, torch.float64)
    posterior, ids = wide(model), labelled_batches()[0]["input_ids"]
    mask = torch.ones_like(ids)
    mask[1, 7:] = 0
    found = posterior.predict(model, {"input_ids": ids, "attention_mask": mask}, samples=3)
    alone = posterior.predict(model, ids[1:2, :7], samples=3)
    torch.testing.assert_close(found[1:2], alone)


def test_dropout_is_off_and_each_modules_mode_comes_back(llama):
    model = with_peft(llama(), lora_dropout=0.5).train()
    posterior, ids = wide(model), labelled_batches()[0]["input_ids"]
    assert torch.equal(posterior.predict(model, ids), posterior.predict(model, ids))
    assert all(module.training for module in model.modules())


def test_one_layer_on_a_shared_input(model):
    posterior, layers = wide(model), adapted_layers(model)
    name = next(iter(layers))
    x = torch.randn(2, 5, layers[name].factor("lora_A").shape[1], generator=torch.Generator().manual_seed(0))
    found = posterior.outputs(model, name, x, samples=3, seed=1)
    for index in range(3):
        with torch.no_grad(), posterior.sample(model, 1 + index):
            torch.testing.assert_close(found[index], layers[name].module(x), atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no random factor"):
        posterior.outputs(model, "model.norm", x)


def test_mixed_rows_are_refused_in_one_batch_and_run_one_by_one():
    class Routed(torch.nn.Module):
        """Takes rows out before a layer, as a router does."""

        def __init__(self):
            super().__init__()
            self.inner = torch.nn.Linear(4, 3)

        def forward(self, x):
            return self.inner(x[:-1])

    model = Routed()
    attach_adapter(model.inner, torch.randn(2, 4), torch.randn(3, 2))
    posterior = wide(model)
    with pytest.raises(ValueError, match="batched=False"):
        posterior.predict(model, {"x": torch.randn(3, 4)}, samples=2)
    assert posterior.predict(model, {"x": torch.randn(3, 4)}, samples=2, batched=False).shape == (2, 3)


@pytest.mark.parametrize("kind", ["frozen", "peft"])
def test_a_file_comes_back_as_the_same_samples(kind, llama, token_batches, tmp_path):
    model = adapted(kind, llama, token_batches)
    for posterior in (tfb(model, labelled_batches(), steps=2), laplace(model, labelled_batches(), which="ab")):
        posterior.save(tmp_path / "p.safetensors", overwrite=True)
        loaded = Posterior.load(tmp_path / "p.safetensors")
        assert (loaded.method, loaded.facts) == (posterior.method, posterior.facts)
        for (key, first), (other, second) in zip(posterior.draw(3).items(), loaded.draw(3).items(), strict=True):
            assert key == other and torch.equal(first, second)
    with pytest.raises(FileExistsError, match="overwrite"):
        posterior.save(tmp_path / "p.safetensors")
    assert Posterior.load(tmp_path / "p.safetensors").method == "laplace"


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (lambda tensors, meta: meta.update(kind="lora_null.covariances"), "kind"),
        (lambda tensors, meta: meta.update(version="2"), "newer"),
        (lambda tensors, meta: meta.update(norms="{}"), "other factors"),
        (lambda tensors, meta: meta.update(facts='{"beta": Infinity}'), "finite"),
        (lambda tensors, meta: meta.pop("norms"), "norms"),
        (lambda tensors, meta: tensors.update({k: v.half() for k, v in tensors.items() if k.endswith("std")}), "fp32"),
        (lambda tensors, meta: tensors.update({k: v[:, :-1] for k, v in tensors.items() if k.endswith("std")}), "std"),
        (lambda tensors, meta: tensors.update({k: -v for k, v in tensors.items() if k.endswith("std")}), "negative"),
        (lambda tensors, meta: [tensors.pop(k) for k in list(tensors) if k.endswith("size")], "expected"),
        (lambda tensors, meta: tensors.update({"q.lora_A/dirac/std": torch.ones(1)}), "dirac"),
        (lambda tensors, meta: tensors.update({"oddly": torch.ones(1)}), "posterior"),
    ],
)
def test_a_damaged_file_is_refused(llama, token_batches, tmp_path, damage, said):
    from safetensors import safe_open

    path = tmp_path / "p.safetensors"
    laplace(adapted("frozen", llama, token_batches), labelled_batches()).save(path)
    tensors = load_file(path)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    damage(tensors, metadata)
    save_file({key: value.contiguous() for key, value in tensors.items()}, path, metadata)
    with pytest.raises(ValueError, match=said):
        Posterior.load(path)


def test_cut_files_and_missing_ones_are_refused(llama, token_batches, tmp_path):
    path = tmp_path / "p.safetensors"
    laplace(adapted("frozen", llama, token_batches), labelled_batches()).save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match="cannot be read"):
        Posterior.load(path)
    with pytest.raises(FileNotFoundError):
        Posterior.load(tmp_path / "none")


def test_the_adapter_of_another_training_is_refused_and_one_rounded_to_16_bits_is_not(llama, token_batches):
    model = adapted("frozen", llama, token_batches)
    posterior, ids = wide(model), labelled_batches()[0]["input_ids"]
    layer = next(iter(adapted_layers(model).values()))
    kept = layer.factor("lora_B").detach().clone()
    with torch.no_grad():
        layer.factor("lora_B").copy_(kept.bfloat16())
        posterior.predict(model, ids, samples=1)
        layer.factor("lora_B").mul_(1.1)
    with pytest.raises(ValueError, match="fit it again"):
        posterior.predict(model, ids, samples=1)
    with pytest.raises(ValueError, match="fit it again"), posterior.sample(model):
        pass
    with pytest.raises(ValueError, match="fit it again"):
        posterior.predict(with_peft(llama()), ids)


def test_the_adapter_saved_beside_a_posterior_is_the_one_that_was_trained(llama, token_batches, tmp_path):
    model = adapted("frozen", llama, token_batches)
    lora_null.save_adapter(model, tmp_path / "before")
    posterior = tfb(model, labelled_batches(), steps=3)
    posterior.predict(model, labelled_batches()[0], samples=2)
    lora_null.save_adapter(model, tmp_path / "after")
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("before", "after"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_random_B_on_a_null_space_leaves_protected_inputs_their_probabilities():
    """A x = 0 for what is protected, so that no draw of B reaches it: bit by bit where the zero is exact."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Linear(8, 6, dtype=torch.float64), torch.nn.Linear(6, 5, dtype=torch.float64)
    ).eval()
    protected = torch.zeros(7, 8, dtype=torch.float64)
    protected[:, :5] = torch.randn(7, 5, dtype=torch.float64)
    first_A = torch.zeros(2, 8, dtype=torch.float64)
    first_A[:, 5:] = torch.randn(2, 3, dtype=torch.float64)
    with torch.no_grad():
        model[0].weight[4:], model[0].bias[4:] = 0, 0  # hidden activations of protected inputs end before
        model[0].weight[4, 6] = 1
    second_A = torch.zeros(2, 6, dtype=torch.float64)
    second_A[:, 4:] = torch.randn(2, 2, dtype=torch.float64)
    before = model(protected).softmax(-1)
    for layer, A in zip(model, (first_A, second_A), strict=True):
        attach_adapter(layer, A, torch.randn(layer.out_features, 2, dtype=torch.float64), scaling=2.0)
    assert not bool((first_A @ protected.T).any())

    only_B, both = wide(model, ("lora_B",)), wide(model)
    for batched in (True, False):
        found = only_B.predict(model, {"input": protected}, samples=4, batched=batched)
        torch.testing.assert_close(found, before, atol=1e-15, rtol=1e-15)
    assert (both.predict(model, {"input": protected}, samples=4) - before).abs().max() > 1e-3
    elsewhere = torch.randn(7, 8, dtype=torch.float64)
    assert (only_B.predict(model, {"input": elsewhere}, samples=4) - model(elsewhere).softmax(-1)).abs().max() > 1e-3


def test_a_null_space_of_calibration_protects_its_inputs_to_rounding(token_batches):
    """The same on null spaces as they are found: of inputs that do not fill the width of the model."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(12, 9, dtype=torch.float64)).eval()
    protected = torch.randn(40, 6, dtype=torch.float64) @ torch.randn(6, 12, dtype=torch.float64)
    before = model(protected).detach().softmax(-1)
    basis = lora_null.null_space(protected.T @ protected, 3).basis
    attach_adapter(model[0], basis.T.contiguous().double(), torch.randn(9, 3, dtype=torch.float64))
    found = wide(model, ("lora_B",), std=1.0).predict(model, {"input": protected}, samples=8)
    torch.testing.assert_close(found, before, atol=1e-12, rtol=0)


@pytest.mark.parametrize(("options", "said"), [({"samples": 0}, "at least 1"), ({"positions": "first"}, "last")])
def test_impossible_wishes_are_refused(llama, token_batches, options, said):
    model = adapted("frozen", llama, token_batches)
    with pytest.raises(ValueError, match=said):
        wide(model).predict(model, labelled_batches()[0], **options)


def test_layers_that_a_posterior_cannot_know_are_refused(llama):
    from peft import LoraConfig, get_peft_model

    model = with_peft(llama())
    with pytest.raises(ValueError, match="no LoRA adapter"):
        adapted_layers(llama())
    with model.disable_adapter(), pytest.raises(ValueError, match="disabled"):
        adapted_layers(model)
    model.merge_adapter()
    with pytest.raises(ValueError, match="merged"):
        adapted_layers(model)
    dora = get_peft_model(llama(), LoraConfig(r=2, target_modules=["q_proj"], use_dora=True))
    with pytest.raises(ValueError, match="Dora"):
        adapted_layers(dora)
    embedded = get_peft_model(llama(), LoraConfig(r=2, target_modules=["embed_tokens"]))
    with pytest.raises(ValueError, match="linear layer"):
        adapted_layers(embedded)

"""QA-LoRA: adapters that read the mean of each group of inputs, from their null space to every file."""

import types

import pytest
import torch
from adapter_tools import R, ids, learn
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn

import lora_null
import lora_null.peft as lora_null_peft
from lora_null import LoraNullConfig, null_basis
from lora_null.adapters import export_adapter
from lora_null.adapters.layer import adapter_layers
from lora_null.solver.pooling import CONVENTIONS, ordinary, pool, pool_covariance, spread

L = 4
MODES = [{"train": "b"}, {"train": "b_in_basis", "energy": 0.5}, {"train": "b_in_basis", "energy": 0}]


def means(x, size=L):
    """The mean of each group, as it is defined."""
    return torch.nn.functional.avg_pool1d(x.reshape(-1, 1, x.shape[-1]), size).reshape(*x.shape[:-1], -1)


def is_even(A, size=L):
    """Whether entries of a group are equal to the bit."""
    groups = A.detach().unflatten(1, (-1, size))
    return torch.equal(groups, groups[..., :1].expand_as(groups))


def started(llama, covariances, **options):
    config = LoraNullConfig(**{"r": 3, "lora_alpha": 5, "group_pooling": L, **options})
    return lora_null.initialize(llama(), covariances, config, progress=False)


def logits(model):
    with torch.no_grad():
        return model.eval()(input_ids=ids()).logits


@pytest.mark.parametrize(("d", "size"), [(48, 8), (35, 5), (6, 6), (12, 1)])
def test_the_covariance_of_pooled_inputs_is_made_of_the_whole_one(d, size):
    x = torch.randn(101, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    pooled = means(x, size)
    for C in (x.T @ x, (x.T @ x).float()):
        found = pool_covariance(C, size)
        assert found.dtype == torch.float64
        error = (found - size * pooled.T @ pooled).norm() / found.norm()
        assert error < (1e-14 if C.dtype == torch.float64 else 1e-6)
    A = torch.randn(4, d // size, dtype=torch.float64)
    torch.testing.assert_close(pool(spread(A, size), size), A, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close((pool(x[:4], size) * A).sum(), (x[:4] * spread(A, size)).sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(x @ spread(A, size).T, size**0.5 * pooled @ A.T, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("convention", CONVENTIONS)
def test_each_convention_is_an_ordinary_adapter(convention):
    x, A = torch.randn(9, 24, dtype=torch.float64), torch.randn(2, 6, dtype=torch.float64)
    pooled = {"mean": means(x, 4), "sum": means(x, 4) * 4, "peft": means(x, 4) * (24 // 4)}[convention]
    torch.testing.assert_close(x @ ordinary(A, 4, convention).T, pooled @ A.T, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_an_adapter_reads_means_and_starts_where_they_are_least(llama, calibrated, options):
    base, covariances = calibrated
    model = started(llama, covariances, **options)
    assert torch.equal(logits(model), logits(base))
    for name, layer in adapter_layers(model).items():
        C = covariances[name].double()
        # Rows of A0 span the r directions in which the means have least energy; truth by torch's own solver.
        A = layer.lora_A.weight.detach().double()
        U = torch.linalg.qr(pool(A, L).T).Q
        pooled = pool_covariance(C, L)
        least = torch.linalg.eigvalsh(pooled)[:3].sum()
        assert torch.trace(U.T @ pooled @ U) <= (1 + 1e-3) * least, name
        share = model.lora_null_state.energies[covariances.group_of(name)]
        if options["train"] == "b":
            assert share == pytest.approx(float(least / C.trace()), rel=1e-3)
        B0 = torch.linalg.lstsq(A.T, (layer.weight.detach().double() @ spread(U.T, L).T @ spread(U.T, L)).T).solution.T
        torch.testing.assert_close(B0.T @ B0, A @ A.T, rtol=1e-3, atol=1e-6)
    learn(model)
    for layer in adapter_layers(model).values():
        A, B = layer.lora_A.weight, layer.lora_B.weight
        assert is_even(A)
        x = torch.randn(2, 5, layer.in_features)
        want = nn.functional.linear(x, layer.weight) + 5 / 3 * (means(x) @ (L * A[:, ::L]).T) @ B.T
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)
        if options["train"] == "b_in_basis":
            width = layer.lora_A.directions.k if not layer.lora_A.directions.complementary else layer.in_features // L
            assert layer.lora_A.coefficients.shape == (3, width)
            assert layer.lora_A.weight.requires_grad


@pytest.mark.parametrize("options", MODES[1:], ids=str)
def test_gradients_of_the_coefficients(llama, calibrated, options):
    """Against finite differences, in float64."""
    _, covariances = calibrated
    config = LoraNullConfig(r=3, group_pooling=L, basis_dtype="float64", **options)
    model = lora_null.initialize(llama(torch.float64), covariances, config, adapter_dtype=torch.float64, progress=False)
    learn(model)
    layer = model.model.layers[1].mlp.down_proj
    C = layer.lora_A.coefficients

    x = torch.randn(5, layer.in_features, dtype=torch.float64, generator=torch.Generator().manual_seed(3))

    def loss():
        return layer(x).pow(3).sum()

    loss().backward()
    direction = torch.randn(C.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    losses = []
    with torch.no_grad():
        for step in (1e-5, -2e-5):
            C.add_(step * direction)
            losses.append(float(loss()))
    want = (losses[0] - losses[1]) / 2e-5
    assert float((C.grad * direction).sum()) == pytest.approx(want, rel=1e-5, abs=1e-9)


@pytest.mark.parametrize("options", MODES, ids=str)
def test_every_way_out_is_ordinary_lora_and_every_way_back_goes_on(llama, calibrated, tmp_path, options):
    _, covariances = calibrated
    model = learn(started(llama, covariances, **options))
    want = logits(model)
    lora_null.save_adapter(model, tmp_path / "adapter")
    model.save_pretrained(tmp_path / "checkpoint")
    assert export_adapter(tmp_path / "checkpoint", tmp_path / "exported") == 3
    for folder in ("adapter", "exported"):
        stock = PeftModel.from_pretrained(llama(), tmp_path / folder)
        torch.testing.assert_close(logits(stock), want, rtol=1e-4, atol=1e-5)
    again = lora_null.load_adapter(llama(), tmp_path / "adapter", is_trainable=True, covariances=covariances)
    assert again.lora_null_state.config.group_pooling == L
    torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-5)
    trained = {name for name, parameter in again.named_parameters() if parameter.requires_grad}
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    learn(again, seed=1)
    assert all(is_even(layer.lora_A.weight) for layer in adapter_layers(again).values())
    torch.testing.assert_close(logits(lora_null.merge(model)), want, rtol=1e-4, atol=1e-5)


def test_a_task_is_weighed_by_what_it_does_to_the_means(llama, calibrated, token_batches):
    _, covariances = calibrated
    task = lora_null.calibrate(llama(), token_batches(seed=5), progress=False)
    config = LoraNullConfig(r=3, group_pooling=L, energy=0.5)
    aware = lora_null.initialize(llama(), covariances, config, task=task, progress=False)
    for name, layer in adapter_layers(aware).items():
        assert is_even(layer.lora_A.weight)
        free = null_basis(pool_covariance(covariances[name], L), 0.5)
        N = torch.linalg.eigh(pool_covariance(covariances[name], L)).eigenvectors[:, : free.k]
        T = pool_covariance(task[name], L)
        U = torch.linalg.qr(pool(layer.lora_A.weight.detach().double(), L).T).Q
        most = torch.linalg.eigvalsh(N.T @ T @ N)[-3:].sum()
        assert free.k > 3 and torch.trace(U.T @ T @ U) == pytest.approx(float(most), rel=1e-3), name


def test_layers_that_read_one_tensor_pool_it_once(llama, calibrated, projections):
    _, covariances = calibrated
    model = learn(started(llama, covariances, train="b"))
    model.model.layers[0](torch.randn(4, 64, 48), position_embeddings=(torch.ones(4, 64, 12), torch.zeros(4, 64, 12)))
    # q, k and v, o, gate and up, down
    assert len(projections) == 4


def test_peft_layers(llama, calibrated, tmp_path):
    _, covariances = calibrated
    for options in ({}, {"train": "b_in_basis", "energy": 0.5}):
        model = get_peft_model(llama(), LoraConfig(r=3, lora_alpha=5, target_modules="all-linear"))
        lora_null_peft.initialize_lora_null_weights(model, covariances, group_pooling=L, progress=False, **options)
        assert torch.equal(logits(model), logits(llama()))
        learn(model)
        want = logits(model)
        folder = tmp_path / f"adapter{len(options)}"
        lora_null_peft.save_adapter(model, folder)
        loaded = lora_null.load_adapter(llama(), folder)
        assert loaded.lora_null_state.config.group_pooling == L
        assert all(is_even(layer.lora_A.weight) for layer in adapter_layers(loaded).values())
        torch.testing.assert_close(logits(loaded), want, rtol=1e-4, atol=1e-5)
        again = lora_null_peft.load_trainable(llama(), folder, covariances=covariances)
        torch.testing.assert_close(logits(again), want, rtol=1e-4, atol=1e-5)


def test_peft_qa_lora_of_others_is_read_as_the_plain_lora_that_it_is(llama, tmp_path):
    """PEFT puts it on GPTQ layers only, so its own forward is called on the factors that it would save."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    torch.manual_seed(0)
    model = get_peft_model(
        llama(), LoraConfig(r=3, lora_alpha=6, use_rslora=True, target_modules=["q_proj", "down_proj"])
    )
    config = model.peft_config["default"]
    config.use_qalora, config.qalora_group_size = True, L
    layers = {name: m for name, m in model.get_base_model().named_modules() if hasattr(m, "lora_A")}
    for layer in layers.values():
        QALoraLinearVariant.init(layer, "default", config)
        nn.init.normal_(layer.lora_B["default"].weight)
    model.save_pretrained(tmp_path / "adapter")
    loaded = lora_null.load_adapter(llama(), tmp_path / "adapter")
    for name, layer in layers.items():
        x = torch.randn(2, 7, layer.in_features)
        plain = layer.get_base_layer()(x)
        want = QALoraLinearVariant.forward(layer, "default", x, plain)
        ours = adapter_layers(loaded)[name]
        assert (want - plain).norm() > 0.1 * plain.norm() and ours.scaling == layer.scaling["default"]
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(logits(lora_null.merge(loaded)), logits_with(llama(), layers), rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("convention", ["mean", "sum"])
def test_adapters_of_pooled_inputs_that_do_not_say_so_are_read_by_a_word(llama, tmp_path, convention):
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj", "down_proj"]))
    layers = [module for module in model.modules() if hasattr(module, "lora_A")]
    for layer in layers:
        nn.init.normal_(layer.lora_B["default"].weight)
        layer.lora_A["default"].weight = nn.Parameter(torch.randn(3, layer.in_features // L))
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"d=20.*or reads pooled inputs \(QA-LoRA\): then pass pooling="):
        lora_null.load_adapter(llama(), tmp_path / "adapter")
    with pytest.raises(ValueError, match="pooling is 'max'; expected one of mean, sum, peft"):
        lora_null.load_adapter(llama(), tmp_path / "adapter", pooling="max")
    loaded = lora_null.load_adapter(llama(), tmp_path / "adapter", pooling=convention)
    for layer, ours in zip(layers, adapter_layers(loaded).values(), strict=True):
        x = torch.randn(5, layer.in_features)
        pooled = means(x) * (L if convention == "sum" else 1)
        low_rank = pooled @ layer.lora_A["default"].weight.T @ layer.lora_B["default"].weight.T
        want = layer.get_base_layer()(x) + layer.scaling["default"] * low_rank
        torch.testing.assert_close(ours(x), want, rtol=1e-4, atol=1e-5)
    lora_null.save_adapter(loaded, tmp_path / "plain")
    with pytest.raises(ValueError, match="no lora_A of the adapter reads a divisor"):
        lora_null.load_adapter(llama(), tmp_path / "plain", pooling=convention)


def logits_with(model, layers):
    """Logits of a model whose layers of these names give what PEFT's QA-LoRA gives."""
    from peft.tuners.lora.variants import QALoraLinearVariant

    for name, layer in layers.items():
        module = model.get_submodule(name)
        module.register_forward_hook(
            lambda _, args, y, layer=layer: QALoraLinearVariant.forward(layer, "default", args[0], y)
        )
    return logits(model)


def test_a_base_with_integer_zero_points_is_named(llama, calibrated, tmp_path):
    """As GPTQ has them."""
    _, covariances = calibrated
    lora_null.save_adapter(started(llama, covariances), tmp_path / "adapter")
    model = llama()
    for block in model.model.layers:
        block.mlp.up_proj = nn.Module()
        block.mlp.up_proj.register_buffer("qzeros", torch.zeros(2, 2, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"up_proj, which is a Module .*zero points are integers packed into words"):
        lora_null.load_adapter(model, tmp_path / "adapter")
    assert not adapter_layers(model)


@pytest.mark.parametrize("size", [None, 0, -4, 8.0, "8"])
def test_a_group_size_that_is_none_is_refused(llama, tmp_path, size):
    model = get_peft_model(llama(), LoraConfig(r=3, target_modules=["q_proj"]))
    model.peft_config["default"].use_qalora = True
    model.peft_config["default"].qalora_group_size = size
    model.save_pretrained(tmp_path / "adapter")
    with pytest.raises(ValueError, match=r"qalora_group_size=.*expected what PEFT writes"):
        lora_null.load_adapter(llama(), tmp_path / "adapter")


@pytest.mark.parametrize("value", [0, 1, -8, 2.5, True, "8", "group"])
def test_values_that_are_no_group_size_are_refused(value):
    with pytest.raises(ValueError, match=r"group_pooling is .*expected a number of inputs from 2 on"):
        LoraNullConfig(group_pooling=value)


def test_what_does_not_go_together_is_refused_before_anything_changes(llama, calibrated):
    model, covariances = calibrated
    with pytest.raises(ValueError, match="beside train='ab'"):
        LoraNullConfig(group_pooling=L, freeze_a=False)
    for options, match in (
        ({"group_pooling": 7}, "group_pooling=7 does not divide d=48"),
        ({"r": 2 * R + 1, "group_pooling": L}, r"r=13 is larger than d=48 in groups of 4, 12"),
        ({"r": 3, "group_pooling": "auto"}, "'auto' takes the group size of a base with zero points .*Give the number"),
    ):
        with pytest.raises(ValueError, match=match):
            lora_null.initialize(model, covariances, LoraNullConfig(**options), progress=False)
    assert not adapter_layers(model) and all(parameter.requires_grad for parameter in model.parameters())


def test_a_model_of_no_library_needs_no_weight(llama):
    """What is asked of a layer is asked by its sizes where it keeps its weight under no name."""
    layer = types.SimpleNamespace(in_features=3, out_features=2, dequantize=lambda: None)
    from lora_null.models.layout import is_linear
    from lora_null.models.quantised import is_dense

    assert is_linear(layer) and not is_dense(layer)
    assert not is_linear(nn.LayerNorm(3)) and not is_linear(types.SimpleNamespace(in_features=3, dequantize=print))


def test_the_command_line_and_the_plan_know_groups(calibrated_folder, run, llama, token_batches):
    words = ("init", calibrated_folder / "model", calibrated_folder / "cov", calibrated_folder / "adapter", "--r", 3)
    code, _, error = run(*words, "--group-pooling", 7)
    assert code == 2 and "group_pooling=7 does not divide d=48" in error
    code, _, error = run(*words, "--group-pooling", "auto")
    assert code == 2 and "Give the number" in error
    code, _, error = run(*words, "--group-pooling", L)
    assert code == 0, error
    loaded = lora_null.load_adapter(llama(), calibrated_folder / "adapter")
    assert loaded.lora_null_state.config.group_pooling == L
    assert all(is_even(layer.lora_A.weight) for layer in adapter_layers(loaded).values())
    config = LoraNullConfig(r=3, train="b_in_basis", group_pooling=L)
    plan = lora_null.memory_plan(llama(), token_batches()[0], config)
    assert all(size in str(plan.later) for size in ("(12, 6)", "(20, 10)"))

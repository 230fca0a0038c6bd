"""Laplace: Kronecker factors against gradients taken by hand, the posterior against the exact Hessian."""

import math

import pytest
import torch
from bayes_tools import KINDS, SoftmaxRegression, adapted, labelled_batches

import lora_null
from lora_null.adapters.layer import attach_adapter
from lora_null.bayes import laplace
from lora_null.bayes.kfac import Curvature, KroneckerFactors, of_matrix
from lora_null.bayes.laplace import best_precision
from lora_null.bayes.layers import adapted_layers
from lora_null.bayes.noise import Gaussian


def rebuilt(values, vectors):
    return (vectors.double() * values) @ vectors.double().T


def test_a_spectrum_is_exact_while_it_fits_and_of_the_largest_directions_beyond():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(300, 12, generator=generator) * torch.logspace(0, -3, 12)
    gram = rows.double().T @ rows.double()
    exact, kept = Curvature(12, 12), Curvature(12, 5)
    for part in rows.split(70):
        exact.add(part)
        kept.add(part)
    torch.testing.assert_close(rebuilt(*exact.spectrum()), gram, rtol=1e-5, atol=1e-5)
    values, vectors = kept.spectrum()
    assert vectors.shape == (12, 5) and kept.tokens == 300
    torch.testing.assert_close(values, torch.linalg.eigvalsh(gram)[-5:], rtol=0.02, atol=0)
    torch.testing.assert_close(vectors.T @ vectors, torch.eye(5), atol=1e-5, rtol=0)
    torch.testing.assert_close(of_matrix(gram, 5)[0], torch.linalg.eigvalsh(gram)[-5:])


def test_nothing_seen_is_no_curvature():
    values, vectors = Curvature(12, 5).spectrum()
    assert values.numel() == 0 and vectors.shape == (12, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_equal_those_of_gradients_taken_by_hand(kind, llama, token_batches):
    model, batch = adapted(kind, llama, token_batches), labelled_batches(count=1)[0]
    mask = torch.ones_like(batch["input_ids"])
    mask[1, 9:] = 0
    batch = {**batch, "attention_mask": mask, "labels": batch["labels"].masked_fill(mask == 0, -100)}
    layers = adapted_layers(model)
    factors = KroneckerFactors(layers, ("lora_A", "lora_B"), 1000, inputs=True)
    trained = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    factors.add(model, batch, torch.Generator().manual_seed(7))
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == trained
    assert all(parameter.grad is None for parameter in model.parameters())
    assert not any(layer.module._forward_hooks for layer in layers.values())

    seen = {}

    def keep(name):
        def hook(module, args, y):
            y = y.detach().requires_grad_(True) if not y.requires_grad else y
            y.retain_grad()
            seen[name] = args[0].detach(), y
            return y

        return hook

    handles = [layer.module.register_forward_hook(keep(name)) for name, layer in layers.items()]
    logits = model(input_ids=batch["input_ids"], attention_mask=mask).logits[:, :-1]
    counts = batch["labels"][:, 1:] != -100
    drawn = torch.multinomial(logits[counts].softmax(-1), 1, generator=torch.Generator().manual_seed(7))[:, 0]
    torch.nn.functional.cross_entropy(logits[counts], drawn, reduction="sum").backward()
    for handle in handles:
        handle.remove()
    for name, layer in layers.items():
        x, y = seen[name]
        x, g = x[mask != 0].double(), y.grad[mask != 0].double()
        A, B, s = layer.factor("lora_A").detach().double(), layer.factor("lora_B").detach().double(), layer.scaling
        wanted = {"lora_A": (x, s * g @ B), "lora_B": (s * x @ A.T, g)}
        for factor, (inputs, gradients) in wanted.items():
            for curvature, rows in ((factors.of_input, inputs), (factors.of_gradient, gradients)):
                found = rebuilt(*curvature[f"{name}.{factor}"].spectrum())
                torch.testing.assert_close(found, rows.T @ rows, rtol=1e-3, atol=1e-5 * float(rows.norm() ** 2))


@pytest.mark.parametrize("which", ["a", "b"])
def test_the_posterior_of_a_softmax_regression_is_the_inverse_of_its_hessian(which):
    """With one and the same input the Fisher matrix is one Kronecker product, and the approximation none."""
    model = SoftmaxRegression()
    A, B = 0.5 * torch.randn(2, 5, dtype=torch.float64), 0.5 * torch.randn(4, 2, dtype=torch.float64)
    layer, count, p = attach_adapter(model.linear, A, B, scaling=1.5), 20_000, 500.0
    x = torch.randn(1, 5, dtype=torch.float64).expand(count, 5)
    posterior = laplace(
        model, [{"x": x, "labels": torch.zeros(count, dtype=torch.long)}], which=which, prior_precision=p
    )
    assert posterior.facts["prior_precision"] == p

    def loss(flat):
        factor = flat.view(A.shape if which == "a" else B.shape)
        low_rank = B @ factor if which == "a" else factor @ A
        probabilities = (x[0] @ (layer.weight.detach() + 1.5 * low_rank).T).log_softmax(-1)
        return -count * (fixed * probabilities).sum()

    start = A if which == "a" else B
    fixed = (x[0] @ (layer.weight.detach() + 1.5 * B @ A).T).softmax(-1).detach()
    hessian = torch.autograd.functional.hessian(loss, start.flatten())
    truth = torch.linalg.inv(hessian + p * torch.eye(start.numel(), dtype=torch.float64))
    noise = posterior.noise[f"linear.lora_{which.upper()}"]
    basis = torch.kron(noise.left.double(), noise.right.double())
    found = basis @ torch.diag(noise.std.double().flatten() ** 2) @ basis.T
    assert (found - truth).norm() < 0.03 * truth.norm()


def test_noise_outside_the_kept_directions_is_the_priors():
    left, right = torch.linalg.qr(torch.randn(6, 2))[0], torch.linalg.qr(torch.randn(5, 3))[0]
    std, rest = torch.rand(2, 3) + 0.5, 2.0
    noise = Gaussian((6, 5), std, left, right, rest)
    generator = torch.Generator().manual_seed(0)
    drawn = torch.stack([noise.draw(generator) for _ in range(20_000)])
    inside = left.T @ drawn @ right
    torch.testing.assert_close(inside.std(0), std, rtol=0.03, atol=0)
    outside = drawn - left @ inside @ right.T
    assert float(outside.square().sum((1, 2)).mean()) == pytest.approx(rest**2 * (30 - 6), rel=0.02)


def test_covariances_that_calibration_streamed_give_the_same_input_factors(llama, token_batches):
    model = llama()
    batches = [{"input_ids": ids, "labels": ids.clone()} for ids in token_batches(count=2)]
    covariances = lora_null.calibrate(model, [batch["input_ids"] for batch in batches], progress=False)
    lora_null.initialize(model, covariances, lora_null.LoraNullConfig(r=4), progress=False)
    # B is zero, so that the adapted model has the inputs that were calibrated
    options = {"which": "b", "prior_precision": 0.5, "n_kfac": 100}
    given, streamed = laplace(model, batches, covariances=covariances, **options), laplace(model, batches, **options)
    assert given.facts["effective_parameters"] == pytest.approx(streamed.facts["effective_parameters"], rel=1e-4)
    for key in given.noise:
        torch.testing.assert_close(given.noise[key].std, streamed.noise[key].std, rtol=1e-3, atol=1e-6)
    both = laplace(model, batches, covariances=covariances, which="ab", prior_precision=0.5)
    assert len(both.noise) == 2 * len(given.noise)


def evidence(p, curvature, distance):
    return -0.5 * p * distance + 0.5 * sum(math.log(p) - math.log(h + p) for h in curvature.tolist())


def test_the_prior_precision_has_the_largest_marginal_likelihood():
    curvature = torch.tensor([0.0, 1e-3, 0.5, 4.0, 90.0], dtype=torch.float64)
    for distance in (1e-3, 1.7, 1e4):
        p = best_precision(curvature, distance)
        best = evidence(p, curvature, distance)
        assert all(evidence(p * factor, curvature, distance) < best for factor in (0.1, 0.9, 0.99, 1.01, 1.1, 10))


def test_the_priors_centre_is_where_training_began(llama, token_batches):
    """A shifted base remembers its start; the further from it, the lower the precision."""
    precisions = []
    for scale in (1.0, 2.0):
        model = adapted("shifted", llama, token_batches)
        for layer in adapted_layers(model).values():
            with torch.no_grad():
                B, B0 = layer.factor("lora_B"), layer.initial("lora_B")
                B.copy_(B0 + scale * (B - B0))
        distance = sum(
            float((layer.factor("lora_B") - layer.initial("lora_B")).detach().double().square().sum())
            for layer in adapted_layers(model).values()
        )
        facts = laplace(model, labelled_batches()).facts
        assert facts["prior_precision"] * distance == pytest.approx(facts["effective_parameters"], rel=1e-6)
        precisions.append(facts["prior_precision"])
    assert precisions[1] < precisions[0]


def test_more_data_narrow_the_posterior(llama, token_batches):
    model = adapted("frozen", llama, token_batches)
    few, many = (laplace(model, labelled_batches(count=n), prior_precision=1.0) for n in (1, 6))
    assert many.facts["effective_parameters"] > few.facts["effective_parameters"] > 0


def test_what_has_no_posterior_is_refused(llama, token_batches):
    model, batches = adapted("frozen", llama, token_batches), labelled_batches()
    with pytest.raises(ValueError, match='"ab"'):
        laplace(model, batches, which="c")
    with pytest.raises(ValueError, match="positive"):
        laplace(model, batches, prior_precision=0.0)
    with pytest.raises(ValueError, match="missing"):
        laplace(model, batches, covariances=lora_null.Covariances({}, {}, {}))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.factor("lora_B").zero_()
    with pytest.raises(ValueError, match="no maximum"):
        laplace(model, batches)

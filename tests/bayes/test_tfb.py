"""TFB: the noise is the paper's, its size the largest that the anchors tolerate."""

import pytest
import torch
from bayes_tools import KINDS, adapted, labelled_batches, well_predicted, with_peft

from lora_null.adapters.layer import attach_adapter
from lora_null.bayes import tfb
from lora_null.bayes.layers import AdaptedLayer, adapted_layers
from lora_null.bayes.likelihood import label_log_probabilities
from lora_null.bayes.tfb import mixture_nll, unit_noise


def layer_of(A, B):
    linear = torch.nn.Linear(A.shape[1], B.shape[0], dtype=A.dtype)
    return AdaptedLayer(*(lambda m: (m, m.lora_A, m.lora_B, m.scaling))(attach_adapter(linear, A, B)))


def deviations(noise, count=4000):
    generator = torch.Generator().manual_seed(0)
    return torch.stack([noise.draw(generator) for _ in range(count)])


def test_rows_of_the_rotated_A_get_noise_of_beta_over_their_singular_value():
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(3, 7, generator=generator), torch.randn(5, 3, generator=generator) * torch.tensor([4.0, 1, 0.1])
    _, D, Vt = torch.linalg.svd(B, full_matrices=False)
    rotated = Vt @ deviations(unit_noise(layer_of(A, B)))
    torch.testing.assert_close(rotated.std((0, 2)), 1 / D, rtol=0.03, atol=0)
    flat = (rotated * D[:, None]).flatten(1)
    torch.testing.assert_close(flat.T @ flat / len(flat), torch.eye(21), atol=0.1, rtol=0)


def test_the_same_change_of_the_weight_whatever_form_the_pair_has():
    """B A = (B M^-1) (M A): the noise on the product depends on the product alone, its covariance is beta^2 U U^T."""
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(3, 4, generator=generator), torch.randn(5, 3, generator=generator)
    M = torch.randn(3, 3, generator=generator)
    U = torch.linalg.svd(B, full_matrices=False)[0]
    for left, right in ((B, A), (B @ torch.linalg.inv(M), M @ A)):
        change = left @ deviations(unit_noise(layer_of(right, left)))
        covariance = torch.einsum("snd,smd->nm", change, change) / (change.shape[0] * change.shape[2])
        torch.testing.assert_close(covariance, U @ U.T, atol=0.04, rtol=0)


def test_directions_that_B_does_not_use_get_no_noise():
    generator = torch.Generator().manual_seed(1)
    A, B = torch.randn(3, 4, generator=generator), torch.randn(5, 1, generator=generator) @ torch.randn(1, 3)
    drawn = deviations(unit_noise(layer_of(A, B)), 10)
    assert torch.linalg.matrix_rank(drawn[0], atol=1e-4) == 1
    assert drawn.isfinite().all()
    assert unit_noise(layer_of(A, torch.zeros(5, 3))) is None


@pytest.mark.parametrize("kind", KINDS)
def test_beta_is_the_largest_that_is_tolerated(kind, llama, token_batches):
    model = adapted(kind, llama, token_batches)
    batches = well_predicted(model)
    posterior = tfb(model, batches, tolerance=5e-3, bounds=(1e-5, 0.5), samples=2, steps=8)
    facts = posterior.facts
    mean = -float(torch.cat([label_log_probabilities(model, batch) for batch in batches]).mean())
    assert facts["nll"] == pytest.approx(mean)
    found = mixture_nll(posterior, model, batches, 2, 0) - mean
    assert found == pytest.approx(facts["rise"], abs=1e-6) and facts["rise"] <= 5e-3
    assert set(posterior.noise) == {f"{name}.lora_A" for name in adapted_layers(model)}
    # an upper bound of one step more is refused by the search, whose answer then stays below it
    step = 0.5 / 2**8
    assert 1e-5 < facts["beta"] < 0.5
    above = tfb(model, batches, tolerance=1e9, bounds=(1e-5, facts["beta"] + step), samples=2, steps=0)
    assert above.facts["rise"] > 5e-3


def test_a_tolerant_search_ends_at_the_upper_bound_and_an_impossible_one_says_so(llama, token_batches):
    model = adapted("frozen", llama, token_batches)
    assert tfb(model, labelled_batches(), tolerance=1e9).facts["beta"] == 0.2
    with pytest.raises(ValueError, match="Lower bounds"):
        tfb(model, well_predicted(model), tolerance=1e-6, bounds=(5.0, 6.0), samples=1)


def test_what_cannot_be_searched_is_refused(llama):
    model = with_peft(llama())
    with pytest.raises(ValueError, match="labels"):
        tfb(model, [{"input_ids": torch.ones(1, 4, dtype=torch.long)}])
    with pytest.raises(ValueError, match="labels"):
        tfb(model, [{**labelled_batches()[0], "labels": torch.full((3, 12), -100)}])
    with pytest.raises(ValueError, match="empty"):
        tfb(model, iter([]))
    with pytest.raises(ValueError, match="bounds"):
        tfb(model, labelled_batches(), bounds=(0.2, 0.1))
    with torch.no_grad():
        for layer in adapted_layers(model).values():
            layer.factor("lora_B").zero_()
    with pytest.raises(ValueError, match="train the adapter"):
        tfb(model, labelled_batches())

"""Laplace approximation of a trained adapter with Kronecker factors: Laplace-LoRA (arXiv 2308.13111)."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..covariances.covariances import Covariances
from ..models.arguments import takes
from .kfac import KroneckerFactors, of_matrix
from .layers import AdaptedLayer, adapted_layers, factors_of, norms_of
from .likelihood import labelled
from .noise import Gaussian, Noise
from .posterior import Posterior

N_KFAC = 64
# Halvings of an interval of 200 nats on the logarithm of the prior precision.
_HALVINGS = 80


@takes(model=nn.Module, covariances=Covariances)
def laplace(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    which: str = "b",
    covariances: Covariances | None = None,
    prior_precision: float | None = None,
    n_kfac: int = N_KFAC,
    seed: int = 0,
) -> Posterior:
    """Fit a Gaussian around the trained adapter: the loss's curvature there, as Kronecker factors, plus the prior's.

    A factor's Fisher matrix is taken as ``G (x) C``: ``G`` the sum over tokens of ``g g^T`` for the gradient g at its
    output, with labels drawn from the model, C the mean of ``a a^T`` over its inputs: ``a = x`` for A, ``s A x`` for B.
    The posterior's precision is ``G (x) C + prior_precision * I``, in its eigenbasis without further approximation.

    :class:`.Posterior` predicts by samples of the network itself, or with ``linearised=True`` as the paper does, by
    samples of the model that is linear in its factors.

    Args:
        model: With a trained LoRA adapter, ours or PEFT's; the prior is centred where its training began if the layer
            knows that (a shifted base), otherwise at zero.
        batches: The training data, mappings with ``input_ids`` and ``labels``, each run forward and backward once. The
            data's weight against the prior is that of the labels in them.
        which: ``"b"``, as for a frozen A; ``"a"``; ``"ab"``, with A and B independent.
        covariances: Of the layers' inputs, as calibration streams them; the input factors are then ``C / tokens`` and
            ``s^2 A C A^T / tokens``. By default they come from ``batches``.
        prior_precision: Of every entry; by default the one of largest marginal likelihood.
        n_kfac: Most eigenpairs of a factor; what is beyond counts as no curvature. Memory per layer is
            ``4 n_kfac (m + r)`` bytes, for A ``4 n_kfac (r + d)``.
        seed: Of the drawn labels.

    Returns:
        The posterior; its ``facts`` hold ``prior_precision`` and ``effective_parameters``, how many of the factors'
        entries the data determine.

    Raises:
        ValueError: The model has no adapter, a batch no labels, ``covariances`` lacks a layer, or the marginal
            likelihood has no maximum, because the adapter is where the prior is or has no influence.
    """
    if n_kfac < 1 or not (prior_precision is None or 0 < prior_precision < math.inf):
        raise ValueError(f"n_kfac={n_kfac}, prior_precision={prior_precision}; expected positive numbers.")
    factors = factors_of(which)
    layers, data = adapted_layers(model), labelled(batches)
    if covariances is not None:
        _check(layers, covariances)
    streamed = KroneckerFactors(layers, factors, n_kfac, inputs=covariances is None)
    generator = torch.Generator().manual_seed(seed)
    for batch in data:
        streamed.add(model, batch, generator)

    spectra: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
    for name, layer in layers.items():
        for factor in factors:
            key = f"{name}.{factor}"
            sizes, left = streamed.of_gradient[key].spectrum()
            if covariances is None:
                seen = streamed.of_input[key]
                shares, right = seen.spectrum()
                shares = shares / max(seen.tokens, 1)
            else:
                shares, right = of_matrix(_input_factor(layer, name, factor, covariances), n_kfac)
            spectra[key] = sizes[:, None] * shares, left, right

    curvature = torch.cat([values.flatten() for values, _, _ in spectra.values()])
    if prior_precision is None:
        prior_precision = best_precision(curvature, _distance(layers, factors))
    noise: dict[str, Noise] = {}
    for key, (values, left, right) in spectra.items():
        std = (values + prior_precision).rsqrt().float()
        noise[key] = Gaussian((left.shape[0], right.shape[0]), std, left, right, prior_precision**-0.5)
    effective = float((curvature / (curvature + prior_precision)).sum())
    facts = {"prior_precision": prior_precision, "effective_parameters": effective}
    return Posterior(noise, norms_of(layers, noise), "laplace", facts)


def best_precision(curvature: Tensor, distance: float) -> float:
    """Return the prior precision ``p`` of largest marginal likelihood under the Laplace approximation.

    Of ``-p distance / 2 + sum(log p - log(h + p)) / 2`` the derivative is zero where ``p distance = sum(h / (h + p))``
    (MacKay 1992). The left side grows with p and the right one falls, so that there is one solution.

    Args:
        curvature: Eigenvalues ``h`` of the loss's curvature, fp64.
        distance: Squared distance of the factors from the prior's centre.

    Raises:
        ValueError: There is no maximum: ``distance`` or every curvature is zero.
    """
    if not (distance > 0 and bool((curvature > 0).any())):
        raise ValueError(
            f"The adapter's squared distance from its prior is {distance:g} and its largest curvature "
            f"{float(curvature.max()) if curvature.numel() else 0:g}: the marginal likelihood has no maximum. Train "
            "the adapter first, or pass prior_precision."
        )
    high = math.log(len(curvature) / distance)
    low = high - 200.0
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        p = math.exp(middle)
        if p * distance < float((curvature / (curvature + p)).sum()):
            low = middle
        else:
            high = middle
    return math.exp((low + high) / 2)


def _distance(layers: Mapping[str, AdaptedLayer], factors: tuple[str, ...]) -> float:
    total = 0.0
    for layer in layers.values():
        for factor in factors:
            weight, initial = layer.factor(factor).detach().double(), layer.initial(factor)
            total += float((weight if initial is None else weight - initial.to(weight)).square().sum())
    return total


def _input_factor(layer: AdaptedLayer, name: str, factor: str, covariances: Covariances) -> Tensor:
    C = covariances[name].double() / covariances.tokens[covariances.group_of(name)]
    if factor == "lora_A":
        return C
    A = layer.scaling * layer.factor("lora_A").detach().double().cpu()
    return A @ C @ A.T


def _check(layers: Mapping[str, AdaptedLayer], covariances: Covariances) -> None:
    for name, layer in layers.items():
        d = layer.factor("lora_A").shape[1]
        if name not in covariances or covariances.size(name) != d:
            found = f"of {covariances.size(name)} inputs" if name in covariances else "missing"
            raise ValueError(
                f"The covariance of {name} is {found}; expected one of {d}. Calibrate this model with all adapted "
                "layers among target_modules, or leave covariances out."
            )

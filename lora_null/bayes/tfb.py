"""Training-free Bayesianisation of a trained adapter: TFB (arXiv 2412.05723)."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.arguments import takes
from .layers import AdaptedLayer, adapted_layers, norms_of
from .likelihood import label_log_probabilities, labelled
from .noise import Gaussian, Noise
from .posterior import Posterior

BOUNDS = (1e-3, 0.2)


@takes(model=nn.Module)
def tfb(
    model: nn.Module,
    batches: Iterable[Mapping[str, Any]],
    *,
    tolerance: float = 0.01,
    samples: int = 4,
    seed: int = 0,
    bounds: tuple[float, float] = BOUNDS,
    steps: int = 10,
) -> Posterior:
    """Find the most noise on A that an anchor set's likelihood tolerates; nothing is trained, the mean unchanged.

    With ``B = U D V^T`` a pair is the same as ``U D`` and ``V^T A``, whose row i gets independent noise of standard
    deviation ``beta / D_i``: directions that B uses much are known well. In the factors as they are, that is
    ``A + V diag(beta / D) E``. One beta for all layers; the largest is found by bisection.

    Args:
        model: With a trained LoRA adapter, ours in both modes or PEFT's.
        batches: The anchor set, mappings with ``input_ids`` and ``labels``; held in a list, and run
            ``samples * (steps + 1)`` times.
        tolerance: How much the mean negative log-likelihood of the labels may rise, in nats.
        samples: Whose probabilities are averaged for that; the same noise is scaled for every beta.
        seed: Of the first sample.
        bounds: Least and largest beta.
        steps: Halvings of ``bounds``.

    Returns:
        The posterior; its ``facts`` hold ``beta``, ``nll`` of the mean and ``rise``. The rise is at most ``tolerance``
        on these samples.

    Raises:
        ValueError: The model has no adapter, B is zero everywhere, a batch has no labels, or even the least beta costs
            more than ``tolerance``.
    """
    if not (0 < bounds[0] < bounds[1] and samples > 0 and steps >= 0 and tolerance >= 0):
        raise ValueError(
            f"bounds={bounds}, samples={samples}, steps={steps}, tolerance={tolerance}; expected 0 < least < largest, "
            "at least one sample, and no negative number."
        )
    layers, anchors = adapted_layers(model), labelled(batches)
    unit = {f"{name}.lora_A": noise for name, layer in layers.items() if (noise := unit_noise(layer)) is not None}
    if not unit:
        raise ValueError("B is zero in every layer, so that noise on A changes nothing; train the adapter first.")
    norms = norms_of(layers, unit)

    def posterior(beta: float, **facts: float) -> Posterior:
        scaled: dict[str, Noise] = {key: replace(noise, std=beta * noise.std) for key, noise in unit.items()}
        return Posterior(scaled, norms, "tfb", {"beta": beta, **facts})

    nll = -float(torch.cat([label_log_probabilities(model, batch) for batch in anchors]).mean())

    def rise(beta: float) -> float:
        return mixture_nll(posterior(beta), model, anchors, samples, seed) - nll

    low, high = bounds
    if (known := rise(low)) > tolerance:
        raise ValueError(
            f"The least beta, {low:g}, raises the anchors' negative log-likelihood by {known:.4f} nats; expected at "
            f"most tolerance={tolerance:g}. Lower bounds[0], allow more, or take more anchors or samples."
        )
    if (at_high := rise(high)) <= tolerance:
        low, known = high, at_high
    else:
        for _ in range(steps):
            middle = (low + high) / 2
            found = rise(middle)
            if found <= tolerance:
                low, known = middle, found
            else:
                high = middle
    return posterior(low, nll=nll, rise=known)


def unit_noise(layer: AdaptedLayer) -> Gaussian | None:
    """Return the noise of ``lora_A`` at ``beta = 1``, or ``None`` where B is zero.

    Where B loses rank, ``beta / D_i`` is infinite and noise in that direction changes no output: it is left out.
    """
    A, B = layer.factor("lora_A"), layer.factor("lora_B")
    _, D, Vt = torch.linalg.svd(B.detach().cpu().double(), full_matrices=False)
    seen = torch.finfo(B.dtype).eps * max(B.shape) * D[0]
    if not bool(D[0] > 0):
        return None
    std = torch.where(D > seen, 1 / D, torch.zeros_like(D))
    return Gaussian((A.shape[0], A.shape[1]), std.float()[:, None], left=Vt.T.float())


def mixture_nll(
    posterior: Posterior, model: nn.Module, batches: list[Mapping[str, Any]], samples: int, seed: int
) -> float:
    """Return the mean negative log-likelihood of labels under the mean of ``samples`` predictions, in nats."""
    found: list[Tensor] = []
    for index in range(samples):
        with posterior.sample(model, seed + index):
            found.append(torch.cat([label_log_probabilities(model, batch) for batch in batches]))
    mixed = torch.stack(found).logsumexp(0) - torch.tensor(float(samples), dtype=torch.float64).log()
    return -float(mixed.mean())

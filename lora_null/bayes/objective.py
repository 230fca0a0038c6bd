"""What a trainer adds to its loss while a posterior is trained."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ..calibration.batches import IGNORED_LABEL
from ..models.arguments import takes
from .layers import adapted_layers
from .likelihood import counted, logits_of
from .training import original, random_factors


@takes(model=nn.Module)
def added_loss(
    model: nn.Module,
    outputs: Any = None,
    labels: Tensor | None = None,
    *,
    kl: float,
    label_smoothing: float = 0.0,
    entropy: float = 0.0,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Return what a trainer adds to the mean cross-entropy: ``kl KL(q || prior)``, and two aids if asked.

    Beside a mean over N labels, ``kl = 1 / N`` with N the labels of the whole training set is the evidence's lower
    bound. The published Bayesian-LoRA code takes ``0.1 / steps per epoch``, from the second epoch on.

    Args:
        model: After :func:`inducing` or :func:`blob`.
        outputs: Of the model, or its logits; for the two aids only.
        labels: As the model takes them; for the two aids only.
        kl: Factor of the divergence, in nats.
        label_smoothing: Share of every label that goes to all classes alike: with it, the sum is torch's smoothed
            cross-entropy. The published code has 0.05.
        entropy: Factor of the predictions' mean entropy, which is taken off. The published code has 0.05.
        generator: Of the one draw that the divergence needs; torch's own by default.

    Raises:
        ValueError: The model has no random factors, or outputs or labels are missing for an aid.
    """
    layers = adapted_layers(model, random=True)
    terms = [part.kl(original(layers[name], factor), generator) for name, factor, part in random_factors(layers)]
    if not terms:
        raise ValueError(
            f"{type(model).__name__} has no random factor; expected a model after lora_null.bayes.inducing or "
            "lora_null.bayes.blob, before lora_null.bayes.collect."
        )
    total = kl * torch.stack([term.to(terms[0].device) for term in terms]).sum()
    if not (label_smoothing or entropy):
        return total
    if outputs is None or labels is None:
        raise ValueError("label_smoothing and entropy need outputs and labels; pass both to added_loss.")
    logits, wanted = counted(logits_of(outputs), labels)
    log_p = logits.log_softmax(-1)
    right = log_p.gather(-1, wanted[:, None])[:, 0]
    # (1 - e) CE + e mean_c(-log p_c) is CE and this
    total = total + label_smoothing * (right - log_p.mean(-1)).mean()
    return total + entropy * (log_p.exp() * log_p).sum(-1).mean()


@takes(model=nn.Module)
def trainer_loss(
    model: nn.Module, *, kl: float, label_smoothing: float = 0.0, entropy: float = 0.0
) -> Callable[..., Tensor]:
    """Return a ``compute_loss_func`` for ``transformers.Trainer``: mean cross-entropy plus :func:`added_loss`.

    With gradient accumulation a step still adds ``kl`` times the divergence once: every micro-batch adds its share.
    """

    def loss(outputs: Any, labels: Tensor, num_items_in_batch: Any = None) -> Tensor:
        logits, wanted = counted(logits_of(outputs), labels)
        total = cross_entropy(logits, wanted, reduction="sum")
        items = int((labels != IGNORED_LABEL).sum())
        whole = items if num_items_in_batch is None else num_items_in_batch
        added = added_loss(model, outputs, labels, kl=kl, label_smoothing=label_smoothing, entropy=entropy)
        return (total + items * added) / whole

    return loss

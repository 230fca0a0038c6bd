"""What a model says about labels: logits, the labels that count, log-likelihoods."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad

from ..calibration.batches import IGNORED_LABEL, to_device
from ..models.modes import evaluating, input_device


def labelled(batches: Iterable[Any]) -> list[Mapping[str, Any]]:
    """Return the batches as a list, which is read more than once; ValueError unless each has labels that count."""
    found = list(batches)
    for index, batch in enumerate(found):
        labels = batch.get("labels") if isinstance(batch, Mapping) else None
        if not isinstance(labels, Tensor) or not bool((labels != IGNORED_LABEL).any()):
            what = sorted(batch) if isinstance(batch, Mapping) else f"a {type(batch).__name__}"
            raise ValueError(
                f"Batch {index} is {what}; expected a mapping with input_ids (B, L) and labels, (B, L) or (B,), some "
                f"of them other than {IGNORED_LABEL}: the posterior is fitted to their likelihood."
            )
    if not found:
        raise ValueError("batches is empty; expected at least one batch. A generator can be read once only.")
    return found


def model_inputs(model: nn.Module, batch: Any) -> dict[str, Any]:
    """Return the keyword arguments of the model, on its device, without labels; a tensor stands for ``input_ids``."""
    if isinstance(batch, Tensor):
        batch = {"input_ids": batch}
    if not isinstance(batch, Mapping):
        raise TypeError(f"The batch is a {type(batch).__name__}; expected a mapping with input_ids, or ids (B, L).")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise ValueError(f"{type(model).__name__} is an encoder-decoder; expected a decoder or a classifier.")
    return to_device({key: value for key, value in batch.items() if key != "labels"}, input_device(model))


def logits_of(output: Any) -> Tensor:
    """Return the logits in what a model returns: Hugging Face's outputs, or the logits themselves.

    Where they carry a tangent, as in :meth:`.Posterior.linearised`, it is added.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if not isinstance(logits, Tensor):
        raise TypeError(f"The model returns a {type(output).__name__}; expected logits, or an output that has them.")
    mean, change = forward_ad.unpack_dual(logits)
    return mean if change is None else mean + change


def counted(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Pick the predictions whose labels count.

    Args:
        logits: ``(B, L, V)``, each predicting the next token as in causal models, or ``(B, V)`` of a classifier.
        labels: ``(B, L)``, position by position as Hugging Face's collators make them, or ``(B,)``.

    Returns:
        Logits ``(N, V)``, in fp32 at least, and labels ``(N,)``.

    Raises:
        ValueError: The shapes do not fit.
    """
    if labels.shape != logits.shape[:-1]:
        raise ValueError(
            f"Logits are {tuple(logits.shape)}, labels {tuple(labels.shape)}; expected the first axes equal."
        )
    labels = labels.to(logits.device)
    if logits.ndim == 3:
        logits, labels = logits[:, :-1], labels[:, 1:]
    counts = labels != IGNORED_LABEL
    picked = logits[counts]
    return picked.to(torch.promote_types(picked.dtype, torch.float32)), labels[counts]


def label_log_probabilities(model: nn.Module, batch: Mapping[str, Any]) -> Tensor:
    """Return the log-probability of every label that counts, ``(N,)`` float64 on the CPU, without dropout."""
    with evaluating(model):
        logits, labels = counted(logits_of(model(**model_inputs(model, batch))), batch["labels"])
        return logits.log_softmax(-1).gather(-1, labels[:, None])[:, 0].double().cpu()


def probabilities(logits: Tensor, inputs: Mapping[str, Any], positions: str) -> Tensor:
    """Return probabilities of ``logits (B, L, V)`` at the positions, or of ``(B, V)`` of a classifier."""
    if positions == "last" and logits.ndim == 3:
        mask = inputs.get("attention_mask")
        rows, length = torch.arange(len(logits), device=logits.device), logits.shape[1]
        if isinstance(mask, Tensor):
            last = (torch.arange(length, device=mask.device) * (mask != 0)).argmax(-1).to(logits.device)
        else:
            last = torch.full_like(rows, length - 1)
        logits = logits[rows, last]
    return logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(-1)

"""Both models on the same text, token by token, in bounded memory."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..calibration.batches import to_device
from ..models.modes import input_device
from .documents import Document, batches, padded, windows
from .pretrained import pretrained

# Logits that one forward pass may return: 512 MiB in bf16, so four sequences of 512 for a vocabulary of 128 thousand.
FORWARD_LOGITS = 2**28
# Logits that are compared at a time; about six fp32 arrays of 64 MiB.
CHUNK_LOGITS = 2**24

COLUMNS = ("before", "after", "kl", "agreement", "tokens")


def compare(
    model: nn.Module,
    base: nn.Module | None,
    documents: Sequence[Document],
    *,
    sequence_length: int,
    batch_size: int,
    description: str,
    progress: bool,
) -> dict[str, Tensor]:
    """Sum over the scored tokens of each document.

    Returns:
        ``(n,)`` float64 each: ``before`` and ``after``, the cross-entropies in nats; ``kl``, with ``p`` the pre-trained
        and ``q`` the tuned distribution of the next token ``sum p ln(p / q)``; ``agreement``, how often both find
        the same token most likely; ``tokens``, the count. Logarithms are taken in fp32.

    Raises:
        ValueError: A model's logits are not finite, or the vocabularies differ.
    """
    sums = torch.zeros(len(documents), len(COLUMNS), dtype=torch.float64)
    cut = windows(documents, sequence_length)
    with tqdm(
        total=sum(len(window.ids) for window in cut), desc=description, unit="token", disable=not progress
    ) as bar:
        for batch in batches(cut, batch_size, FORWARD_LOGITS // vocabulary(model)):
            inputs, scored = padded(batch)
            with pretrained(model, base) as before:
                logits_before = logits_of(before, inputs)
            logits_after = logits_of(model, inputs)
            rows, columns = scored.nonzero(as_tuple=True)
            measured = compare_logits(
                logits_before, logits_after, rows, columns - 1, inputs["input_ids"][rows, columns]
            )
            owners = torch.tensor([window.document for window in batch])[rows]
            sums.index_add_(0, owners, torch.cat([measured, torch.ones(len(rows), 1)], dim=1).double())
            bar.update(sum(len(window.ids) for window in batch))
    return dict(zip(COLUMNS, sums.unbind(1), strict=True))


def logits_of(model: Any, inputs: dict[str, Tensor]) -> Tensor:
    """Return the model's logits ``(B, L, V)``, wherever it computes them."""
    return model(**to_device(inputs, input_device(model)), use_cache=False).logits


def compare_logits(before: Tensor, after: Tensor, rows: Tensor, positions: Tensor, labels: Tensor) -> Tensor:
    """Return ``(n, 4)``: both cross-entropies, the divergence and the agreement at ``n`` positions.

    Args:
        before: Logits ``(B, L, V)`` of the pre-trained model.
        after: Logits of the tuned one.
        rows: ``(n,)``, index of the sequence.
        positions: ``(n,)``, index of the token that predicts.
        labels: ``(n,)``, the token that follows.
    """
    if before.shape[-1] != after.shape[-1]:
        raise ValueError(
            f"The pre-trained model has a vocabulary of {before.shape[-1]} tokens, the tuned one of {after.shape[-1]}; "
            "expected the model that was tuned, with embeddings of one size."
        )
    found = []
    size = max(1, CHUNK_LOGITS // before.shape[-1])
    for chunk in (slice(start, start + size) for start in range(0, len(rows), size)):
        p, q = (log_probabilities(logits, rows[chunk], positions[chunk]) for logits in (before, after))
        q = q.to(p.device)
        chosen = labels[chunk, None].to(p.device)
        # A token that the pre-trained model rules out (-inf, as padding of a vocabulary) contributes nothing, not NaN.
        terms = torch.where(p.isneginf(), 0.0, p.exp() * (p - q))
        columns = [
            -p.gather(1, chosen)[:, 0],
            -q.gather(1, chosen)[:, 0],
            terms.sum(1),
            (p.argmax(1) == q.argmax(1)).float(),
        ]
        found.append(torch.stack(columns, dim=1).cpu())
    return torch.cat(found)


def log_probabilities(logits: Tensor, rows: Tensor, positions: Tensor) -> Tensor:
    """Return fp32 log-probabilities ``(n, V)`` at ``n`` positions of ``logits (B, L, V)``."""
    return require_numbers(logits[rows.to(logits.device), positions.to(logits.device)].float().log_softmax(-1))


def require_numbers(values: Tensor) -> Tensor:
    """Return ``values``; ValueError if one of them is NaN."""
    if values.isnan().any():
        raise ValueError(
            "A model's logits are not a number. The training run diverged, or the weights overflow in their dtype; "
            "evaluate an earlier checkpoint, or load the model in bfloat16 or float32."
        )
    return values


def vocabulary(model: Any) -> int:
    """Return the size of the vocabulary, or a large one where the model does not say."""
    config: Any = getattr(model, "config", None)
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    return getattr(text, "vocab_size", None) or 2**18

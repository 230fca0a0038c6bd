"""What a causal language model knows: multiple choice by log-likelihood, and the loss on a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean

from torch import nn
from tqdm.auto import tqdm

from ..evaluation.choices import score_choices
from ..evaluation.questions import Question, encode
from ..models.modes import evaluating
from .facts import Fact


@dataclass(frozen=True)
class Knowledge:
    """The result of :func:`score_facts`.

    Attributes:
        accuracy: Share of questions whose right answer has the highest log-likelihood.
        log_likelihood: Mean over the questions of the right answer's log-likelihood, in nats per answer.
        by_kind: Accuracy for each kind of question.
    """

    accuracy: float
    log_likelihood: float
    by_kind: dict[str, float]


def score_facts(
    model: nn.Module, tokenizer, facts: Sequence[Fact], *, batch_size: int = 16, progress: bool = True
) -> Knowledge:
    """Answer multiple-choice questions without generating: each choice is scored after the same prompt."""
    questions = [encode(tokenizer, Question(fact.prompt, fact.choices, fact.answer)) for fact in facts]
    with evaluating(model):
        scores = score_choices(model, questions, batch_size=batch_size, description="held-out facts", progress=progress)
    right: dict[str, list[bool]] = {}
    likelihoods = []
    for fact, question, likelihood in zip(facts, questions, scores, strict=True):
        right.setdefault(fact.kind, []).append(int(likelihood.argmax()) == question.right)
        likelihoods.append(float(likelihood[question.right]))
    return Knowledge(
        accuracy=fmean(hit for hits in right.values() for hit in hits),
        log_likelihood=fmean(likelihoods),
        by_kind={kind: fmean(hits) for kind, hits in sorted(right.items())},
    )


def task_loss(
    model: nn.Module, examples: Sequence[dict[str, list[int]]], collate, *, batch_size: int = 16, progress: bool = True
) -> float:
    """Return the mean cross-entropy, in nats per label, over all labels that count.

    Args:
        model: The causal language model.
        examples: ``input_ids`` and ``labels`` of each example; a label of -100 does not count.
        collate: Turns a list of examples into one padded batch of tensors.
        batch_size: Examples per forward pass.
        progress: Show a progress bar.
    """
    device = next(model.parameters()).device
    total, count = 0.0, 0
    starts = range(0, len(examples), batch_size)
    with evaluating(model):
        for start in tqdm(starts, desc="task loss", disable=not progress):
            batch = {key: value.to(device) for key, value in collate(examples[start : start + batch_size]).items()}
            labels = batch.pop("labels")[:, 1:]
            logits = model(**batch).logits[:, :-1].float()
            total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
            count += int((labels != -100).sum())
    return total / count

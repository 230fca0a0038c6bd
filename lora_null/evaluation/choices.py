"""Multiple choice by log-likelihood, without generating."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm.auto import tqdm

from ..models.modes import input_device
from ..models.parts import cache_name
from . import metrics
from .compare import require_numbers
from .questions import EncodedQuestion


@dataclass(frozen=True)
class Answers:
    """What a model says to ``n`` questions.

    Attributes:
        scores: ``(n, choices)`` float64, log-likelihoods in nats; ``-inf`` where a question has fewer choices.
        labels: ``(n,)``, index of the right choice.
    """

    scores: Tensor
    labels: Tensor

    @classmethod
    def of(cls, scores: Sequence[Tensor], right: Sequence[int]) -> Answers:
        """Gather what :func:`score_choices` returns, and the index of each right choice."""
        table = pad_sequence([score.double() for score in scores], batch_first=True, padding_value=-math.inf)
        return cls(table, torch.tensor(right))

    def only(self, chosen: Sequence[int]) -> Answers:
        """Return the answers to some of the questions."""
        return Answers(self.scores[chosen], self.labels[chosen])

    @property
    def probabilities(self) -> Tensor:
        """``(n, choices)``: the likelihoods of the choices over their sum."""
        return self.scores.softmax(1)

    def accuracy(self) -> Tensor:
        """Return ``(n,)``: 1 where the right choice is the likeliest."""
        return (self.scores.argmax(1) == self.labels).double()

    def log_likelihood(self) -> Tensor:
        """Return ``(n,)``, of the right choice, in nats."""
        return self.scores.gather(1, self.labels[:, None])[:, 0]

    def nll(self) -> Tensor:
        """Return ``(n,)``: ``-ln`` of the right choice's probability among the choices."""
        return -self.scores.log_softmax(1).gather(1, self.labels[:, None])[:, 0]

    def brier(self) -> Tensor:
        """Return ``(n,)`` Brier scores."""
        return metrics.brier_scores(self.probabilities, self.labels)

    def gaps(self) -> Tensor:
        """Return ``(n, bins)``, see :func:`~lora_null.evaluation.metrics.gaps`."""
        return metrics.gaps(self.probabilities, self.labels)

    def reliability(self) -> list[metrics.Bin]:
        """Return the bins that hold answers."""
        return metrics.reliability(self.probabilities, self.labels)


def score_choices(
    model: Any,
    questions: Sequence[EncodedQuestion],
    *,
    batch_size: int = 16,
    description: str = "questions",
    progress: bool = True,
) -> list[Tensor]:
    """Return for each question the log-likelihood of every choice after the prompt, in nats, ``(choices,)`` float32.

    A prompt is run once, and its key-value cache is repeated for the choices. Prompts are batched by equal length, so
    that no position is ever padded before an answer.

    Raises:
        ValueError: The model's logits are not finite, or it keeps no key-value cache.
    """
    order = sorted(range(len(questions)), key=lambda index: len(questions[index].prompt))
    scores: dict[int, Tensor] = {}
    with tqdm(total=len(questions), desc=description, unit="question", disable=not progress) as bar:
        for _, same_length in groupby(order, key=lambda index: len(questions[index].prompt)):
            group = list(same_length)
            for start in range(0, len(group), batch_size):
                batch = group[start : start + batch_size]
                scores.update(zip(batch, _score_batch(model, [questions[index] for index in batch]), strict=True))
                bar.update(len(batch))
    return [scores[index] for index in range(len(questions))]


def _score_batch(model: Any, batch: Sequence[EncodedQuestion]) -> Sequence[Tensor]:
    device = input_device(model)
    counts = [len(question.choices) for question in batch]
    answers = [answer for question in batch for answer in question.choices]
    lengths = torch.tensor([len(answer) for answer in answers])
    longest = int(lengths.max())
    # Padding stands after the answers, where causal attention cannot see it; its score is masked below.
    targets = torch.tensor([(*answer, *[answer[-1]] * (longest - len(answer))) for answer in answers], device=device)
    owners = torch.repeat_interleave(torch.arange(len(batch)), torch.tensor(counts)).to(device)

    prompts = torch.tensor([question.prompt for question in batch], device=device)
    outputs = model(input_ids=prompts, use_cache=longest > 1, logits_to_keep=1)
    logits = outputs.logits[:, -1:][owners]
    if longest > 1:
        name = cache_name(model)
        cache = getattr(outputs, name, None)
        if cache is None:
            raise ValueError(
                f"{type(model).__name__} keeps no key-value cache, which scoring of questions needs; leave them out."
            )
        cache.batch_select_indices(owners)
        rest = model(input_ids=targets[:, :-1], use_cache=True, **{name: cache}).logits
        logits = torch.cat([logits, rest], dim=1)
    chosen = require_numbers(logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0]).cpu()
    sums = (chosen * (torch.arange(longest) < lengths[:, None])).sum(1)
    return sums.split(counts)

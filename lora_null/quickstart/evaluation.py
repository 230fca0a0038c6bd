"""What a causal language model knows: multiple choice by log-likelihood, and the loss on a task."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from statistics import fmean

import torch
from torch import nn
from tqdm.auto import tqdm

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


@dataclass(frozen=True)
class _Encoded:
    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    fact: Fact


def score_facts(
    model: nn.Module, tokenizer, facts: Sequence[Fact], *, batch_size: int = 16, progress: bool = True
) -> Knowledge:
    """Answer multiple-choice questions without generating: each choice is scored after the same prompt.

    The prompt is run once per question and its key-value cache is repeated for the choices. Questions are
    batched by exact prompt length, so no position is ever padded before an answer.
    """
    encoded = sorted((_encode(tokenizer, fact) for fact in facts), key=lambda item: len(item.prompt))
    scores: list[tuple[Fact, torch.Tensor]] = []  # log-likelihood of each choice
    was_training = model.training
    model.eval()
    try:
        with torch.inference_mode(), tqdm(total=len(facts), desc="held-out facts", disable=not progress) as bar:
            for _, same_length in groupby(encoded, key=lambda item: len(item.prompt)):
                group = list(same_length)
                for start in range(0, len(group), batch_size):
                    batch = group[start : start + batch_size]
                    scores.extend(_score_batch(model, batch))
                    bar.update(len(batch))
    finally:
        model.train(was_training)

    right: dict[str, list[bool]] = {}
    likelihoods = []
    for fact, likelihood in scores:
        truth = fact.choices.index(fact.answer)
        right.setdefault(fact.kind, []).append(int(likelihood.argmax()) == truth)
        likelihoods.append(float(likelihood[truth]))
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
    was_training = model.training
    model.eval()
    starts = range(0, len(examples), batch_size)
    try:
        with torch.inference_mode():
            for start in tqdm(starts, desc="task loss", disable=not progress):
                batch = {key: value.to(device) for key, value in collate(examples[start : start + batch_size]).items()}
                labels = batch.pop("labels")[:, 1:]
                logits = model(**batch).logits[:, :-1].float()
                counted = int((labels != -100).sum())
                total += float(nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="sum"))
                count += counted
    finally:
        model.train(was_training)
    return total / count


def _encode(tokenizer, fact: Fact) -> _Encoded:
    prompt = tuple(tokenizer(fact.prompt)["input_ids"])
    choices = []
    for choice in fact.choices:
        whole = tuple(tokenizer(f"{fact.prompt} {choice}")["input_ids"])
        if whole[: len(prompt)] != prompt or len(whole) == len(prompt):
            raise ValueError(
                f"the tokenizer splits {fact.prompt!r} differently when {choice!r} follows, so the answer has no "
                "tokens of its own. Expected a tokenizer that adds no end token by itself; set add_eos_token=False."
            )
        choices.append(whole[len(prompt) :])
    return _Encoded(prompt, tuple(choices), fact)


def _score_batch(model: nn.Module, batch: list[_Encoded]) -> list[tuple[Fact, torch.Tensor]]:
    device = next(model.parameters()).device
    n_choices = len(batch[0].choices)
    answers = [answer for item in batch for answer in item.choices]
    lengths = torch.tensor([len(answer) for answer in answers])
    longest = int(lengths.max())
    # Padding stands after the answers, where causal attention cannot see it; its score is masked below.
    targets = torch.tensor([(*answer, *[answer[-1]] * (longest - len(answer))) for answer in answers], device=device)

    prompts = torch.tensor([item.prompt for item in batch], device=device)
    outputs = model(input_ids=prompts, use_cache=True, logits_to_keep=1)
    first = outputs.logits[:, -1:].repeat_interleave(n_choices, dim=0)
    logits = first
    if longest > 1:
        cache = outputs.past_key_values
        cache.batch_repeat_interleave(n_choices)
        rest = model(input_ids=targets[:, :-1], past_key_values=cache, use_cache=True).logits
        logits = torch.cat([first, rest], dim=1)
    log_probabilities = logits.float().log_softmax(-1).gather(-1, targets[..., None])[..., 0].cpu()
    counts = torch.arange(longest) < lengths[:, None]
    sums = (log_probabilities * counts).sum(1).view(-1, n_choices)
    return [(item.fact, sums[i]) for i, item in enumerate(batch)]

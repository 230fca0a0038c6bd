"""A question with all its choices in one row: each choice sees the prompt and itself, as if it stood alone."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lora_null.bayes.likelihood import logits_of
from lora_null.evaluation.questions import EncodedQuestion
from lora_null.quickstart.training import IGNORED, Example


@dataclass(frozen=True)
class Packed:
    """Tokens of one row, and what is predicted in it.

    Attributes:
        ids: Tokens.
        positions: Of each token in its own text.
        choice: Of each token the number of its choice, -1 in the prompt.
        targets: ``(token that predicts, choice that it counts for, id that is predicted)``.
        states: What goes in instead of the tokens' embeddings, ``(tokens, d)``.
    """

    ids: tuple[int, ...]
    positions: tuple[int, ...]
    choice: tuple[int, ...]
    targets: tuple[tuple[int, int, int], ...]
    states: Tensor | None = None

    def after(self, states: Tensor) -> Packed:
        """Return the row as the layers above see it."""
        return replace(self, states=states)


def packed_question(question: EncodedQuestion) -> Packed:
    """Put the choices one after the other behind the prompt."""
    length = len(question.prompt)
    ids, positions, choice = [*question.prompt], [*range(length)], [-1] * length
    targets = []
    for number, answer in enumerate(question.choices):
        for index, token in enumerate(answer):
            targets.append((length - 1 if index == 0 else len(ids) - 1, number, token))
            ids.append(token)
            positions.append(length + index)
            choice.append(number)
    return Packed(tuple(ids), tuple(positions), tuple(choice), tuple(targets))


def packed_example(example: Example) -> Packed:
    """Return a training example as a row with one choice."""
    ids, labels = example["input_ids"], example["labels"]
    targets = tuple((i - 1, 0, label) for i, label in enumerate(labels) if label != IGNORED)
    return Packed(tuple(ids), tuple(range(len(ids))), (-1,) * len(ids), targets)


def collate(rows: Sequence[Packed], *, labels: bool = False) -> dict[str, Tensor]:
    """Return inputs of the model, padded on the right; with ``labels``, for rows without choices, as trainers do."""
    length = max(len(row.ids) for row in rows)
    positions = torch.zeros(len(rows), length, dtype=torch.long)
    choice = torch.full((len(rows), length), -2)  # padding sees itself
    for i, row in enumerate(rows):
        positions[i, : len(row.ids)], choice[i, : len(row.ids)] = torch.tensor(row.positions), torch.tensor(row.choice)
    inputs: dict[str, Tensor] = {}
    first = rows[0].states
    if first is None:
        padded = [[*row.ids, *[0] * (length - len(row.ids))] for row in rows]
        inputs["input_ids"] = torch.tensor(padded)
    else:
        inputs["inputs_embeds"] = torch.zeros(len(rows), length, first.shape[1])
        for i, row in enumerate(rows):
            assert row.states is not None
            inputs["inputs_embeds"][i, : len(row.ids)] = row.states
    if labels:
        inputs["attention_mask"] = (choice > -2).long()
        inputs["labels"] = torch.full((len(rows), length), IGNORED)
        for i, row in enumerate(rows):
            for token, _, target in row.targets:
                inputs["labels"][i, token + 1] = target
        return inputs
    causal = torch.ones(length, length, dtype=torch.bool).tril()
    seen = (choice[:, :, None] == choice[:, None, :]) | ((choice == -1)[:, None, :] & (choice != -2)[:, :, None])
    return {**inputs, "attention_mask": (causal & seen)[:, None], "position_ids": positions}


def log_likelihoods(model: Any, rows: Sequence[Packed]) -> Tensor:
    """Return the log-likelihood of every choice, ``(rows, choices)`` fp32, in nats; the head runs where it counts."""
    whole = model.get_base_model() if hasattr(model, "get_base_model") else model
    states = whole.model(**collate(rows), use_cache=False).last_hidden_state
    places = [(i, *target) for i, row in enumerate(rows) for target in row.targets]
    row, token, choice, target = torch.tensor(places).T
    log_p = logits_of(whole.lm_head(states[row, token])).float().log_softmax(-1).gather(-1, target[:, None])[:, 0]
    choices = int(choice.max()) + 1
    return torch.zeros(len(rows) * choices).index_add(0, row * choices + choice, log_p).view(len(rows), choices)

"""Multiple-choice questions: read, checked, and split into a prompt and the tokens of each choice."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..calibration.sources import read_json_lines
from .documents import encode_pair


@dataclass(frozen=True)
class Question:
    """One question.

    Attributes:
        question: The prompt, word for word.
        choices: The answers to choose from, all different. Each follows the prompt after one space.
        answer: The right one of them.
        kind: A group whose figures are also given apart; empty for none.
    """

    question: str
    choices: tuple[str, ...]
    answer: str
    kind: str = ""


@dataclass(frozen=True)
class EncodedQuestion:
    """A question as tokens.

    Attributes:
        prompt: ``question``.
        choices: The tokens of each choice, without the prompt.
        right: Index of the right choice.
    """

    prompt: tuple[int, ...]
    choices: tuple[tuple[int, ...], ...]
    right: int


def read_questions(questions: str | os.PathLike | Sequence[Question | Mapping[str, Any]]) -> list[Question]:
    """Return the questions of a .jsonl file or a list, checked.

    Each entry has ``question``, ``choices`` and ``answer``, one of the choices or its index from 0, and may have
    ``kind``.

    Raises:
        FileNotFoundError: No such file.
        ValueError: An entry is incomplete, or its answer is not among its choices; the message says which.
    """
    if isinstance(questions, str | os.PathLike):
        path, expected = Path(questions), "a .jsonl file with one question per line"
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not a file; expected {expected}.")
        questions = [entry for _, entry in read_json_lines(path, expected, "one question per line")]
    if not len(questions):
        raise ValueError("questions is empty; expected at least one question.")
    return [
        entry if isinstance(entry, Question) else _question(entry, number)
        for number, entry in enumerate(questions, start=1)
    ]


def encode(tokenizer: Any, question: Question) -> EncodedQuestion:
    """Split a question into tokens.

    Raises:
        ValueError: The tokenizer splits the prompt differently when a choice follows.
    """
    prompt = question.question.rstrip()
    gap = question.question[len(prompt) :] or " "
    choices, start = [], 0
    for choice in question.choices:
        whole, start = encode_pair(tokenizer, prompt, gap + choice)
        choices.append(whole[start:])
    return EncodedQuestion(whole[:start], tuple(choices), question.choices.index(question.answer))


def _question(entry: Any, number: int) -> Question:
    if not isinstance(entry, Mapping) or not {"question", "choices", "answer"} <= entry.keys():
        found = sorted(entry) if isinstance(entry, Mapping) else f"a {type(entry).__name__}"
        raise ValueError(f"Question {number} has {found}; expected question, choices and answer, and perhaps kind.")
    text, choices, answer = entry["question"], entry["choices"], entry["answer"]
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"Question {number} is {text!r}; expected a text that the choices can follow.")
    if isinstance(choices, str) or not all(isinstance(choice, str) and choice.strip() for choice in choices):
        raise ValueError(
            f"Question {number} has the choices {choices!r}; expected a list of texts, none of them empty."
        )
    if len(set(choices)) < max(2, len(choices)):
        raise ValueError(f"Question {number} has the choices {choices!r}; expected at least two, all different.")
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        answer = choices[answer]
    if answer not in choices:
        raise ValueError(
            f"Question {number}: the answer {answer!r} is not among the choices {list(choices)!r}; expected one of "
            "them, word for word, or its index from 0."
        )
    return Question(text, tuple(choices), answer, str(entry.get("kind") or ""))

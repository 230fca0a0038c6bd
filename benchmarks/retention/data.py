"""What the study teaches, what should be kept, and what is asked: never the same questions."""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from lora_null.calibration.sources import read_json_lines
from lora_null.calibration.texts import token_batches
from lora_null.evaluation.documents import Document, encode_pair
from lora_null.evaluation.questions import EncodedQuestion, Question, encode
from lora_null.quickstart.facts import Fact, country_facts
from lora_null.quickstart.problems import word_problems
from lora_null.quickstart.training import IGNORED, Example

# The same facts in other words than :data:`lora_null.quickstart.facts.QUESTIONS`, which the calibration reads.
REWORDED = {
    "capital": ("Name the city from which {} is governed.", "That city is"),
    "currency": ("What money do people pay with in {}?", "They pay with the"),
    "continent": ("Which part of the world does {} belong to?", "It belongs to"),
    "domain": ("How do the addresses of web sites from {} end?", "They end in"),
    "phone": ("Which number do you dial first to call someone in {}?", "You dial"),
    "city": ("Where in the world would you look for the city of {}?", "You would look for it in"),
}
_TEST_SEED = "held out"


@dataclass(frozen=True)
class Pair:
    """A prompt, and what should follow it."""

    prompt: str
    completion: str

    @property
    def question(self) -> str:
        """The prompt without its form."""
        return self.prompt.removeprefix("Question: ").removesuffix("\nAnswer:")

    @property
    def text(self) -> str:
        """Both, as the calibration reads them."""
        return self.prompt + self.completion


@dataclass(frozen=True)
class Data:
    """Everything that one model is trained with and judged by.

    Attributes:
        calibration: Padded batches of the text to be kept: facts, and questions with their answers.
        bare: The same questions without facts and answers, as the published calibration has them; empty without a file.
        facts: Held-out country facts, reworded.
        facts_same: The same facts in the words of the calibration.
        knowledge: Held-out questions of the knowledge file with their answers; empty without a file.
        task: Held-out examples of the task.
        train: All examples that training may draw from.
        names: Of the files, with the first digits of their SHA-256.
    """

    calibration: list[dict[str, Tensor]]
    bare: list[dict[str, Tensor]]
    facts: list[EncodedQuestion]
    facts_same: list[EncodedQuestion]
    knowledge: list[Document]
    task: list[Document]
    train: list[Example]
    names: dict[str, str]


def gather(
    tokenizer: Any, knowledge: Path | None, task: Path | None, *, items: int, tasks: int, train: int, longest: int
) -> Data:
    """Read and split everything.

    Args:
        tokenizer: Of the model.
        knowledge: A ``.jsonl`` file of ``question`` and ``answer`` (a text, or a list whose first counts).
        task: Likewise, with worked answers; None takes generated word problems.
        items: Facts, and questions of ``knowledge``, that are asked.
        tasks: Held-out examples that measure the task loss.
        train: Training examples at most.
        longest: Task examples of more tokens are left out.

    Raises:
        ValueError: A file is no such file, or too few examples are short enough.
    """
    known, held_out = country_facts()
    _, reworded = country_facts(wording=REWORDED)
    asked = [index * len(held_out) // items for index in range(items)]
    pairs = [] if knowledge is None else read_pairs(knowledge)
    learn, ask = (split(pairs, half) for half in (0, 1))
    texts = [fact.text for fact in known] + [pair.text for pair in learn]
    if task is None:
        lessons = [Pair(p.prompt, p.completion) for p in word_problems(train)]
        tests = [Pair(p.prompt, p.completion) for p in word_problems(tasks, seed=_TEST_SEED)]
    else:
        whole = read_pairs(task)
        lessons, tests = (split(whole, half) for half in (0, 1))
    examples = [encode_example(tokenizer, pair) for pair in lessons]
    held = [Document(*encode_pair(tokenizer, pair.prompt, pair.completion)) for pair in tests]
    examples = [example for example in examples if len(example["input_ids"]) <= longest][:train]
    held = [document for document in held if len(document.ids) <= longest][:tasks]
    if not held or len(examples) < train:
        raise ValueError(
            f"{len(examples)} training and {len(held)} held-out examples have at most {longest} tokens; expected "
            f"{train} and {tasks}. Give a longer --task file, or one of shorter examples."
        )
    return Data(
        calibration=token_batches(tokenizer, texts, batch_size=32),
        bare=token_batches(tokenizer, [pair.question for pair in learn], batch_size=32) if learn else [],
        facts=[_question(tokenizer, reworded[index]) for index in asked],
        facts_same=[_question(tokenizer, held_out[index]) for index in asked],
        knowledge=[Document(*encode_pair(tokenizer, pair.prompt, pair.completion)) for pair in ask[:items]],
        task=held,
        train=examples,
        names={"knowledge": name_of(knowledge), "task": name_of(task)},
    )


def read_pairs(path: Path) -> list[Pair]:
    """Read questions with answers; a worked answer loses its calculator marks and ends in a sentence."""
    pairs = []
    for number, entry in read_json_lines(path, "a .jsonl file of questions and answers", "one object per line"):
        answer = entry.get("answer") if isinstance(entry, dict) else None
        answer = answer[0] if isinstance(answer, list) and answer else answer
        if not isinstance(answer, str) or not isinstance(entry.get("question"), str):
            raise ValueError(f"{path}, line {number} has no question with an answer; expected both, as texts.")
        answer = re.sub(r"<<.*?>>", "", answer).replace("\n#### ", " The answer is ")
        answer = " ".join(answer.split())
        pairs.append(Pair(f"Question: {entry['question'].strip()}\nAnswer:", f" {answer}"))
    return pairs


def split(pairs: list[Pair], half: int) -> list[Pair]:
    """Return one half of the questions, chosen by a hash of their words: the same on every machine, in any order."""
    return [pair for pair in pairs if hashlib.sha256(pair.prompt.lower().encode()).digest()[0] % 2 == half]


def encode_example(tokenizer: Any, pair: Pair) -> Example:
    """Return a pair as a training example: the completion and the end are labels."""
    ids, start = encode_pair(tokenizer, pair.prompt, pair.completion)
    labels = [IGNORED] * start + [*ids[start:], tokenizer.eos_token_id]
    return {"input_ids": [*ids, tokenizer.eos_token_id], "labels": labels}


def _question(tokenizer: Any, fact: Fact) -> EncodedQuestion:
    return encode(tokenizer, Question(fact.prompt, fact.choices, fact.answer))


def name_of(path: Path | None) -> str:
    """Return the name of a file with the first digits of its SHA-256; empty for none."""
    return "" if path is None else f"{path.name} {hashlib.sha256(path.read_bytes()).hexdigest()[:12]}"

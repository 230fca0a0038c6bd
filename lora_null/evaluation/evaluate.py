"""What a model still knows after fine-tuning, measured beside the model that it was."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..calibration.texts import check_sizes
from ..models.arguments import takes
from ..models.modes import evaluating
from .choices import Answers, score_choices
from .compare import compare
from .documents import Document, Text, read_documents, tokenise
from .harness import run_tasks
from .intervals import Paired, estimates, paired, paired_sizes
from .pretrained import pretrained, require_comparable
from .questions import EncodedQuestion, Question, encode, read_questions
from .results import Evaluation, QuestionResult, TextResult


@takes(model=nn.Module)
def evaluate(
    model: nn.Module,
    tokenizer: Any,
    *,
    keep: str | os.PathLike | Sequence[Text] | None = None,
    task: str | os.PathLike | Sequence[Text] | None = None,
    questions: str | os.PathLike | Sequence[Question | Mapping[str, Any]] | None = None,
    lm_eval_tasks: Sequence[Any] = (),
    base: nn.Module | None = None,
    batch_size: int = 16,
    sequence_length: int = 512,
    resamples: int = 2000,
    seed: int = 0,
    progress: bool = True,
) -> Evaluation:
    """Measure a tuned model beside the pre-trained one, with 95 % intervals by a bootstrap over documents.

    The pre-trained model is ``model`` with its adapters off, so that no second copy is in memory: adapters of this
    package in both modes, PEFT's, and PEFT's on a base that this package shifted. Texts run through both models batch
    by batch; memory is bounded whatever the vocabulary.

    Args:
        model: With an adapter, or any model if ``base`` is given. Its modes and its adapters are left as they were.
        tokenizer: Of the model.
        keep: Text that the model should not forget: a file or a list of documents.
        task: Text of the task: likewise. Entries may also be mappings of ``prompt`` and ``completion``, of which the
            completion alone is scored.
        questions: A ``.jsonl`` file or a list of mappings with ``question``, ``choices``, ``answer`` (one of the
            choices, or its index) and perhaps ``kind``. Each choice is scored after the question and a space.
        lm_eval_tasks: Tasks of lm-evaluation-harness, as its ``simple_evaluate`` takes them.
        base: The pre-trained model, for a merged or fully fine-tuned ``model``.
        batch_size: Sequences per forward pass, fewer where their logits would not fit.
        sequence_length: Longer documents are read in windows, each token predicted once.
        resamples: Of the bootstrap.
        seed: Of the bootstrap.
        progress: Show progress bars.

    Returns:
        An :class:`lora_null.evaluation.Evaluation`. Its ``keep.kl`` is the sharpest figure and needs no labels;
        ``keep.cross_entropy.change``, also ``forgetting``, is the one of PEFT's benchmark.

    Raises:
        FileNotFoundError: A file is missing.
        ImportError: Harness tasks are asked for and lm-evaluation-harness is not installed.
        TypeError: A text is no text.
        ValueError: There is nothing to compare with or on, an input is empty or contradicts itself, the tokenizer
            does not fit, or a model's outputs are not finite.
    """
    check_sizes(batch_size=batch_size, sequence_length=sequence_length - 1, resamples=resamples)
    require_comparable(model, base)
    if keep is None and task is None and questions is None and not lm_eval_tasks:
        raise ValueError("There is nothing to evaluate; expected at least one of keep, task, questions, lm_eval_tasks.")
    texts = {
        name: tokenise(name, tokenizer, read_documents(name, given))
        for name, given in (("keep", keep), ("task", task))
        if given is not None
    }
    asked = read_questions(questions) if questions is not None else []
    encoded = [encode(tokenizer, question) for question in asked]
    _require_known(model, [document.ids for documents in texts.values() for document in documents])
    _require_known(model, [question.prompt + sum(question.choices, ()) for question in encoded])
    run = _Run(model, base, batch_size, sequence_length, {"resamples": resamples, "seed": seed}, progress)
    with ExitStack() as stack:
        for each in (model, base):
            if each is not None:
                stack.enter_context(evaluating(each))
        measured = {name: run.text(name, documents) for name, documents in texts.items()}
        answered = run.questions(asked, encoded) if asked else None
        harness = run_tasks(model, base, tokenizer, lm_eval_tasks, batch_size, run.resampling) if lm_eval_tasks else {}
    settings = {"sequence_length": sequence_length, **run.resampling}
    return Evaluation(measured.get("keep"), measured.get("task"), answered, harness, settings)


@dataclass(frozen=True)
class _Run:
    """Both models, and how they are measured."""

    model: nn.Module
    base: nn.Module | None
    batch_size: int
    sequence_length: int
    resampling: dict[str, int]
    progress: bool

    def text(self, name: str, documents: list[Document]) -> TextResult:
        sums = compare(
            self.model,
            self.base,
            documents,
            sequence_length=self.sequence_length,
            batch_size=self.batch_size,
            description=name,
            progress=self.progress,
        )
        # A document of one token predicts nothing and is no unit of the bootstrap.
        sums = {key: column[sums["tokens"] > 0] for key, column in sums.items()}
        tokens = sums["tokens"]
        both = estimates({key: sums[key] for key in ("kl", "agreement")}, tokens, **self.resampling)
        cross_entropy = paired(sums["before"], sums["after"], tokens, **self.resampling)
        return TextResult(len(tokens), int(tokens.sum()), cross_entropy, both["kl"], both["agreement"])

    def questions(self, asked: list[Question], encoded: list[EncodedQuestion]) -> QuestionResult:
        with pretrained(self.model, self.base) as before:
            first = self._answers(before, encoded, "questions, before")
        both = first, self._answers(self.model, encoded, "questions, after")
        kinds = sorted({question.kind for question in asked} - {""})
        members = {kind: [index for index, question in enumerate(asked) if question.kind == kind] for kind in kinds}
        by_kind = {kind: self._of(*(each.only(chosen) for each in both)) for kind, chosen in members.items()}
        return replace(self._of(*both), by_kind=by_kind)

    def _answers(self, model: nn.Module, encoded: list[EncodedQuestion], description: str) -> Answers:
        scores = score_choices(
            model, encoded, batch_size=self.batch_size, description=description, progress=self.progress
        )
        return Answers.of(scores, [question.right for question in encoded])

    def _of(self, before: Answers, after: Answers) -> QuestionResult:
        ones = torch.ones(len(before.labels))

        def means(of: Callable[[Answers], Tensor]) -> Paired:
            return paired(of(before), of(after), ones, **self.resampling)

        return QuestionResult(
            len(ones),
            accuracy=means(Answers.accuracy),
            log_likelihood=means(Answers.log_likelihood),
            nll=means(Answers.nll),
            ece=paired_sizes(before.gaps(), after.gaps(), **self.resampling),
            brier=means(Answers.brier),
            reliability={"before": before.reliability(), "after": after.reliability()},
        )


def _require_known(model: nn.Module, sequences: list[tuple[int, ...]]) -> None:
    try:
        known = model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]
    except (AttributeError, NotImplementedError):
        return
    largest = max((max(ids, default=0) for ids in sequences), default=0)
    if largest >= known:
        raise ValueError(
            f"The tokenizer gives the token {largest}, but the model knows {known} tokens. It belongs to another "
            "model; load the one saved with this model."
        )

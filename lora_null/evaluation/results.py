"""What an evaluation finds, as plain frozen values."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from .intervals import Estimate, Paired


@dataclass(frozen=True)
class TextResult:
    """Both models on the same text; every figure is a mean over its tokens.

    Attributes:
        documents: Number of documents, the unit of the intervals.
        tokens: Number of tokens predicted.
        cross_entropy: In nats per token. Its ``change`` on text to be kept is what PEFT's benchmark calls forgetting.
        kl: Divergence of the tuned from the pre-trained next-token distribution in nats, ``sum p ln(p / q)`` with ``p``
            the pre-trained one: 0 where nothing changed, and blind to what the text says next.
        agreement: Share of the positions where both find the same token most likely.
    """

    documents: int
    tokens: int
    cross_entropy: Paired
    kl: Estimate
    agreement: Estimate


@dataclass(frozen=True)
class QuestionResult:
    """Both models on the same multiple-choice questions.

    Attributes:
        questions: Number of questions.
        accuracy: Share of the questions whose right answer has the highest log-likelihood.
        log_likelihood: Mean of the right answer's log-likelihood, in nats per answer.
        by_kind: The same for each kind of question, in alphabetical order; empty where none has a kind.
    """

    questions: int
    accuracy: Paired
    log_likelihood: Paired
    by_kind: dict[str, QuestionResult] = field(default_factory=dict)


@dataclass(frozen=True)
class Evaluation:
    """The result of :func:`lora_null.evaluate`; what was not asked for is None or empty.

    Attributes:
        keep: On text to be kept.
        task: On the task's text.
        questions: On questions.
        lm_eval: Task of the evaluation harness to measure to its figures.
        settings: What the figures depend on besides models and data.
    """

    keep: TextResult | None = None
    task: TextResult | None = None
    questions: QuestionResult | None = None
    lm_eval: dict[str, dict[str, Paired]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def forgetting(self) -> float | None:
        """Change of the cross-entropy on the text to be kept, in nats per token; None without such text."""
        return None if self.keep is None else self.keep.cross_entropy.change.value

    def to_dict(self) -> dict[str, Any]:
        """Return plain values that JSON can hold, nested as the attributes are."""
        return asdict(self)

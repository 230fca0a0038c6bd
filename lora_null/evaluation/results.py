"""What an evaluation finds, as plain frozen values."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, is_dataclass
from types import NoneType, UnionType
from typing import Any, get_args, get_origin, get_type_hints

from .intervals import Estimate, Paired
from .metrics import Bin


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
        nll: Mean of ``-ln p`` of the right choice, with ``p`` the likelihoods of the choices over their sum, in nats.
        ece: Expected calibration error of ``p`` in 15 bins: the mean distance between the largest ``p`` and how often
            it is right. Of few questions it is too large; the intervals allow for that.
        brier: Mean over the questions of ``sum (p - [choice right])^2`` over the choices, from 0 to 2.
        reliability: ``"before"`` and ``"after"`` to the bins behind ``ece`` that hold questions.
        by_kind: The same for each kind of question, in alphabetical order; empty where none has a kind.
    """

    questions: int
    accuracy: Paired
    log_likelihood: Paired
    nll: Paired
    ece: Paired
    brier: Paired
    reliability: dict[str, list[Bin]]
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

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], source: str) -> Evaluation:
        """Build from :meth:`to_dict`, without trust; ``source`` is where errors say that the values come from.

        Raises:
            ValueError: The values are no evaluation of this version.
        """
        try:
            return _built(cls, values)
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"{source} holds no evaluation of this version of lora_null ({error}); expected what lora-null eval "
                "--json prints. Run it again."
            ) from error


def rows_of(found: Evaluation) -> list[tuple[str, str, str, str]]:
    """Return measure, before, after and change with its interval; what compares both by itself stands as the change."""
    rows: dict[str, Paired | Estimate] = {}
    for name, text in (("keep", found.keep), ("task", found.task)):
        if text is not None:
            rows |= {f"{name}: cross-entropy": text.cross_entropy}
            rows |= {f"{name}: KL": text.kl, f"{name}: top-1 agreement": text.agreement}
    if found.questions is not None:
        kinds = {"questions": found.questions}
        kinds |= {f"questions, {kind}": each for kind, each in found.questions.by_kind.items()}
        for name, each in kinds.items():
            rows |= {f"{name}: accuracy": each.accuracy, f"{name}: log-likelihood": each.log_likelihood}
            rows |= {f"{name}: NLL": each.nll, f"{name}: ECE": each.ece, f"{name}: Brier score": each.brier}
    rows |= {f"{task}: {key}": pair for task, figures in found.lm_eval.items() for key, pair in figures.items()}
    return [
        (name, f"{value.before.value:.4g}", f"{value.after.value:.4g}", str(value.change))
        if isinstance(value, Paired)
        else (name, "", "", str(value))
        for name, value in rows.items()
    ]


def _built(kind: Any, values: Any) -> Any:
    """Return ``values`` as a ``kind``: a dataclass of this page, a list or mapping of such, one of them or None."""
    if get_origin(kind) is UnionType:
        if values is None and NoneType in get_args(kind):
            return None
        (kind,) = (each for each in get_args(kind) if each is not NoneType)
    if isinstance(kind, type) and is_dataclass(kind):
        hints = get_type_hints(kind)
        if not isinstance(values, Mapping) or not values.keys() <= hints.keys():
            raise ValueError(f"a {type(values).__name__} is no {getattr(kind, '__name__', kind)}")
        return kind(**{name: _built(hints[name], value) for name, value in values.items()})
    if get_origin(kind) is dict:
        return {str(name): _built(get_args(kind)[1], value) for name, value in values.items()}
    if get_origin(kind) is list:
        return [_built(get_args(kind)[0], value) for value in values]
    if kind is Any:
        return values
    if kind is float and type(values) is int:
        values = float(values)
    if type(values) is not kind:
        raise ValueError(f"{values!r} is no {kind.__name__}")
    return values

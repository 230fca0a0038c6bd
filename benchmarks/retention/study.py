"""One run: a method, a learning rate and a seed, judged at several steps."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

import lora_null
from lora_null.calibration import own_text
from lora_null.evaluation.choices import score_choices
from lora_null.evaluation.compare import compare, log_probabilities, logits_of
from lora_null.evaluation.documents import Document, batches, padded, windows
from lora_null.evaluation.questions import EncodedQuestion
from lora_null.models.loading import load_tokenizer, load_weights
from lora_null.models.modes import evaluating
from lora_null.models.settings import Loading
from lora_null.quickstart.training import Example, fine_tune, pad_batch

from .. import environment
from . import data
from .methods import Start
from .registry import METHODS

BEFORE = "before"
# Of 48 tokens: 12,288, about as many as the questions have with their answers.
CALIBRATION_DOCUMENTS = 256


@dataclass(frozen=True)
class Sizes:
    """What all runs of a study have in common.

    Attributes:
        r: Rank.
        steps: Optimiser steps, at a constant learning rate after a warm-up: every stop is the end of a shorter run.
        stops: Steps after which the model is judged.
        batch_size: Examples per step.
        longest: Task examples of more tokens are left out.
        items: Questions of each kind that are asked.
        tasks: Held-out task examples.
        documents: Documents of the model's own.
        document_tokens: Tokens of each.
    """

    r: int = 32
    steps: int = 32
    stops: tuple[int, ...] = (8, 16, 32)
    batch_size: int = 4
    longest: int = 128
    items: int = 60
    tasks: int = 20
    documents: int = 16
    document_tokens: int = 48


@dataclass(frozen=True)
class Run:
    """What tells one run from the others of the same study."""

    model: str
    task: str
    method: str
    learning_rate: float
    seed: int


class Remembered(nn.Module):
    """The pre-trained model on texts that come again and again: each is run once and its logits are kept."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model
        self.logits: dict[tuple, Tensor] = {}

    def forward(self, input_ids: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        """Answer as the model does."""
        key = (tuple(input_ids.shape), input_ids.numpy().tobytes(), attention_mask.numpy().tobytes())
        if key not in self.logits:
            self.logits[key] = self.model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).logits
        return SimpleNamespace(logits=self.logits[key])


class Bench:
    """One model with its data, and what all runs on it share; what takes long is kept in ``cache``."""

    def __init__(
        self, name: str, path: str, task: str, files: tuple[Path | None, Path | None], sizes: Sizes, cache: Path
    ):
        self.name, self.path, self.task, self.sizes = name, path, task, sizes
        self.tokenizer = load_tokenizer(path)
        knowledge, lessons = files
        self.data = data.gather(
            self.tokenizer,
            knowledge,
            lessons if task != "problems" else None,
            items=sizes.items,
            tasks=sizes.tasks,
            train=8 * sizes.steps * sizes.batch_size,
            longest=sizes.longest,
        )
        self.cache = cache / f"{name}-{self.data.names['knowledge'][-12:] or 'facts'}"
        self.cache.mkdir(parents=True, exist_ok=True)
        base = self.fresh()
        self.keep = self._own(base, sizes.documents, seed=0)
        self.base = Remembered(base)

    def fresh(self) -> Any:
        """Load the model, frozen."""
        return load_weights(str(self.path), Loading("float32", "cpu")).requires_grad_(False)

    def covariances(self, text: str) -> lora_null.Covariances:
        """Calibrate on ``words``, ``bare`` or ``own`` text, on several joined by ``+``, or on a part as ``words/4``."""
        return sum((self._calibrated(part) for part in text.split("+")[1:]), self._calibrated(text.split("+")[0]))

    def _calibrated(self, text: str) -> lora_null.Covariances:
        path = self.cache / (
            "calibration.safetensors" if text == "words" else f"calibration-{text.replace('/', '-of-')}.safetensors"
        )
        if not path.exists():
            config = lora_null.LoraNullConfig(r=self.sizes.r)
            batches = {"words": lambda: self.data.calibration, "bare": lambda: self.data.bare, "own": self._own_batches}
            name, _, part = text.partition("/")
            chosen = batches[name]()[:: int(part or 1)]
            lora_null.calibrate(self.base.model, chosen, config, progress=False).save(path)
        return lora_null.Covariances.load(path)

    def _own_batches(self) -> list[dict[str, Tensor]]:
        """Return text that the model writes for calibration: none of what it is judged by."""
        texts = torch.tensor([document.ids for document in self._own(self.base.model, CALIBRATION_DOCUMENTS, seed=1)])
        return [{"input_ids": part} for part in texts.split(32)]

    def _own(self, base: Any, count: int, seed: int) -> list[Document]:
        length = self.sizes.document_tokens
        path = self.cache / f"own-{count}-{length}.pt"
        if not path.exists():
            written = own_text(base, self.tokenizer, count * length, sequence_length=length, seed=seed, progress=False)
            torch.save([ids for batch in written for ids in batch["input_ids"].tolist()], path)
        return [Document(tuple(ids)) for ids in torch.load(path, weights_only=True)]

    def before(self) -> dict[str, Any]:
        """Return the record of the model as it comes."""
        began = time.perf_counter()
        found = self.judge(self.base.model, last=True)
        return self._record(Run(self.name, self.task, BEFORE, 0.0, 0), [{"step": 0, **found}], began)

    def run(self, run: Run) -> dict[str, Any]:
        """Train with one method; return its record, with the stops that it reached before it diverged, if it did."""
        began, method, sizes = time.perf_counter(), METHODS[run.method], self.sizes
        examples = self.lessons(run.seed)
        start = self.start(examples, run.seed, method.text)
        torch.manual_seed(run.seed)
        model = method.attach(self.fresh(), start)
        stops: list[dict[str, Any]] = []

        def after_step(step: int) -> None:
            if step in sizes.stops:
                seconds = time.perf_counter() - began
                stops.append(
                    {"step": step, "seconds": round(seconds, 1), **self.judge(model, last=step == sizes.stops[-1])}
                )

        try:
            optimizer = method.optimizer and method.optimizer(model, run.learning_rate)
            self.train(model, examples, run, after_step, optimizer=optimizer, weight_decay=method.weight_decay)
        except ValueError as error:
            if "not a number" not in str(error):
                raise
        return self._record(run, stops, began)

    def lessons(self, seed: int) -> list[Example]:
        """Return what a run with that seed learns."""
        return random.Random(seed).sample(self.data.train, self.sizes.steps * self.sizes.batch_size)

    def start(self, examples: list[Example], seed: int, text: str = "words") -> Start:
        """Return what a method may look at before training on ``examples``."""
        size = self.sizes.batch_size
        groups = [examples[i : i + size] for i in range(0, len(examples), size)][:8]
        batches = [pad_batch(group) for group in groups]
        return Start(self.sizes.r, seed, self.data.calibration, batches, self.covariances(text), self.cache)

    def train(
        self,
        model: nn.Module,
        examples: list[Example],
        run: Run,
        after_step: Callable[[int], None] | None = None,
        **arguments: Any,
    ) -> None:
        """Fine-tune, as all runs do."""
        fine_tune(
            model,
            examples,
            steps=self.sizes.steps,
            batch_size=self.sizes.batch_size,
            learning_rate=run.learning_rate,
            seed=run.seed,
            progress=False,
            after_step=after_step,
            lr_scheduler_type="constant_with_warmup",
            bf16=True,
            **arguments,
        )

    def judge(self, model: nn.Module, *, last: bool) -> dict[str, list[float]]:
        """Measure a model; one number per question, example or document.

        Returns:
            ``facts`` and, at the last stop, ``facts_same``: log-likelihood of the right answer, in nats; each with
            ``_right``: 1 where it is the likeliest; ``knowledge``: log-likelihood of the answer; ``task``:
            cross-entropy per token of the worked answer; ``kl``: mean divergence from the pre-trained model on a
            document of its own, in nats per token.
        """
        found: dict[str, Sequence[float]] = {}
        with evaluating(model), evaluating(self.base), casts_kept(model), torch.autocast("cpu", torch.bfloat16):
            for name in ("facts", "facts_same")[: 1 + last]:
                found[name], found[f"{name}_right"] = _answers(model, getattr(self.data, name))
            found["knowledge"] = [-total for total, _ in _losses(model, self.data.knowledge)]
            found["task"] = [total / count for total, count in _losses(model, self.data.task)]
            sums = compare(
                model,
                self.base,
                self.keep,
                sequence_length=self.sizes.document_tokens,
                batch_size=8,
                description="own text",
                progress=False,
            )
            found["kl"] = (sums["kl"] / sums["tokens"]).tolist()
        return {name: [float(f"{value:.5g}") for value in values] for name, values in found.items()}

    def frame(self, run: Run) -> dict[str, Any]:
        """Return the part of a record that says what it is of."""
        return {**asdict(run), "sizes": asdict(self.sizes), "data": self.data.names}

    def _record(self, run: Run, stops: list[dict[str, Any]], began: float) -> dict[str, Any]:
        return {
            **self.frame(run),
            "stops": stops,
            "seconds": round(time.perf_counter() - began, 1),
            "environment": environment.describe("cpu"),
        }


@contextmanager
def casts_kept(model: nn.Module) -> Iterator[None]:
    """Let autocast keep its copies of the weights, which it does for weights that require a gradient alone."""
    # the codes of a quantised weight are integers, which have no gradient
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters() if parameter.is_floating_point()]
    try:
        for parameter, _ in flags:
            parameter.requires_grad_(True)
        yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def _answers(model: nn.Module, questions: list[EncodedQuestion]) -> tuple[list[float], list[float]]:
    scores = score_choices(model, questions, progress=False)
    likelihoods = [float(score[question.right]) for score, question in zip(scores, questions, strict=True)]
    right = [float(score.argmax() == question.right) for score, question in zip(scores, questions, strict=True)]
    return likelihoods, right


def _losses(model: nn.Module, documents: list[Document]) -> Iterator[tuple[float, int]]:
    """Return for each document the cross-entropy of what is scored, summed, in nats, and the number of its tokens."""
    sums = torch.zeros(len(documents), 2, dtype=torch.float64)
    for batch in batches(windows(documents, 512), 8, 2**12):
        inputs, scored = padded(batch)
        rows, columns = scored.nonzero(as_tuple=True)
        chosen = log_probabilities(logits_of(model, inputs), rows, columns - 1)
        losses = -chosen.gather(1, inputs["input_ids"][rows, columns, None])
        owners = torch.tensor([window.document for window in batch])[rows]
        sums.index_add_(0, owners, torch.cat([losses, torch.ones_like(losses)], dim=1).double())
    return ((float(total), int(count)) for total, count in sums)

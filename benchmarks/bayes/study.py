"""Train on few examples, by LoRA or a trained posterior, and answer with each method's probabilities.

Only the last layers carry adapters, so that what the layers below make of every text is computed once for all runs.
"""

from __future__ import annotations

import math
import random
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from lora_null import bayes
from lora_null.evaluation.questions import EncodedQuestion, Question, encode
from lora_null.models.loading import load_tokenizer, load_weights
from lora_null.models.modes import evaluating
from lora_null.models.settings import Loading
from lora_null.quickstart.facts import CHOICES, country_facts

from .. import environment
from ..retention.data import Pair, encode_example, name_of, read_pairs, split
from ..retention.study import casts_kept
from .packed import Packed, collate, log_likelihoods, packed_example, packed_question

BEFORE, ENSEMBLE = "before", "ensemble of 3"
# A posterior that is trained, and the learning rate of its run.
TRAINED = {"Bayesian-LoRA": 5e-2, "BLoB": 3e-3}
# A Laplace approximation, and the factors that are random in it.
LINEARISED = "Laplace, A and B, linearised"
LAPLACE = {"Laplace": "b", "Laplace, A and B": "ab", LINEARISED: "ab"}
METHODS = ("LoRA", "MC dropout", "TFB", *LAPLACE, *TRAINED, ENSEMBLE)


@dataclass(frozen=True)
class Sizes:
    """What all runs of a study have in common.

    Attributes:
        layers: How many carry adapters, the last ones.
        r: Rank, with ``lora_alpha = 2 r``, in the query and value projections.
        dropout: Of the adapters' input while they train, and of MC dropout.
        learning_rate: Of LoRA.
        train: Examples that are learned from.
        epochs: Times that they are.
        batch_size: Examples per step.
        questions: Held-out questions.
        samples: Of every posterior, and of MC dropout.
        members: Of the ensemble.
    """

    layers: int = 4
    r: int = 8
    dropout: float = 0.1
    learning_rate: float = 3e-3
    train: int = 32
    epochs: int = 4
    batch_size: int = 8
    questions: int = 64
    samples: int = 4
    members: int = 3

    @property
    def steps(self) -> int:
        """Optimiser steps of a run."""
        return self.epochs * self.train // self.batch_size


@dataclass(frozen=True)
class Run:
    """What tells one record from the others of the same study."""

    model: str
    data: str
    method: str
    seed: int


class Bench:
    """One model with its questions; what is trained once and used by several methods is kept in ``cache``."""

    def __init__(self, name: str, path: str, file: Path | None, sizes: Sizes, cache: Path):
        self.name, self.path, self.sizes = name, path, sizes
        self.tokenizer = load_tokenizer(path)
        self.data = "country facts" if file is None else name_of(file)
        self.lessons, asked = _facts() if file is None else _of_file(file)
        every = [asked[index * len(asked) // sizes.questions] for index in range(sizes.questions)]
        self.asked: list[EncodedQuestion] = [encode(self.tokenizer, question) for question in every]
        self.cache = cache / "-".join([name, self.data.replace(" ", "-"), *(f"{v:g}" for v in asdict(sizes).values())])
        self._questions = self._below([packed_question(question) for question in self.asked])
        self._examples: dict[int, list[Packed]] = {}

    def run(self, run: Run) -> dict[str, Any]:
        """Return the record of one method with one seed."""
        began, facts = time.perf_counter(), {}
        if run.method == BEFORE:
            p = self.answers(self._fresh())
        elif run.method == "LoRA":
            p = self.answers(self._member(run.seed, 0))
        elif run.method == ENSEMBLE:
            p = torch.stack([self.answers(self._member(run.seed, i)) for i in range(self.sizes.members)]).mean(0)
        elif run.method == "MC dropout":
            p = self._dropped(self._member(run.seed, 0))
        else:
            model, posterior = self._posterior(run)
            way = posterior.linearised if run.method == LINEARISED else posterior.sample
            facts, p = posterior.facts, self._sampled(model, way)
        return {
            **self.frame(run),
            "p": [[float(f"{value:.5g}") for value in row] for row in p.tolist()],
            "right": [question.right for question in self.asked],
            "facts": {key: float(f"{value:.5g}") for key, value in facts.items()},
            "seconds": round(time.perf_counter() - began, 1),
            "environment": environment.describe("cpu"),
        }

    def frame(self, run: Run) -> dict[str, Any]:
        """Return the part of a record that says what it is of."""
        rate = TRAINED.get(run.method, self.sizes.learning_rate)
        return {**asdict(run), "learning_rate": rate, "sizes": asdict(self.sizes)}

    def answers(self, model: Any) -> Tensor:
        """Return the probability of every choice ``(questions, choices)``, fp64."""
        with evaluating(model):
            return self._probabilities(model)

    def examples(self, seed: int) -> list[Packed]:
        """Return what is learned with a seed."""
        if seed not in self._examples:
            chosen = random.Random(f"lessons {seed}").sample(self.lessons, self.sizes.train)
            self._examples[seed] = self._below(
                [packed_example(encode_example(self.tokenizer, pair)) for pair in chosen]
            )
        return self._examples[seed]

    @torch.no_grad()
    def _below(self, texts: list[Packed]) -> list[Packed]:
        """Run the layers without adapters."""
        model, found = load_weights(str(self.path), Loading("float32", "cpu")), []
        for start in range(0, len(texts), 16):
            part = texts[start : start + 16]
            inputs = collate(part)
            with torch.autocast("cpu", torch.bfloat16):
                states = model.model(**inputs, output_hidden_states=True).hidden_states[-1 - self.sizes.layers].float()
            found += [text.after(rows[: len(text.ids)].clone()) for text, rows in zip(part, states, strict=True)]
        return found

    def _fresh(self) -> Any:
        """Load the last layers."""
        model = load_weights(str(self.path), Loading("float32", "cpu")).requires_grad_(False)
        model.model.layers = model.model.layers[-self.sizes.layers :]
        for index, layer in enumerate(model.model.layers):
            layer.self_attn.layer_idx = index
        return model

    def _adapted(self, seed: int) -> Any:
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(seed)
        config = LoraConfig(
            r=self.sizes.r,
            lora_alpha=2 * self.sizes.r,
            lora_dropout=self.sizes.dropout,
            target_modules=["q_proj", "v_proj"],
            task_type="CAUSAL_LM",
        )
        return get_peft_model(self._fresh(), config)

    def _train(self, model: nn.Module, seed: int, order: int, rate: float, kl: float = 0.0) -> None:
        """AdamW without weight decay, warm-up over a tenth of the steps, cosine."""
        examples, sizes, rng = self.examples(seed), self.sizes, random.Random(order)
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=rate, weight_decay=0.0)
        warm = max(1, sizes.steps // 10)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer,
            lambda step: min((step + 1) / warm, 0.5 + 0.5 * math.cos(math.pi * step / sizes.steps)),
        )
        torch.manual_seed(order)
        model.train()
        for _ in range(sizes.epochs):
            rng.shuffle(examples := [*examples])
            for start in range(0, len(examples), sizes.batch_size):
                with torch.autocast("cpu", torch.bfloat16):
                    found = log_likelihoods(model, examples[start : start + sizes.batch_size])
                labels = sum(len(example.targets) for example in examples[start : start + sizes.batch_size])
                loss = -found.sum() / labels
                if kl:
                    loss = loss + bayes.added_loss(model, kl=kl)
                loss.backward()
                optimizer.step()
                schedule.step()
                optimizer.zero_grad()
        model.eval()

    def _member(self, seed: int, number: int) -> Any:
        """Return LoRA trained on the seed's examples, with a start and an order of its own for every number."""
        path, own = self.cache / f"lora-{seed}-{number}.safetensors", 10 * seed + number
        model = self._adapted(own)
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        if path.exists():
            with torch.no_grad():
                for name, value in load_file(path).items():
                    trained[name].copy_(value)
        else:
            self._train(model, seed, own, self.sizes.learning_rate)
            self.cache.mkdir(parents=True, exist_ok=True)
            save_file({name: p.detach() for name, p in trained.items()}, path)
        return model.eval()

    def _posterior(self, run: Run) -> tuple[Any, bayes.Posterior]:
        examples, sizes = self.examples(run.seed), self.sizes
        if run.method in ("TFB", *LAPLACE):
            model = self._member(run.seed, 0)
            batches = [collate(examples[i : i + 16], labels=True) for i in range(0, sizes.train, 16)]
            # a cache would hide the samples: it keeps the factors as they were first read
            with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
                if run.method in LAPLACE:
                    return model, bayes.laplace(model, batches, which=LAPLACE[run.method], seed=run.seed)
                return model, bayes.tfb(model, batches[:1], samples=2, steps=6, bounds=(1e-4, 0.2), seed=run.seed)
        model = self._adapted(10 * run.seed)
        if run.method == "BLoB":
            bayes.blob(model)
            kl = 1 / sum(len(example.targets) for example in examples)
        else:
            bayes.inducing(model)
            # The published 0.1 over the steps of an epoch, for its smallest set: 640 examples in batches of 6. For an
            # epoch as short as ours it would hold the mean at the start.
            kl = 0.1 * 6 / 640
        self._train(model, run.seed, 10 * run.seed, TRAINED[run.method], kl)
        return model, bayes.collect(model)

    def _sampled(self, model: Any, way: Callable[[Any, int], AbstractContextManager]) -> Tensor:
        found = []
        for seed in range(self.sizes.samples):
            with way(model, seed):
                found.append(self.answers(model))
        return torch.stack(found).mean(0)

    @torch.no_grad()
    def _dropped(self, model: Any) -> Tensor:
        torch.manual_seed(0)
        model.train()
        return torch.stack([self._probabilities(model) for _ in range(self.sizes.samples)]).mean(0)

    def _probabilities(self, model: Any) -> Tensor:
        found: list[Tensor] = []
        with casts_kept(model), torch.autocast("cpu", torch.bfloat16):
            for start in range(0, len(self._questions), 16):
                found.append(log_likelihoods(model, self._questions[start : start + 16]))
        return torch.cat(found).double().softmax(-1)


def _facts() -> tuple[list[Pair], list[Question]]:
    known, held_out = country_facts()
    asked = [Question(fact.prompt, fact.choices, fact.answer) for fact in held_out]
    return [Pair(fact.prompt, f" {fact.answer}") for fact in known], asked


def _of_file(file: Path) -> tuple[list[Pair], Sequence[Question]]:
    """Make questions with choices of questions and answers: the others are answers to other questions."""
    pairs = read_pairs(file)
    lessons, asked = (split(pairs, half) for half in (0, 1))
    pool = sorted({pair.completion.strip() for pair in asked})
    questions = []
    for pair in asked:
        right, rng = pair.completion.strip(), random.Random(pair.prompt)
        choices = [right, *rng.sample([answer for answer in pool if answer != right], CHOICES - 1)]
        rng.shuffle(choices)
        questions.append(Question(pair.prompt, tuple(choices), right))
    return lessons, questions

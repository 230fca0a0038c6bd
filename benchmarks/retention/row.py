"""Three tasks in a row: what of each is left after the last, and of what the model knew before.

Every task is one kind of fact about the same countries, asked and answered in the same form, so that the tasks read
nearly the same directions. Each is learned with an adapter of its own, which is merged before the next; accuracy is on
the facts that were learned. What the model knew is measured by facts of other kinds, about other countries.
"""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from torch import nn

import lora_null
from lora_null.calibration import own_text
from lora_null.calibration.texts import token_batches
from lora_null.evaluation.choices import score_choices
from lora_null.evaluation.compare import compare
from lora_null.evaluation.documents import Document, encode_pair
from lora_null.evaluation.questions import Question, encode
from lora_null.models.loading import load_tokenizer, load_weights
from lora_null.models.modes import evaluating
from lora_null.models.settings import Loading
from lora_null.quickstart import model as models
from lora_null.quickstart.facts import Fact, country_facts
from lora_null.quickstart.training import IGNORED, Example, fine_tune

from .. import environment, predictions, records

RESULTS = records.RESULTS / "row.jsonl"
TASKS = ("phone", "currency", "domain")


@dataclass(frozen=True)
class Sizes:
    """What all runs have in common: rank, steps and batch of each task, held-out facts, own documents, their tokens."""

    r: int = 32
    steps: int = 48
    batch_size: int = 12
    asked: int = 60
    documents: int = 16
    document_tokens: int = 48


@dataclass(frozen=True)
class Method:
    """How an adapter starts, and whether what was learned is protected from the next task.

    Attributes:
        config: Of our own adapters; None is PEFT's LoRA.
        learning_rates: The grid.
        updated: Add the covariances of a task's text after it.
    """

    config: dict[str, Any] | None
    learning_rates: tuple[float, ...]
    updated: bool = False


METHODS = {
    "Null-Basis, updated": Method({"train": "b_in_basis", "energy": 0.99}, (1e-3, 3e-3), updated=True),
    "Null-Basis, never updated": Method({"train": "b_in_basis", "energy": 0.99}, (1e-3, 3e-3)),
    "LoRA": Method(None, (1e-3, 3e-4)),
    "LoRA-Null, updated": Method({"train": "b"}, (3e-3, 1e-2), updated=True),
    "LoRA-Null, never updated": Method({"train": "b"}, (3e-3, 1e-2)),
}


class Row:
    """One model with the facts that it learns, and what it is judged by."""

    def __init__(self, path: str, sizes: Sizes):
        self.path, self.sizes, self.tokenizer = path, sizes, load_tokenizer(path)
        known, held_out = country_facts()
        self.lessons = {task: [fact for fact in known if fact.kind == task] for task in TASKS}
        others = [fact for fact in held_out if fact.kind not in TASKS]
        self.held_out = [others[i * len(others) // sizes.asked] for i in range(sizes.asked)]
        self.base = self.fresh()
        length = sizes.document_tokens
        asked, own = (
            own_text(self.base, self.tokenizer, n * length, sequence_length=length, seed=seed, progress=False)
            for seed, n in ((0, sizes.documents), (1, 128))
        )
        self.own = [Document(tuple(ids)) for batch in asked for ids in batch["input_ids"].tolist()]
        texts = [fact.text for fact in known if fact.kind not in TASKS]
        batches = [*self.batches(texts), *own]
        self.keep = lora_null.calibrate(self.base, batches, self.config({}), progress=False)

    def fresh(self) -> Any:
        """Load the model, frozen."""
        return load_weights(str(self.path), Loading("float32", "cpu")).requires_grad_(False)

    def batches(self, texts: Sequence[str]) -> list[dict]:
        """Return padded batches for the calibration."""
        return token_batches(self.tokenizer, texts, batch_size=32)

    def config(self, options: dict[str, Any], seed: int = 0) -> lora_null.LoraNullConfig:
        """Return the configuration of an adapter."""
        return lora_null.LoraNullConfig(r=self.sizes.r, seed=seed, **options)

    def run(self, name: str, learning_rate: float, seed: int) -> dict[str, Any]:
        """Learn the tasks one after the other; return the record."""
        began, method = time.perf_counter(), METHODS[name]
        model, covariances = self.fresh(), self.keep
        stops = [self.judge(model)]
        for task in TASKS:
            torch.manual_seed(seed)
            tuned, merge = self._attach(model, method, covariances, seed)
            fine_tune(
                tuned,
                self._examples(task, seed),
                steps=self.sizes.steps,
                batch_size=self.sizes.batch_size,
                learning_rate=learning_rate,
                seed=seed,
                progress=False,
                weight_decay=0.0,
                bf16=True,
            )
            model = merge(tuned).requires_grad_(False)
            if method.updated:
                texts = self.batches([fact.text for fact in self.lessons[task]])
                covariances = covariances + lora_null.calibrate(model, texts, self.config({}), progress=False)
            stops.append(self.judge(model))
        return {
            "method": name,
            "learning_rate": learning_rate,
            "seed": seed,
            "sizes": asdict(self.sizes),
            "stops": stops,
            "seconds": round(time.perf_counter() - began, 1),
            "environment": environment.describe("cpu"),
        }

    def _attach(
        self, model: Any, method: Method, covariances: lora_null.Covariances, seed: int
    ) -> tuple[nn.Module, Callable[[Any], Any]]:
        """Return the model with an adapter, and what merges it."""
        if method.config is not None:
            config = self.config(method.config, seed)
            # Those that are never updated are of the weights before the first task.
            model = lora_null.initialize(model, covariances, config, verify_base=method.updated, progress=False)
            return model, lora_null.merge
        from peft import LoraConfig, get_peft_model

        r = self.sizes.r
        config = LoraConfig(r=r, lora_alpha=r, target_modules="all-linear", task_type="CAUSAL_LM")
        return get_peft_model(model, config), lambda tuned: tuned.merge_and_unload()

    def _examples(self, task: str, seed: int) -> list[Example]:
        """Return whole passes over the facts of a task, each in an order of its own, in equal batches."""
        rng = random.Random(seed)
        order: list[Fact] = []
        while len(order) < self.sizes.steps * self.sizes.batch_size:
            order += rng.sample(self.lessons[task], len(self.lessons[task]))
        return [self._example(fact) for fact in order[: self.sizes.steps * self.sizes.batch_size]]

    def _example(self, fact: Fact) -> Example:
        ids, start = encode_pair(self.tokenizer, fact.prompt, f" {fact.answer}.")
        return {"input_ids": [*ids], "labels": [IGNORED] * start + [*ids[start:]]}

    def judge(self, model: nn.Module) -> dict[str, float]:
        """Return the accuracy on each task and on held-out facts of other kinds, and the divergence on own text."""
        with evaluating(model), torch.autocast("cpu", torch.bfloat16):
            found = {task: self._accuracy(model, facts) for task, facts in self.lessons.items()}
            found["held_out"] = self._accuracy(model, self.held_out)
        length = self.sizes.document_tokens
        with evaluating(model), torch.no_grad():
            sums = compare(
                model, self.base, self.own, sequence_length=length, batch_size=8, description="own", progress=False
            )
        found["kl"] = float((sums["kl"] / sums["tokens"]).mean())
        return {name: float(f"{value:.5g}") for name, value in found.items()}

    def _accuracy(self, model: nn.Module, facts: Sequence[Fact]) -> float:
        asked = [encode(self.tokenizer, Question(fact.prompt, fact.choices, fact.answer)) for fact in facts]
        scores = score_choices(model, asked, progress=False)
        return fmean(float(score.argmax() == question.right) for score, question in zip(scores, asked, strict=True))


def table(entries: Sequence[dict]) -> str:
    """Return, for each method at each rate, what was learned of a task at once and what is left after the last."""
    ends = [f"{task}, at the end" for task in TASKS]
    rows = [("method", "rate", "seeds", "learned at once", *ends, "facts of other kinds", "KL on its own text")]
    before, sizes, where = entries[0]["stops"][0], entries[0]["sizes"], entries[0]["environment"]
    rows.append(("before", "", "", "", *(f"{before[key]:.2f}" for key in (*TASKS, "held_out")), "0"))
    for name in METHODS:
        for rate in METHODS[name].learning_rates:
            own = [e for e in entries if (e["method"], e["learning_rate"]) == (name, rate)]
            if own:
                learned = fmean(e["stops"][n + 1][task] for e in own for n, task in enumerate(TASKS))
                last = {key: fmean(e["stops"][-1][key] for e in own) for key in before}
                figures = [f"{last[key]:.2f}" for key in (*TASKS, "held_out")]
                rows.append((name, f"{rate:g}", f"{len(own)}", f"{learned:.2f}", *figures, f"{last['kl']:.3f}"))
    return (
        f"{predictions.markdown(rows)}\n\n*SmolLM2-135M-Instruct, rank {sizes['r']}, {sizes['steps']} steps of "
        f"{sizes['batch_size']} facts for each task; accuracy among four choices, on the facts that were learned and "
        f"on {sizes['asked']} of other kinds about other countries; {where['device']}, torch {where['torch']}.*"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention.row", description=__doc__)
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rates", type=int, choices=(1, 2), default=2, help="of each grid, the first ones")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    row: Row | None = None
    for rank, seed, name in product(range(arguments.rates), range(arguments.seeds), arguments.method or METHODS):
        rate = METHODS[name].learning_rates[rank]
        known = {(e["method"], e["learning_rate"], e["seed"]) for e in records.read_runs(arguments.output)}
        if (name, rate, seed) not in known:
            row = row or Row(str(models.fetch_model(source=models.SMOLLM2)), Sizes())
            record = row.run(name, rate, seed)
            records.append(arguments.output, record)
            print(name, rate, seed, record["stops"][-1], f"{record['seconds']:.0f} s", flush=True)
    print(table(records.read_runs(arguments.output)))


if __name__ == "__main__":
    main()

"""What each way of starting an adapter keeps and learns: ``python -m benchmarks.forgetting``.

The task and the questions of the quickstart, for the methods that one would take instead of LoRA-Null. Every method
trains on the same batches with the same schedule, and is judged several times on the way: methods that learn at
different speeds can only be compared at equal task loss.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_null
from lora_null.calibration.texts import token_batches
from lora_null.models.loading import load_tokenizer
from lora_null.models.targets import target_linears
from lora_null.quickstart import run as quickstart
from lora_null.quickstart.facts import country_facts
from lora_null.quickstart.problems import word_problems
from lora_null.quickstart.settings import Settings
from lora_null.quickstart.training import encode_problems, fine_tune

from . import environment, records

RESULTS = records.RESULTS / "forgetting.jsonl"


@dataclass
class Start:
    """What a method may look at before training."""

    settings: Settings
    batches: list[dict[str, Tensor]]  # calibration text, padded
    covariances: lora_null.Covariances


def lora(model: Any, start: Start) -> nn.Module:
    """PEFT's LoRA: A random, B zero."""
    return quickstart.plain_lora(model, start.settings)


def lora_random_a_frozen(model: Any, start: Start) -> nn.Module:
    """The same with A left as it starts."""
    model = lora(model, start)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def milora(model: Any, start: Start) -> nn.Module:
    """MiLoRA (arXiv 2406.09044): the r smallest singular values of W become ``B A``, the rest the frozen base."""
    model = lora(model, start)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                weight = module.get_base_layer().weight
                U, S, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
                r = start.settings.r
                root = S[-r:].sqrt()
                B, A = U[:, -r:] * root, root[:, None] * Vt[-r:]
                module.lora_A["default"].weight.copy_(A)
                module.lora_B["default"].weight.copy_(B)
                weight.sub_(B @ A)
    return model


def mica(model: Any, start: Start) -> nn.Module:
    """PEFT's MiCA (arXiv 2604.01694): B frozen at the least singular vectors of W, A trained from zero."""
    return _peft(model, start, init_lora_weights="mica")


def corda(model: Any, start: Start) -> nn.Module:
    """PEFT's CorDA in knowledge-preserved mode (arXiv 2406.05223), on the same calibration text; needs attrs."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    @torch.no_grad()
    def run() -> None:
        for batch in start.batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])  # its hooks take one sequence at a time, without padding

    options = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm")}
    # its preparation does not know "all-linear"
    names = sorted({name.rpartition(".")[2] for name in target_linears(model)})
    preprocess_corda(model, _config(start, target_modules=names, **options), run_model=run)
    return _peft(model, start, target_modules=names, **options)


def lora_null_frozen(model: Any, start: Start) -> nn.Module:
    """LoRA-Null with A frozen, our default."""
    return _ours(model, start, freeze_a=True)


def lora_null_trained(model: Any, start: Start) -> nn.Module:
    """LoRA-Null with A and B trained."""
    return _ours(model, start, freeze_a=False)


METHODS: dict[str, Callable[[Any, Start], nn.Module]] = {
    "LoRA": lora,
    "LoRA, random A frozen": lora_random_a_frozen,
    "MiLoRA": milora,
    "MiCA": mica,
    "CorDA, knowledge-preserved": corda,
    "LoRA-Null, A trained": lora_null_trained,
    "LoRA-Null": lora_null_frozen,
}


def _config(start: Start, **options: Any) -> Any:
    from peft import LoraConfig

    r = start.settings.r
    wanted: dict[str, Any] = {"r": r, "lora_alpha": r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**wanted | options)


def _peft(model: Any, start: Start, **options: Any) -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(start.settings.seed)
    return get_peft_model(model, _config(start, **options))


def _ours(model: Any, start: Start, *, freeze_a: bool) -> nn.Module:
    config = lora_null.LoraNullConfig(r=start.settings.r, seed=start.settings.seed, freeze_a=freeze_a)
    return lora_null.initialize(model, start.covariances, config, progress=False)


def judged(name: str, model: Any, start: Start, judge: Any, tokenizer: Any, stops: list[int]) -> list[dict]:
    """Train with one method; return what it kept and learned after each number of steps in ``stops``."""
    settings, found = start.settings, []
    adapted = METHODS[name](model, start)
    problems = word_problems(settings.steps * settings.batch_size, seed=settings.seed)

    def after_step(step: int) -> None:
        if step in stops:
            outcome = judge(adapted)
            found.append(_record(name, settings, step, outcome))
            print(f"{name:28} {step:3} steps  {_figures(found[-1])}", flush=True)

    fine_tune(
        adapted,
        encode_problems(tokenizer, problems, learn_prompt=True),
        steps=settings.steps,
        batch_size=settings.batch_size,
        learning_rate=settings.learning_rate,
        seed=settings.seed,
        progress=False,
        after_step=after_step,
    )
    return found


def _record(name: str, settings: Settings, step: int, outcome: Any) -> dict:
    return {
        "method": name,
        "step": step,
        "accuracy": outcome.knowledge.accuracy,
        "log_likelihood": outcome.knowledge.log_likelihood,
        "task_loss": outcome.task_loss,
        **{key: getattr(settings, key) for key in ("seed", "r", "steps", "batch_size", "learning_rate", "questions")},
        "environment": environment.describe("cpu"),
    }


def _figures(record: dict) -> str:
    return "accuracy {accuracy:.3f}  log-likelihood {log_likelihood:.2f}  task loss {task_loss:.3f}".format(**record)


def table(entries: list[dict]) -> str:
    """Return a Markdown table: accuracy, log-likelihood and task loss by method and learning rate."""
    lines = ["| method | learning rate | seed | steps | accuracy | log-likelihood | task loss |", "|---" * 7 + "|"]
    order = ["before", *METHODS]
    for e in sorted(entries, key=lambda e: (order.index(e["method"]), -e["learning_rate"], e["seed"], e["step"])):
        rate = f"{e['learning_rate']:g}" if e["step"] else ""
        figures = f"{e['accuracy']:.3f} | {e['log_likelihood']:.2f} | {e['task_loss']:.3f}"
        lines.append(f"| {e['method']} | {rate} | {e['seed']} | {e['step']} | {figures} |")
    return "\n".join(lines)


def main() -> None:
    """Run the methods asked for, append what each gives to the results, and print the table of all results."""
    defaults = Settings()
    parser = argparse.ArgumentParser(prog="python -m benchmarks.forgetting", description=__doc__)
    parser.add_argument("--model", help="folder or name; default: the quickstart's")
    parser.add_argument("--method", action="append", choices=["before", *METHODS], help="default: all")
    parser.add_argument("--seed", type=int, default=defaults.seed)
    parser.add_argument("--steps", type=int, default=defaults.steps)
    parser.add_argument("--stops", type=int, nargs="*", default=[8, 16, 32], help="steps after which to judge")
    parser.add_argument("--learning-rate", type=float, default=defaults.learning_rate)
    parser.add_argument("--questions", type=int, default=defaults.questions)
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--table", action="store_true", help="print the table and run nothing")
    arguments = parser.parse_args()
    if not arguments.table:
        _run(arguments)
    print(table([json.loads(line) for line in arguments.output.read_text().splitlines()]))


def _run(arguments: argparse.Namespace) -> None:
    from transformers.utils import logging

    logging.disable_progress_bar()
    path = arguments.model or str(quickstart.fetch_model())
    settings = Settings(
        model=path,
        seed=arguments.seed,
        steps=arguments.steps,
        learning_rate=arguments.learning_rate,
        questions=arguments.questions,
        progress=False,
    )
    tokenizer = load_tokenizer(path)
    known, held_out = country_facts()
    asked = [held_out[index * len(held_out) // settings.questions] for index in range(settings.questions)]
    judge = quickstart.Judge(tokenizer, asked, False)

    def fresh() -> Any:
        return quickstart.load_model(path, torch.float32, "cpu")

    batches = list(token_batches(tokenizer, [fact.text for fact in known], batch_size=32))
    covariances = lora_null.calibrate(fresh(), batches, lora_null.LoraNullConfig(r=settings.r), progress=False)
    start = Start(settings, batches, covariances)
    if "before" in (arguments.method or ["before"]):
        records.append(arguments.output, _record("before", settings, 0, judge(fresh())))
    for name in [name for name in METHODS if name in (arguments.method or METHODS)]:
        for record in judged(name, fresh(), start, judge, tokenizer, arguments.stops):
            records.append(arguments.output, record)


if __name__ == "__main__":
    main()

"""Run what is missing, most valuable first, and keep each result as it is known."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from lora_null.quickstart import model as models
from lora_null.system.environment import cache_folder

from .. import records
from . import __doc__ as purpose
from .registry import CONTENDERS, METHODS
from .study import BEFORE, Bench, Run, Sizes

RESULTS = records.RESULTS / "retention.jsonl"
MODELS = {source.name: source for source in (models.SMOLLM2, models.GEMMA3)}


def plan(names: list[str], tasks: list[str], chosen: list[str] | None, seeds: int, rates: int = 3) -> Iterator[Run]:
    """Yield every run: the contenders on each model with every seed, then the other methods with one, then tasks.

    Methods that are ``chosen`` are the contenders, and there are no others.
    """
    contenders = chosen or [*CONTENDERS]
    others = [] if chosen else [method for method in METHODS if method not in contenders]
    for task in tasks:
        for methods, count in ((contenders, seeds), (others, 1)):
            # The middle of each grid first, with every seed: a comparison of all, with its spread, after few runs.
            for rank in (1, 0, 2)[:rates]:
                for name in names:
                    for seed, method in product(range(count), methods):
                        yield Run(name, task, method, METHODS[method].learning_rates[rank], seed)


def key(record: dict) -> tuple:
    """Return what a record is of: a run that has one is not done again."""
    return tuple(json.dumps(record[field], sort_keys=True) for field in (*Run.__dataclass_fields__, "sizes", "data"))


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retention", description=purpose)
    parser.add_argument("--model", action="append", choices=MODELS, help="default: all")
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument(
        "--seeds", type=int, default=3, help="of the contenders, or of every --method; others run with one"
    )
    parser.add_argument("--rates", type=int, choices=(1, 2, 3), default=3, help="of each grid, the middle one first")
    parser.add_argument(
        "--knowledge", type=Path, help=".jsonl file of questions and answers, as NQ-Open; half is asked"
    )
    parser.add_argument("--task", type=Path, help=".jsonl file of questions and worked answers, as GSM8K")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=cache_folder() / "retention")
    parser.add_argument("--runs", type=int, help="stop after this many")
    arguments = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    sizes = Sizes()
    tasks = ([arguments.task.stem] if arguments.task else []) + ["problems"]
    bench: Bench | None = None
    done = 0
    for run in plan(arguments.model or [*MODELS], tasks, arguments.method, arguments.seeds, arguments.rates):
        if bench is None or (bench.name, bench.task) != (run.model, run.task):
            bench = None  # the last one's memory first
            path = str(models.fetch_model(source=MODELS[run.model]))
            files = (arguments.knowledge, arguments.task)
            bench = Bench(run.model, path, run.task, files, sizes, arguments.cache)
        known = {key(record) for record in records.read_runs(arguments.output)}
        todo = [Run(run.model, run.task, BEFORE, 0.0, 0), run]
        for each in todo:
            if key(bench.frame(each)) in known:
                continue
            if arguments.runs is not None and done >= arguments.runs:
                return
            record = bench.before() if each.method == BEFORE else bench.run(each)
            records.append(arguments.output, record)
            done += each.method != BEFORE
            print(describe(record), flush=True)


def describe(record: dict) -> str:
    """Return one line on a record."""
    parts = [f"{record['model']} {record['task']} {record['method']} {record['learning_rate']:g} seed {record['seed']}"]
    for stop in record["stops"]:
        means = {
            name: sum(values) / len(values) for name, values in stop.items() if isinstance(values, list) and values
        }
        parts.append(
            f"{stop['step']}: task {means['task']:.3f} facts {means['facts']:.2f} {means['facts_right']:.2f} "
            f"knowledge {means.get('knowledge', 0):.2f} kl {means['kl']:.4f}"
        )
    return "  ".join([*parts, f"{record['seconds']:.0f} s"])


if __name__ == "__main__":
    main()

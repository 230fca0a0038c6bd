"""Run what is missing, most valuable first, and keep each record as it is known."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from itertools import product
from pathlib import Path

from lora_null.quickstart import model as models
from lora_null.system.environment import cache_folder

from .. import records
from . import __doc__ as purpose
from .study import BEFORE, ENSEMBLE, METHODS, Bench, Run, Sizes
from .tables import figures_of

RESULTS = records.RESULTS / "bayes.jsonl"
MODEL = models.SMOLLM2


def plan(data: str, methods: list[str], seeds: int) -> Iterator[Run]:
    """Yield every run: the model before, then seed by seed, and ensembles, which take twice as long, in the end."""
    yield Run(MODEL.name, data, BEFORE, 0)
    first = [method for method in methods if method != ENSEMBLE]
    for chosen in (first, [method for method in methods if method == ENSEMBLE]):
        for seed, method in product(range(seeds), chosen):
            yield Run(MODEL.name, data, method, seed)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.bayes", description=purpose)
    parser.add_argument("--method", action="append", choices=METHODS, help="default: all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--knowledge", type=Path, help=".jsonl file of questions and answers, as NQ-Open; default: country facts"
    )
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--cache", type=Path, default=cache_folder() / "bayes")
    arguments = parser.parse_args()
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
    bench = Bench(MODEL.name, str(models.fetch_model()), arguments.knowledge, Sizes(), arguments.cache)
    for run in plan(bench.data, arguments.method or [*METHODS], arguments.seeds):
        frame = bench.frame(run)
        if any(
            all(record.get(key) == value for key, value in frame.items())
            for record in records.read_runs(arguments.output)
        ):
            continue
        record = bench.run(run)
        records.append(arguments.output, record)
        scores = figures_of([record])
        told = "  ".join(f"{name} {value:.3f}" for name, value in scores.items())
        print(f"{run.data} {run.method} seed {run.seed}: {told}  {record['seconds']:.0f} s", flush=True)


if __name__ == "__main__":
    main()

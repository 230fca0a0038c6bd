"""Command line of the suite: ``python -m benchmarks`` from the root of the repository."""

from __future__ import annotations

import argparse
import logging
import sys
import time
from pathlib import Path

import torch

from . import harness, records, report
from .questions import registry
from .timing import keep_freed_memory

COMMANDS = ("run", "list", "table", "figures", "predict")


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    it = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    it.add_argument("command", nargs="?", default="run", choices=COMMANDS)
    it.add_argument("--only", action="append", default=[], metavar="QUESTION", help="ask this question; repeatable")
    it.add_argument("--provider", action="append", default=[], metavar="NAME", help="only this provider; repeatable")
    it.add_argument("--where", action="append", default=[], metavar="KEY=VALUE", help="only cases with this parameter")
    it.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    it.add_argument("--full", action="store_true", help="also the cases that take longer than a coffee")
    it.add_argument("--minutes", type=float, default=None, help="start no further case after this time")
    it.add_argument("--samples-scale", type=float, default=None, help="factor on the time spent on samples")
    it.add_argument("--output", type=Path, default=records.DEFAULT_FILE, help="file that records are appended to")
    it.add_argument("--compare", metavar="GIT_REF", help="time lora_null against itself at another commit")
    return it


def check_names(kind: str, wished: list[str], known: list[str]) -> None:
    """Refuse names that do not exist.

    Raises:
        UsageError: Lists the known names.
    """
    unknown = [name for name in wished if name not in known]
    if unknown:
        raise harness.UsageError(f"unknown {kind} {', '.join(map(repr, unknown))}; known are: {', '.join(known)}")


def main(argv: list[str] | None = None) -> int:
    """Run the command line.

    Returns:
        0; 1 when a record could not be written, our own result was refused or failed, or a regression was
        found; 2 for a wrong argument.
    """
    arguments = parser().parse_args(argv)
    logging.basicConfig(level=logging.WARNING, format="%(message)s", stream=sys.stdout)
    harness.log.setLevel(logging.INFO)
    questions = registry(arguments.device)
    providers = list(dict.fromkeys(p.name for question in questions.values() for p in question.providers()))
    try:
        check_names("question", arguments.only, list(questions))
        check_names("provider", arguments.provider, providers)
        if arguments.device == "cuda" and not torch.cuda.is_available():
            raise harness.UsageError("--device cuda: torch finds no CUDA device; use --device cpu.")
        return _dispatch(arguments, questions)
    except harness.UsageError as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def parse_where(wishes: list[str]) -> dict[str, str]:
    """Return case parameters by name, as text.

    Raises:
        UsageError: A wish is not of the form ``KEY=VALUE``.
    """
    malformed = [wish for wish in wishes if "=" not in wish]
    if malformed:
        raise harness.UsageError(f"--where {malformed[0]}: expected KEY=VALUE, for instance --where d=4096.")
    return dict(wish.split("=", 1) for wish in wishes)


def _dispatch(arguments: argparse.Namespace, questions: dict[str, harness.Question]) -> int:
    if arguments.command == "list":
        for question in questions.values():
            print(f"{question.name:<16} {question.title}")
            print(" " * 17 + ", ".join(provider.name for provider in question.providers()))
        return 0
    if arguments.command == "predict":
        from . import predictions

        print(predictions.text())
        return 0
    if arguments.command in ("table", "figures"):
        found, damaged = records.read(arguments.output)
        if damaged:
            print(f"{arguments.output}: skipped damaged lines {damaged}")
        if arguments.command == "table":
            print(report.table(records.latest(found)))
            return 0
        from . import figures

        return figures.regenerate(records.latest(found))
    chosen = [questions[name] for name in arguments.only] or list(questions.values())
    if arguments.compare:
        from . import compare

        return compare.run(arguments.compare, chosen, arguments)
    return run(chosen, arguments)


def run(questions: list[harness.Question], arguments: argparse.Namespace) -> int:
    """Measure, record, and print the closing table."""
    started = time.monotonic()
    scale = arguments.samples_scale
    options = harness.Options(
        device=arguments.device,
        output=arguments.output,
        full=arguments.full,
        providers=tuple(arguments.provider),
        where=parse_where(arguments.where),
        # Calls on a GPU are a thousand times shorter; a quarter of the time still gives many samples.
        seconds_scale=scale if scale is not None else 0.25 if arguments.device == "cuda" else 1.0,
        deadline=started + 60 * arguments.minutes if arguments.minutes else float("inf"),
    )
    it = harness.Run(options)
    for key, value in it.environment.items():
        harness.log.info("%s: %s", key, value)
    try:
        it.measure_ceilings(("fp32", "bf16", "fp64"))
        for question in questions:
            it.ask(question)
    except KeyboardInterrupt:
        harness.log.warning("interrupted; what was measured is recorded")
    print("\n" + report.table(it.records))
    if it.vanished:
        absent = [f"{name} (needs {why})" for name, why in it.vanished.items()]
        print("\nnot taking part: " + ", ".join(absent))
    if it.skipped:
        print("\nout of time, not measured: " + "; ".join(it.skipped))
    print(f"\n{len(it.records)} records in {time.monotonic() - started:.0f} s -> {arguments.output}")
    if it.unwritten:
        print(f"{it.unwritten} records could not be written")
    bad = [r for r in it.records if r["role"] == "ours" and r["status"] != "ok"]
    return 1 if it.unwritten or bad else 0


if __name__ == "__main__":
    keep_freed_memory()
    sys.exit(main())

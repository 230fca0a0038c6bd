"""Tables and JSON that the commands print."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from ..covariances.covariances import Covariances
from ..evaluation import Evaluation
from ..evaluation.advice import Advice
from ..evaluation.report import LayerSpectrum, LayerUpdate, rows_as_dicts
from ..evaluation.results import rows_of
from ..quickstart.measure import Stage


def print_result(sentence: str, facts: Mapping[str, Any], *, as_json: bool) -> None:
    """Print what a command has done, or would do."""
    if as_json:
        _print_json(facts)
    else:
        print(sentence)


def covariance_facts(path: Path, covariances: Covariances) -> dict[str, Any]:
    """Return what is said of a file of covariances."""
    return {
        "output": str(path),
        "matrices": len(covariances),
        "layers": sum(map(len, covariances.groups.values())),
        "tokens": max(covariances.tokens.values(), default=0),
    }


def print_spectra(
    covariances: Covariances, rows: list[LayerSpectrum], advice: Advice, r: int, *, as_json: bool
) -> None:
    """Print the table of ``lora-null inspect FILE``, and what it means in words."""
    if as_json:
        facts = {"r": r, "metadata": covariances.metadata}
        _print_json({**facts, "layers": list(rows_as_dicts(rows)), "advice": asdict(advice)})
        return
    compared = any(row.generalisation is not None for row in rows)
    table = _table(
        f"{covariances!r}, read for r={r}",
        ["input of", "layers", "d", "tokens", "null energy", "random", "gap", "knee", "eff. rank", "condition"]
        + (["other text", "/ optimum"] if compared else []),
    )
    for row in rows:
        other = [_maybe(row.against_energy, "{:.1e}"), _maybe(row.generalisation, "{:.3g}")] if compared else []
        table.add_row(
            row.name,
            str(row.layers),
            str(row.d),
            f"{row.tokens}{' !' if row.tokens < 2 * row.d else ''}",
            f"{row.null_energy:.1e}",
            f"{r / row.d:.1e}",
            f"{row.gap:.3f}",
            str(row.knee),
            f"{row.effective_rank:.0f}",
            f"{row.condition:.1e}",
            *other,
        )
    notes = ["null energy: share of the activations' energy that an adapter sees; random: in random directions (r/d)"]
    if compared:
        notes.append("other text: null energy of the same directions there; / optimum: over the least possible there")
    if advice.few_tokens:
        notes.append("!: fewer tokens than 2 d, so the null space is partly chance; calibrate on more text")
    _print_table(table, [*notes, "", *advice.sentences])


def print_findings(findings: Iterable[tuple[str, str]], *, as_json: bool) -> None:
    """Print what ``lora-null doctor`` found, each finding as it comes."""
    if as_json:
        _print_json(dict(findings))
        return
    for name, text in findings:
        first, *more = text.splitlines()
        print(f"{name:22s} {first}", *(f"{'':22s} {line}" for line in more), sep="\n", flush=True)


def print_adapter(summary: Mapping[str, Any], rows: list[LayerUpdate], *, as_json: bool) -> None:
    """Print the table of ``lora-null inspect ADAPTER``."""
    if as_json:
        _print_json({**summary, "updates": list(rows_as_dicts(rows))})
        return
    measured = any(row.row_energy is not None for row in rows)
    columns = ["layer", "d", "m", "r", "|dW|"] + (["energy / optimum", "response"] if measured else [])
    table = _table(", ".join(f"{key}={value}" for key, value in summary.items() if value is not None), columns)
    for row in rows:
        cells = [row.name, str(row.d), str(row.m), str(row.r), f"{row.norm:.4g}"]
        if measured:
            cells += [_maybe(row.row_energy, "{:.4g}"), _maybe(row.response, "{:.1e}")]
        table.add_row(*cells)
    notes = []
    if measured:
        notes.append("energy / optimum: of the rows of A on these activations; 1 in their null space")
        notes.append("response: to these activations, relative to an update in random directions")
    _print_table(table, notes)


def print_evaluations(model: str, found: Mapping[str, Evaluation], stages: Sequence[Stage], *, as_json: bool) -> None:
    """Print the table of ``lora-null eval``: a row per tuned model and measure."""
    if as_json:
        evaluations = {path: each.to_dict() for path, each in found.items()}
        _print_json({"model": model, "evaluations": evaluations, "stages": [asdict(stage) for stage in stages]})
        return
    table = _table(f"beside {model}", ["tuned model", "measure", "before", "after", "change [95 %]"])
    for path, each in found.items():
        for measure, before, after, change in rows_of(each):
            table.add_row(path, measure, before, after, change)
            path = ""
    notes = ["keep: cross-entropy: nats per token, its change is the forgetting of PEFT's benchmark; KL: of the tuned"]
    notes.append("from the pre-trained next-token distribution, needs no labels; intervals by bootstrap over documents")
    _print_table(table, notes)


def print_timings(timings: Sequence[Mapping[str, Any]], title: str, *, as_json: bool) -> None:
    """Print the table of ``lora-null bench``."""
    if as_json:
        _print_json({"shape": title, "timings": list(timings)})
        return
    table = _table(f"{title}; median of the calls, quantiles 20 and 80 %", ["operation", "ms", "20 %", "80 %"])
    for row in timings:
        table.add_row(row["operation"], *(f"{row[key]:.3f}" for key in ("ms", "ms_20", "ms_80")))
    _print_table(table, [])


def _table(title: str, columns: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="right" if index else "left", no_wrap=True, overflow="fold")
    return table


def _print_table(table: Table, notes: Iterable[str]) -> None:
    console = Console()
    if not console.is_terminal:
        # A pipe has no width; cutting columns to 80 characters would lose the names.
        console = Console(width=200)
    console.print(table)
    for note in notes:
        console.print(note, highlight=False, soft_wrap=True)


def _print_json(value: Any) -> None:
    # devices and paths as they are written
    print(json.dumps(value, indent=2, default=str))


def _maybe(value: float | None, form: str, otherwise: str = "-") -> str:
    render: Callable[[float], str] = form.format
    return otherwise if value is None else render(value)

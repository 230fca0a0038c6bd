"""Plots, and the figures in Markdown files, from recorded results and from nothing else.

A figure stands between ``<!-- figures:NAME -->`` and ``<!-- /figures:NAME -->``. ``NAME`` is a question, for
instance ``null-space`` (measured on a CPU) or ``linear-gpu``; ``headline`` or ``headline-gpu``; ``growth``;
``predictions``; ``plots``; ``kept``, ``kept-best`` (:mod:`benchmarks.kept`); ``retention``; ``row``; ``quantised``; or
``bayes``.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

from . import kept, plots, predictions, records, report
from .bayes import __main__ as bayes
from .bayes import tables
from .environment import ROOT
from .harness import Question, UsageError
from .questions import registry
from .questions.growth import fitted_exponent, joined
from .retention import __main__ as retention
from .retention import fronts, quantised, row

MARKER = re.compile(r"(<!-- figures:(?P<name>[\w-]+) -->\n)(?P<body>.*?)(<!-- /figures:(?P=name) -->)", re.DOTALL)
OPENING = re.compile(r"<!-- figures:([\w-]+) -->")
DOCUMENTS = ("README.md", "CONTRIBUTING.md", "benchmarks/README.md", "docs/*.md", "docs/guides/*.md")
# Of each study its results, what makes a table of them, and the module that makes them.
STUDIES: dict[str, tuple[Path, Callable[[list[dict]], str], str]] = {
    "retention": (retention.RESULTS, fronts.table, "benchmarks.retention"),
    "row": (row.RESULTS, row.table, "benchmarks.retention.row"),
    "quantised": (quantised.RESULTS, quantised.table, "benchmarks.retention.quantised"),
}
UNMEASURED = "*Not measured: no {device} was at hand. `{command}` measures it and `make figures` puts it here.*"


def on_gpu(record: dict) -> bool:
    """Whether a record comes from a CUDA device."""
    return "cuda" in record.get("environment", {})


def conditions(entries: list[dict]) -> str:
    """Return devices, versions and commits of some records in one line."""
    found: dict[str, None] = {}
    for record in entries:
        environment = record["environment"]
        versions = ", ".join(
            f"{name} {environment[name]}" for name in ("torch", "triton", "peft", "scipy") if name in environment
        )
        found[f"{environment['device']}; {versions}; commit {environment['commit']}; {record['time'][:10]}"] = None
    return "*Conditions: " + " / ".join(found) + ". Median of interleaved samples.*"


def question_table(entries: list[dict], question: Question, gpu: bool) -> str:
    """Return one Markdown table: a row per case, mode and provider."""
    mine = [r for r in entries if r["question"] == question.name and on_gpu(r) == gpu]
    if not any(r["status"] == "ok" for r in mine):
        return _unmeasured(question.name, gpu)
    rows: list[tuple[str, ...]] = [("case", "", "time", "of ours", "of the limit")]
    for (_, _, mode, execution, _), group in report.points(mine).items():
        how = ["" if mode in (None, "run") else str(mode), "graph" if execution == "graph" else ""]
        label = ", ".join(part for part in (report.describe_case(group[0]["case"]), *how) if part)
        order = {"ours": 0, "peer": 1, "floor": 2}
        for record in sorted(group, key=lambda r: (order[r["role"]], r.get("median_ms", 1e30))):
            rows.append((label, *_cells(group, record)))
            label = ""
    notes = dict.fromkeys(r["assumption"] for r in mine if r.get("assumption"))
    parts = [predictions.markdown(rows), *(f"*Assumption: {note}.*" for note in notes), conditions(mine)]
    return "\n\n".join(parts)


def _cells(group: list[dict], record: dict) -> tuple[str, ...]:
    name = f"**{record['provider']}**" if record["role"] == "ours" else record["provider"]
    name += " (floor)" if record["role"] == "floor" else ""
    if record["status"] != "ok":
        return name, record["status"], "", ""
    ratio, share = report.ratio(group, record), record.get("share_of_limit")
    return (
        name,
        report.milliseconds(record["median_ms"]),
        "" if ratio is None else f"{ratio:.2f}x",
        "" if share is None else f"{100 * share:.0f} %",
    )


def headline(entries: list[dict], gpu: bool) -> str:
    """Return one row per question: its first case, our time, and how much longer every peer takes."""
    rows = [("task", "case", "lora_null", "peers, as a multiple of it")]
    used = []
    for name, question in registry().items():
        mine = [r for r in entries if r["question"] == name and on_gpu(r) == gpu]
        groups = [group for group in report.points(mine).values() if report.ours(group)]
        if name == "growth" or not groups:
            continue
        group = groups[0]
        own = report.ours(group)
        assert own is not None
        peers = sorted((r for r in group if r["role"] == "peer" and r["status"] == "ok"), key=lambda r: r["median_ms"])
        text = ", ".join(f"{r['provider']} {report.ratio(group, r):.2f}x" for r in peers)
        mode = "" if own["mode"] == "run" else f", {own['mode']}"
        case = report.describe_case(own["case"]) + mode
        rows.append((question.title, case, report.milliseconds(own["median_ms"]), text))
        used += group
    if not used:
        return _unmeasured(None, gpu)
    return predictions.markdown(rows) + "\n\n" + conditions(used)


def growth_table(entries: list[dict], gpu: bool = False) -> str:
    """Return the fitted exponents of every solver beside those of the operation count."""
    mine = [r for r in joined(entries) if on_gpu(r) == gpu]
    if not mine:
        return _unmeasured("growth", gpu)
    rows = [("", "range", "exponent of time", "exponent of the written operation count", "seconds at the points")]
    for provider in dict.fromkeys(r["provider"] for r in mine):
        for axis, fixed, value in (("d", "r", 128), ("r", "d", 2048)):
            found = sorted(
                (r["case"][axis], r["median_ms"] / 1e3, r["flops"])
                for r in mine
                if r["provider"] == provider and r["case"][fixed] == value
            )
            exponents = [fitted_exponent([(x, y[i]) for x, *y in found]) for i in (0, 1)]
            if exponents[0] is None or exponents[1] is None:
                continue
            points = ", ".join(f"{x}: {seconds:.3g}" for x, seconds, _ in found)
            span = f"{axis} from {found[0][0]} to {found[-1][0]} at {fixed} = {value}"
            rows.append((provider, span, f"{exponents[0]:.2f}", f"{exponents[1]:.2f}", points))
    return predictions.markdown(rows) + "\n\n" + conditions(mine)


def _unmeasured(question: str | None, gpu: bool) -> str:
    only = "" if question is None else f" ARGS='--only {question}'"
    command = ("make bench-gpu" if gpu else "make bench") + only
    return UNMEASURED.format(device="CUDA device" if gpu else "result", command=command)


def figure(name: str, entries: list[dict]) -> str:
    """Return the Markdown of one figure.

    Raises:
        UsageError: There is no figure of that name; lists the known ones.
    """
    gpu = name.endswith("-gpu")
    plain = name.removesuffix("-gpu")
    if name == "predictions":
        return predictions.text()
    if plain == "plots":
        return "\n".join(f"![{path.stem}](results/plots/{path.name})" for path in sorted(plots.FOLDER.glob("*.svg")))
    if plain in STUDIES:
        path, table, module = STUDIES[plain]
        found = records.read_runs(path)
        text = table(found) if found else ""
        return text or UNMEASURED.format(device="result", command=f"python -m {module}")
    if plain == "bayes":
        text = tables.table(records.read_runs(bayes.RESULTS))
        return text or UNMEASURED.format(device="result", command="python -m benchmarks.bayes")
    if plain in ("kept", "kept-best"):
        found = kept.finished(kept.read())
        return kept.table(kept.best(found) if plain == "kept-best" else found)
    if plain == "headline":
        return headline(entries, gpu)
    if plain == "growth":
        return growth_table(entries, gpu)
    if plain in registry():
        return question_table(entries, registry()[plain], gpu)
    known = ["headline", "headline-gpu", "predictions", "plots", "kept", "kept-best", "retention", "row"]
    known += ["quantised", "bayes", *registry(), *(f"{q}-gpu" for q in registry())]
    raise UsageError(f"there is no figure {name!r}; known are: {', '.join(known)}")


def fill(text: str, entries: list[dict]) -> str:
    """Return the text with every figure replaced by the recorded one.

    Raises:
        UsageError: A figure is unknown, or its end marker is missing.
    """
    opened, closed = OPENING.findall(text), [found["name"] for found in MARKER.finditer(text)]
    if opened != closed:
        raise UsageError(
            f"figures {sorted(set(opened) - set(closed)) or opened} have no end marker; every <!-- figures:NAME --> "
            "needs a <!-- /figures:NAME --> after it."
        )
    return MARKER.sub(lambda found: found[1] + figure(found["name"], entries) + "\n" + found[4], text)


def regenerate(entries: list[dict], root: Path = ROOT) -> int:
    """Draw the plots, then rewrite every figure in the documents of the repository."""
    drawn = []
    plots.style()
    for name, drawing in fronts.draw(records.read_runs(retention.RESULTS)):
        drawn.append(kept.IMAGES / f"{name}.svg")
        plots.save(drawing, drawn[-1])
    for path in [*plots.draw(entries), *kept.draw(kept.read()), *drawn]:
        print(f"plot      {path.relative_to(ROOT)}")
    for pattern in DOCUMENTS:
        for path in sorted(root.glob(pattern)):
            before = path.read_text()
            after = fill(before, entries)
            if after != before:
                path.write_text(after)
            if OPENING.search(before):
                print(f"{'rewritten' if after != before else 'unchanged'} {path.relative_to(root)}")
    return 0


def current(root: Path = ROOT) -> list[str]:
    """Return the documents whose figures differ from the committed results."""
    entries = records.latest(records.read(records.DEFAULT_FILE)[0])
    paths = [path for pattern in DOCUMENTS for path in sorted(root.glob(pattern))]
    return [str(path.relative_to(root)) for path in paths if fill(path.read_text(), entries) != path.read_text()]

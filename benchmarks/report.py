"""The closing table: ours, each peer, the ratio, the distance to the limit."""

from __future__ import annotations

from collections.abc import Iterable
from statistics import geometric_mean

from . import records


def describe_case(case: dict) -> str:
    """Return a case in a few characters."""
    flags = {"train_a": ("A frozen", "A trained"), "full": ("", "full")}
    parts = []
    for name, value in case.items():
        if name in flags and isinstance(value, bool):
            parts.append(flags[name][value])
        elif isinstance(value, str):
            parts.append(f"{name} {value}" if name in ("adapter", "spectrum") else value)
        else:
            parts.append(f"{name}={value}")
    return " ".join(part for part in parts if part)


def points(entries: Iterable[dict]) -> dict[tuple, list[dict]]:
    """Group records by question, case, mode, execution and device.

    A provider that was refused before anything was timed has no mode; it joins the first group of its case.
    """
    grouped: dict[tuple, list[dict]] = {}
    unplaced = []
    for record in entries:
        if record["question"] == "ceilings":
            continue
        key = records.key(record)
        if record.get("mode") is None:
            unplaced.append((key, record))
        else:
            grouped.setdefault((*key[:4], key[5]), []).append(record)
    for key, record in unplaced:
        same = [group for group in grouped if (group[0], group[1], group[4]) == (key[0], key[1], key[5])]
        grouped.setdefault(same[0] if same else (*key[:4], key[5]), []).append(record)
    return grouped


def ours(entries: list[dict]) -> dict | None:
    """Return our measurement among the records of one point."""
    found = [r for r in entries if r.get("role") == "ours" and r.get("status") == "ok"]
    return next((r for r in found if r["provider"] == "lora_null"), found[0] if found else None)


def ratio(entries: list[dict], provider: dict) -> float | None:
    """Return how many times longer ``provider`` takes than we do."""
    own = ours(entries)
    if own is None or provider.get("status") != "ok":
        return None
    return provider["median_ms"] / own["median_ms"]


def milliseconds(value: float) -> str:
    """Return a time with a unit that suits it."""
    if value >= 60_000:
        return f"{value / 60_000:.1f} min"
    return f"{value / 1000:.3g} s" if value >= 1000 else f"{value:.3g} ms"


def size(value: float | None) -> str:
    """Return a number of bytes with a unit."""
    if value is None:
        return ""
    return f"{value / 2**30:.2f} GiB" if value >= 2**30 else f"{value / 2**20:.0f} MiB"


HEADER = ("question", "provider", "time", "20 % .. 80 %", "of ours", "of limit", "peak", "kept", "error")


def rows(entries: Iterable[dict]) -> list[tuple[str, ...]]:
    """Return the table's rows; a row with one cell is a heading."""
    table: list[tuple[str, ...]] = []
    for (question, _, mode, execution, device), group in points(entries).items():
        how = "" if mode in (None, "run") else f", {mode}"
        how += " (CUDA graph)" if execution == "graph" else ""
        table.append((f"{question}: {describe_case(group[0]['case'])}{how}  [{device}]",))
        if group[0].get("assumption"):
            table.append((f"  assumption: {group[0]['assumption']}",))
        order = {"ours": 0, "peer": 1, "floor": 2}
        for record in sorted(group, key=lambda r: (order[r["role"]], r.get("median_ms", 1e30))):
            table.append(_row(group, record))
    return table


def _row(group: list[dict], record: dict) -> tuple[str, ...]:
    name = record["provider"] + (" (floor)" if record["role"] == "floor" else "")
    if record["status"] != "ok":
        return ("", name, record["status"], record["reason"], *[""] * (len(HEADER) - 4))
    times = ratio(group, record)
    share = record.get("share_of_limit")
    error = record.get("error")
    return (
        "",
        name,
        milliseconds(record["median_ms"]),
        f"{milliseconds(record['q20_ms'])} .. {milliseconds(record['q80_ms'])}" if "q20_ms" in record else "",
        "" if times is None else f"{times:.2f}x",
        "" if share is None else f"{100 * share:.0f} %",
        size(record.get("peak_bytes")),
        size(record.get("saved_bytes")),
        "" if error is None else f"{error:.4g} {record.get('error_measure', '')}",
    )


def table(entries: list[dict]) -> str:
    """Return the closing table as text.

    ``of ours`` above 1: the provider is slower than we are. ``peak``: memory of one run above what was held before.
    ``kept``: bytes that autograd saves for the backward pass.
    """
    body = rows(entries)
    full = [row for row in body if len(row) > 1]
    # A reason may be long; it must not push the other columns apart.
    widths = [
        max([len(HEADER[i]), *(len(row[i]) for row in full if i != 3 or row[2] not in ("failed", "refused"))])
        for i in range(len(HEADER))
    ]
    widths[0] = 2
    lines = ["  ".join(("", *HEADER[1:])[i].ljust(widths[i]) for i in range(len(HEADER))).rstrip()]
    for row in body:
        if len(row) == 1:
            lines.append(row[0])
        else:
            lines.append("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    return "\n".join([*lines, *means(entries)])


def means(entries: Iterable[dict]) -> list[str]:
    """Return, per question and mode with several cases, the geometric mean of every peer's time over ours.

    The last figure is that of the best peer of each case.
    """
    collected: dict[tuple, list[dict[str, float]]] = {}
    for (question, _, mode, execution, device), group in points(entries).items():
        ratios = {r["provider"]: ratio(group, r) for r in group if r["role"] == "peer"}
        known = {name: value for name, value in ratios.items() if value is not None}
        if known:
            collected.setdefault((question, mode, execution, device), []).append(
                {**known, "the best": min(known.values())}
            )
    lines = []
    for (question, mode, execution, _), cases in collected.items():
        if len(cases) < 2:
            continue
        everywhere = [name for name in cases[0] if all(name in case for case in cases)]
        text = ", ".join(f"{name} {geometric_mean([case[name] for case in cases]):.2f}x" for name in everywhere)
        lines.append(f"geometric mean over {len(cases)} cases, {question} {mode} {execution}: {text}")
    return lines

"""One plot per question, from the recorded results."""

from __future__ import annotations

from pathlib import Path

from . import records, report
from .questions import registry
from .questions.growth import fitted_exponent, joined

FOLDER = records.RESULTS / "plots"
COLOURS = {"ours": "#c4432b", "peer": "#8397a8", "floor": "#d9d9d9"}


def draw(entries: list[dict], folder: Path = FOLDER) -> list[Path]:
    """Draw every question that has results.

    Returns:
        The files written.
    """
    style()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, question in registry().items():
        for gpu in (False, True):
            found = joined(entries) if name == "growth" else [r for r in entries if r["question"] == name]
            mine = [r for r in found if r["status"] == "ok" and ("cuda" in r["environment"]) == gpu]
            if not mine:
                continue
            path = folder / f"{name}{'-gpu' if gpu else ''}.svg"
            save(_growth(mine) if name == "growth" else _bars(mine, question.title), path)
            written.append(path)
    return written


def style() -> None:
    """Set matplotlib for files: no display, text stays text, and ids do not change from run to run."""
    import matplotlib

    matplotlib.use("Agg")
    matplotlib.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "lora_null", "font.size": 9})


def save(figure, path: Path) -> None:
    """Write a figure without the time of day, so that equal figures are equal files."""
    import matplotlib.pyplot as plt

    figure.savefig(path, bbox_inches="tight", metadata={"Date": None})
    plt.close(figure)


def _bars(entries: list[dict], title: str):
    """Times relative to ours, a block of bars per case and mode; shorter is faster."""
    import matplotlib.pyplot as plt

    groups = [group for group in report.points(entries).values() if report.ours(group)]
    count = sum(len(group) + 1.5 for group in groups)
    figure, axes = plt.subplots(figsize=(8, max(1.5, 0.19 * count)))
    position, ticks, names = 0.0, [], []
    for group in groups:
        record = group[0]
        mode = "" if record["mode"] == "run" else f", {record['mode']}"
        graph = ", CUDA graph" if record["execution"] == "graph" else ""
        axes.text(0, position, report.describe_case(record["case"]) + mode + graph, va="center", weight="bold")
        position += 1
        ours = report.ours(group)
        assert ours is not None, "groups without ours are left out above"
        own = ours["median_ms"]
        for it in sorted(group, key=lambda r: r["median_ms"]):
            ratio = it["median_ms"] / own
            spread = [[(it["median_ms"] - it["q20_ms"]) / own], [(it["q80_ms"] - it["median_ms"]) / own]]
            axes.barh(position, ratio, xerr=spread, color=COLOURS[it["role"]], height=0.8, ecolor="#444444")
            axes.text(it["q80_ms"] / own, position, f"  {report.milliseconds(it['median_ms'])}", va="center")
            ticks.append(position)
            names.append(it["provider"])
            position += 1
        position += 0.5
    axes.set_yticks(ticks, names)
    axes.set_ylim(position, -0.8)
    axes.axvline(1, color=COLOURS["ours"], linewidth=0.8)
    axes.set_xlabel("time over that of lora_null; bars end at the median, whiskers at the 20 % and 80 % quantiles")
    axes.set_title(f"{title}\n{entries[0]['environment']['device']}", loc="left")
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)
    return figure


def _growth(entries: list[dict]):
    """Time over width and over rank on logarithmic axes, with the fitted exponents."""
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(9, 3.6))
    for axes, axis, fixed, value in ((panels[0], "d", "r", 128), (panels[1], "r", "d", 2048)):
        chosen = [r for r in entries if r["case"][fixed] == value]
        for provider in dict.fromkeys(r["provider"] for r in chosen):
            found = sorted((r["case"][axis], r["median_ms"] / 1e3) for r in chosen if r["provider"] == provider)
            exponent = fitted_exponent(found)
            label = provider if exponent is None else f"{provider}: {axis}^{exponent:.2f}"
            axes.loglog(*zip(*found, strict=True), "o-", label=label, linewidth=2 if provider == "lora_null" else 1)
        count = sorted({(r["case"][axis], r["flops"]) for r in chosen})
        if count:
            exponent = fitted_exponent(count)
            scale = min(r["median_ms"] for r in chosen) / 1e3 / count[0][1]
            points = [(x, flops * scale) for x, flops in count]
            label = "operation count" if exponent is None else f"operation count: {axis}^{exponent:.2f}"
            axes.loglog(*zip(*points, strict=True), "k:", label=label, linewidth=1)
        axes.set_xlabel(f"{axis}   ({fixed} = {value})")
        axes.set_ylabel("seconds")
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle(f"Null space, fp64, {entries[0]['environment']['device']}", x=0.01, ha="left")
    figure.tight_layout()
    return figure

"""What the runs say at equal task loss: a table and two pictures, from the recorded results and nothing else."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import fmean

import torch

from lora_null.evaluation import Estimate
from lora_null.evaluation.intervals import estimates

from .. import predictions
from .registry import CONTENDERS, METHODS
from .study import BEFORE

# Lists of a stop that say what was kept: the name of the column, and whether the model before has a figure.
KEPT = {
    "kl": ("KL on its own text (nats per token)", False),
    "facts": ("facts, reworded: log-likelihood", True),
    "facts_right": ("facts, reworded: accuracy", True),
    "knowledge": ("held-out questions: log-likelihood", True),
}


@dataclass(frozen=True)
class Point:
    """A method at one learning rate, at a task loss.

    Attributes:
        rate: The learning rate.
        seeds: Of how many runs the figures are means.
        steps: That it took, interpolated.
        kept: Measure to its mean, or its change, with an interval over the items asked.
    """

    rate: float
    seeds: int
    steps: float
    kept: dict[str, Estimate]


def questions(entries: Sequence[dict]) -> Iterator[tuple[str, str, list[dict], dict]]:
    """Yield model, task, its runs and the record of the model before, for each pair that has both."""
    for model, task in dict.fromkeys((e["model"], e["task"]) for e in entries):
        mine = [e for e in entries if (e["model"], e["task"]) == (model, task)]
        before = [e for e in mine if e["method"] == BEFORE]
        runs = [e for e in mine if e["method"] != BEFORE]
        if before and runs:
            yield model, task, runs, before[-1]["stops"][0]


def loss(stop: dict) -> float:
    """Return the task loss of a stop: the mean over its examples."""
    return fmean(stop["task"])


def at(run: dict, before: dict, target: float) -> dict | None:
    """Interpolate a run linearly to where it first has a task loss of ``target``; None if it never has."""
    stops = [before, *run["stops"]]
    for first, second in pairwise(stops):
        if loss(first) > target >= loss(second):
            weight = (loss(first) - target) / (loss(first) - loss(second))
            return {
                name: first[name] + weight * (second[name] - first[name])
                if name == "step"
                else [a + weight * (b - a) for a, b in zip(first[name], second[name], strict=True)]
                for name in ("step", *KEPT)
            }
    return None


def common_loss(runs: Sequence[dict], before: dict) -> float:
    """Return the lowest task loss that every contender reaches, each with the learning rate that learns most."""
    lowest = []
    for method in CONTENDERS:
        by_rate: dict[float, list[float]] = {}
        for run in runs:
            if run["method"] == method and run["stops"]:
                by_rate.setdefault(run["learning_rate"], []).append(min(map(loss, run["stops"])))
        if by_rate:
            # All seeds have to reach it.
            lowest.append(min(max(values) for values in by_rate.values()))
    return max(lowest, default=loss(before))


def points(runs: Sequence[dict], before: dict, target: float) -> dict[str, Point]:
    """Return each method at ``target``, with the learning rate under which it then has the least divergence.

    A rate under which some seed never learns as much is no choice.
    """
    found: dict[str, Point] = {}
    for method in METHODS:
        for rate in METHODS[method].learning_rates:
            own = [run for run in runs if (run["method"], run["learning_rate"]) == (method, rate)]
            reached = [at(run, before, target) for run in own]
            there = [stop for stop in reached if stop is not None]
            if not there or len(there) < len(reached):
                continue
            point = Point(rate, len(there), fmean(stop["step"] for stop in there), _kept(there, before))
            if method not in found or point.kept["kl"].value < found[method].kept["kl"].value:
                found[method] = point
    return found


def _kept(stops: Sequence[dict], before: dict) -> dict[str, Estimate]:
    """Return the mean, or the change, of each measure: items are resampled, seeds averaged for each item."""
    kept: dict[str, Estimate] = {}
    for name, (_, changes) in KEPT.items():
        if before[name]:
            items = torch.tensor([stop[name] for stop in stops], dtype=torch.float64).mean(0)
            items = items - torch.tensor(before[name], dtype=torch.float64) if changes else items
            kept |= estimates({name: items}, torch.ones(len(items)))
    return kept


def table(entries: Sequence[dict]) -> str:
    """Return, for each model and task, every method at the task loss that all contenders reach."""
    parts = []
    for model, task, runs, before in questions(entries):
        target = common_loss(runs, before)
        found = points(runs, before, target)
        names = [name for name in KEPT if before[name]]
        rows = [("method", "rate", "seeds", "steps", *(KEPT[name][0] for name in names))]
        start = [f"{fmean(before[name]):.3g}" if KEPT[name][1] else "0" for name in names]
        rows.append(("before", "", "", "0", *start))
        for method, point in sorted(found.items(), key=lambda pair: pair[1].kept["kl"].value):
            figures = [_change(point.kept[name], KEPT[name][1]) for name in names]
            label = f"**{method}**" if method in CONTENDERS else method
            rows.append((label, f"{point.rate:g}", str(point.seeds), f"{point.steps:.0f}", *figures))
        left_out = [method for method in METHODS if method not in found and any(r["method"] == method for r in runs)]
        note = f" Never learned as much with every seed: {', '.join(left_out)}." if left_out else ""
        parts.append(
            f"**{model}, {task}**, at a task loss of {target:.3f} (before: {loss(before):.3f})\n\n"
            f"{predictions.markdown(rows)}\n\n*{_conditions(runs)}{note}*"
        )
    return "\n\n".join(parts)


def _change(estimate: Estimate, signed: bool) -> str:
    form = "+.3f" if signed else ".4f"
    return f"{estimate.value:{form}} [{estimate.low:{form}}, {estimate.high:{form}}]"


def _conditions(runs: Sequence[dict]) -> str:
    sizes, environment = runs[-1]["sizes"], runs[-1]["environment"]
    stops = ", ".join(map(str, sizes["stops"]))
    return (
        f"Rank {sizes['r']}, batches of {sizes['batch_size']}, at most {sizes['steps']} steps at a constant rate after "
        f"warm-up, judged after {stops} and interpolated; bf16 autocast; {sizes['items']} facts and as many questions, "
        f"{sizes['documents']} texts of {sizes['document_tokens']} tokens; of each method the learning rate of its "
        "grid with the least divergence there; changes against the model before, with 95 % intervals over the items. "
        f"{len(runs)} runs; {environment['device']}, torch {environment['torch']}."
    )


def draw(entries: Sequence[dict]) -> Iterator[tuple[str, object]]:
    """Yield two figures by name: what was kept over what was learned, and what was kept at equal task loss."""
    chosen = list(questions(entries))
    if chosen:
        yield "retention_fronts", _fronts(chosen)
        yield "retention_equal", _equal(chosen)


_COLOURS = {
    "LoRA-Null": "#c4432b",
    "LoRA-Null, A trained": "#e39a7f",
    "Null-Basis, 99 %": "#7d4f9c",
    "Null-Basis, on the usual text and its own": "#2e8b57",
    "LoRA": "#2b5c8a",
    "LoRA, decay 0.3": "#6fa8dc",
}


def _colour(method: str) -> str:
    return _COLOURS.get(method, "#a9b5bf")


def _fronts(chosen: list[tuple[str, str, list[dict], dict]]):
    import matplotlib.pyplot as plt

    figure, panels = plt.subplots(1, len(chosen), figsize=(5.5 * len(chosen), 3.6), squeeze=False)
    for axes, (model, task, runs, before) in zip(panels[0], chosen, strict=True):
        target = common_loss(runs, before)
        for method, point in points(runs, before, target).items():
            own = [run for run in runs if (run["method"], run["learning_rate"]) == (method, point.rate)]
            # Of the others one entry: their names would lie upon one another.
            label = method if method in _COLOURS else "others"
            known = axes.get_legend_handles_labels()[1]
            for number, run in enumerate(own):
                line = [(loss(stop), fmean(stop["kl"])) for stop in run["stops"]]
                wide = 1.8 if method in _COLOURS else 0.8
                name = "" if number or label in known else label
                axes.plot(
                    *zip(*line, strict=True), "o-", color=_colour(method), label=name, linewidth=wide, markersize=3
                )
        axes.legend(frameon=False, fontsize=7)
        axes.axvline(target, color="#444444", linestyle=":", linewidth=1)
        axes.set_yscale("log")
        axes.set_title(f"{model}, {task}", loc="left", fontsize=9)
        axes.set_xlabel("task loss, nats per token (right: more learned)")
        axes.set_ylabel("KL from the model before, on its own text\n(down: more kept)")
        axes.invert_xaxis()
    figure.tight_layout()
    return figure


def _equal(chosen: list[tuple[str, str, list[dict], dict]]):
    import matplotlib.pyplot as plt

    every = [points(runs, before, common_loss(runs, before)) for _, _, runs, before in chosen]
    heights = [0.8 + 0.22 * max(5, len(found)) for found in every]
    figure, panels = plt.subplots(len(chosen), 2, figsize=(8, 0.3 + sum(heights)), height_ratios=heights, squeeze=False)
    for row, (model, task, _, before), found in zip(panels, chosen, every, strict=True):
        order = sorted(found, key=lambda method: -found[method].kept["kl"].value)
        for axes, name in zip(row, ("kl", "knowledge" if before["knowledge"] else "facts"), strict=True):
            for place, method in enumerate(order):
                kept = found[method].kept[name]
                assert kept.low is not None and kept.high is not None
                spread = [[kept.value - kept.low], [kept.high - kept.value]]
                axes.errorbar(kept.value, place, xerr=spread, fmt="o", color=_colour(method), markersize=5)
            axes.set_yticks(range(len(order)), order if name == "kl" else [""] * len(order))
            axes.set_xlabel(KEPT[name][0] + (": change" if KEPT[name][1] else ""))
            axes.set_ylim(-0.7, len(order) - 0.3)
            if KEPT[name][1]:
                axes.axvline(0, color="#444444", linestyle=":", linewidth=1)
            else:
                axes.set_xscale("log")
        row[0].set_title(f"{model}, {task}, at equal task loss", loc="left", fontsize=9)
    figure.tight_layout()
    return figure

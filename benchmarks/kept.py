"""What each way of starting an adapter kept and learned in a first comparison: a table, and the README's picture.

The quickstart's task and questions, one model and one seed; ``python -m benchmarks.retention`` asks the same with more
of each.
"""

from __future__ import annotations

import json
from pathlib import Path

from . import predictions, records
from .environment import ROOT
from .spectra import spectrum

IMAGES = ROOT / "docs" / "images"
RESULTS = records.RESULTS / "forgetting.jsonl"
METHODS = (
    "LoRA",
    "LoRA, random A frozen",
    "MiLoRA",
    "MiCA",
    "CorDA, knowledge-preserved",
    "LoRA-Null, A trained",
    "LoRA-Null",
    "Null-Basis",
)
NAMES = {"CorDA, knowledge-preserved": "CorDA", "LoRA-Null": "LoRA-Null, A frozen"}
# The default, as the quickstart runs it.
DEFAULT = "Null-Basis"
OURS, PEER = "#c4432b", "#8397a8"


def finished(entries: list[dict], seed: int = 0) -> list[dict]:
    """Return the newest record of the last step, for the model before and for each method and learning rate."""
    order = ["before", *METHODS]
    found = {
        (order.index(e["method"]), -e["learning_rate"] if e["step"] else 0.0): e
        for e in entries
        if e["seed"] == seed and e["step"] in (0, e["steps"])
    }
    return [found[key] for key in sorted(found)]


def best(entries: list[dict]) -> list[dict]:
    """Keep, of each method, the learning rate with the lowest task loss: the one that a user would have chosen."""
    chosen: dict[str, dict] = {}
    for e in entries:
        if e["method"] not in chosen or e["task_loss"] < chosen[e["method"]]["task_loss"]:
            chosen[e["method"]] = e
    return list(chosen.values())


def read(path: Path = RESULTS) -> list[dict]:
    """Return the records."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def table(entries: list[dict]) -> str:
    """Return accuracy, log-likelihood, task loss and learning rate as a Markdown table, with the conditions."""
    rows: list[tuple[str, ...]] = [("method", "learning rate", "facts kept (accuracy)", "log-likelihood", "task loss")]
    for e in entries:
        name = NAMES.get(e["method"], e["method"])
        figures = f"{e['accuracy']:.3f}", f"{e['log_likelihood']:.2f}", f"{e['task_loss']:.3f}"
        rows.append((f"**{name}**" if e["method"] == DEFAULT else name, _rate(e), *figures))
    one = entries[-1]
    conditions = (
        f"*Conditions: SmolLM2-135M-Instruct, rank {one['r']}, {one['steps']} steps of {one['batch_size']} arithmetic "
        f"word problems, {one['questions']} held-out facts, seed {one['seed']}; nats, nats per token; "
        f"{one['environment']['device']}, torch {one['environment']['torch']}. One model, one task, one or two "
        "learning rates each: an impression, no ranking.*"
    )
    return predictions.markdown(rows) + "\n\n" + conditions


def _rate(e: dict) -> str:
    return f"{e['learning_rate']:.0e}".replace("e-0", "e-") if e["step"] else ""


def draw(entries: list[dict], folder: Path = IMAGES) -> list[Path]:
    """Draw what was kept over what was learned, and the spectrum that the method rests on."""
    from .plots import save, style

    style()
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for name, figure in (("kept_and_learned", _kept(best(finished(entries)))), ("spectrum", _spectrum())):
        written.append(folder / f"{name}.svg")
        save(figure, written[-1])
    return written


def _kept(entries: list[dict]):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.3))
    for e in entries:
        if not e["step"]:
            axes.axhline(e["accuracy"], color="#444444", linestyle=":", linewidth=1)
            across = axes.get_yaxis_transform()
            where = axes.text(1, e["accuracy"], "before fine-tuning", color="#444444", transform=across, fontsize=8)
            where.set(ha="right", va="bottom")
            before = e["accuracy"]
            continue
        ours = e["method"] == DEFAULT
        axes.plot(e["task_loss"], e["accuracy"], "o", color=OURS if ours else PEER, markersize=10 if ours else 7)
        # What forgetting is: the way down from where the model was.
        colour = OURS if ours else PEER
        axes.plot([e["task_loss"]] * 2, [before, e["accuracy"]], color=colour, linewidth=1.2, zorder=0)
        lost = round((before - e["accuracy"]) * e["questions"])
        point, side = (e["task_loss"], e["accuracy"]), "left" if e["method"] == "LoRA" else "center"
        below = dict(textcoords="offset points", ha=side)
        name, weight = NAMES.get(e["method"], e["method"]), "bold" if ours else "normal"
        # The two of ours lie side by side.
        aside = {"xytext": (8, -3), "ha": "left"} if e["method"] == "LoRA-Null" else {"xytext": (0, -14)}
        axes.annotate(name, point, weight=weight, **(below | aside))
        if ours or e["method"] == "LoRA":
            text = f"{lost} of {e['questions']} facts forgotten"
            axes.annotate(text, point, xytext=(0, -24), color=OURS if ours else "#444444", fontsize=8, **below)
    axes.set_xlabel("task loss after fine-tuning, nats per token (left: more learned)")
    axes.set_ylabel("held-out facts still\nanswered right")
    axes.margins(x=0.08, y=0.18)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure


def _spectrum(d: int = 576, r: int = 32):
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 3.0))
    values = spectrum(d, "gate_up").numpy()
    axes.semilogy(range(1, d + 1), values, color=PEER)
    axes.axvspan(0, r, color=OURS, alpha=0.15, linewidth=0)
    share = 100 * values[:r].sum() / values.sum()
    text = f"the {r} directions of the adapter: {share:.2f} % of the energy\n({r} random ones: {100 * r / d:.1f} %)"
    axes.text(r + 8, 3e-8, text, color=OURS)
    axes.set_xlabel("eigenvalues of C in ascending order (input of gate and up, SmolLM2-135M, layer 15)")
    axes.set_ylabel("over the largest")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure

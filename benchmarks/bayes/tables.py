"""What the records say: one table for each set of questions."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean

import torch

from lora_null import bayes
from lora_null.evaluation import Estimate
from lora_null.evaluation.intervals import estimates

from .. import predictions
from .study import BEFORE, METHODS, TRAINED


def figures_of(entries: Sequence[dict]) -> dict[str, float]:
    """Return accuracy, NLL, ECE and Brier score of the predictions of all records, taken together."""
    p = torch.tensor([row for entry in entries for row in entry["p"]], dtype=torch.float64)
    right = torch.tensor([label for entry in entries for label in entry["right"]])
    found = bayes.scores(p / p.sum(1, keepdim=True), right)
    return {"accuracy": found.accuracy, "nll": found.nll, "ece": found.ece, "brier": found.brier}


def nll_change(entries: Sequence[dict], reference: Sequence[dict]) -> Estimate:
    """Return the mean NLL above that of ``reference``, seeds averaged for each question, questions resampled."""
    change = _nll(entries) - _nll(reference)
    return estimates({"nll": change}, torch.ones(len(change)))["nll"]


def _nll(entries: Sequence[dict]) -> torch.Tensor:
    rows = []
    for entry in entries:
        p = torch.tensor(entry["p"], dtype=torch.float64)
        rows.append(-(p / p.sum(1, keepdim=True)).gather(1, torch.tensor(entry["right"])[:, None])[:, 0].log())
    return torch.stack(rows).mean(0)


def table(entries: Sequence[dict]) -> str:
    """Return a Markdown table for each set of questions; empty without records of LoRA."""
    parts = []
    for data in dict.fromkeys(entry["data"] for entry in entries):
        mine = [entry for entry in entries if entry["data"] == data]
        own = {method: [e for e in mine if e["method"] == method] for method in (BEFORE, *METHODS)}
        seeds = {e["seed"] for e in own["LoRA"]}
        if not seeds:
            continue
        rows = [
            (
                "method",
                "accuracy",
                "NLL",
                "NLL above LoRA's, same seeds",
                "ECE together (each)",
                "Brier score",
                "seconds a seed",
            )
        ]
        for method, found in own.items():
            if not found:
                continue
            common = seeds & {e["seed"] for e in found}
            reference = own["LoRA"] if method == BEFORE else [e for e in own["LoRA"] if e["seed"] in common]
            change = nll_change(found, reference)
            figures = figures_of(found)
            name = (
                method
                if len(found) == len(seeds) or method == BEFORE
                else f"{method} ({len(found)} of {len(seeds)} seeds)"
            )
            versus = "" if method == "LoRA" else f"{change.value:+.3f} [{change.low:+.3f}, {change.high:+.3f}]"
            cells = (f"{figures['accuracy']:.3f}", _with_range(found, "nll"), versus, _with_range(found, "ece"))
            rows.append((name, *cells, f"{figures['brier']:.3f}", f"{fmean(e['seconds'] for e in found):.0f}"))
        parts.append(f"**{data}**\n\n{predictions.markdown(rows)}\n\n*{_conditions(mine)}*")
    return "\n\n".join(parts)


def _with_range(found: Sequence[dict], name: str) -> str:
    each = [figures_of([entry])[name] for entry in found]
    spread = f" ({min(each):.3f} to {max(each):.3f})" if len(each) > 1 else ""
    return f"{figures_of(found)[name]:.3f}{spread}"


def _conditions(entries: Sequence[dict]) -> str:
    sizes, environment = entries[-1]["sizes"], entries[-1]["environment"]
    rates = {entry["method"]: entry["learning_rate"] for entry in entries}
    others = ", ".join(f"{method} {rates[method]:g}" for method in TRAINED if method in rates)
    return (
        f"{entries[-1]['model']}, PEFT's LoRA of rank {sizes['r']} in q and v of the last "
        f"{sizes['layers']} layers, alpha {2 * sizes['r']}, dropout "
        f"{sizes['dropout']:g}; {sizes['train']} examples, {sizes['epochs']} times, batches of {sizes['batch_size']}, "
        f"AdamW at {sizes['learning_rate']:g} ({others}), bf16 autocast; {sizes['questions']} held-out questions of "
        f"four choices; {sizes['samples']} samples of every posterior and of dropout. In brackets the least and most "
        "of the seeds, whose predictions make one ECE together; in square brackets 95 % intervals over the questions. "
        "An ensemble's seconds include training "
        "its other members, those of MC dropout, TFB and Laplace leave out LoRA's own. "
        f"{environment['device']}, torch {environment['torch']}."
    )

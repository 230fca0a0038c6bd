"""The tables that end the quickstart."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table


def show(results: Mapping[str, Any], adapter: Path) -> None:
    """Print what each method kept and learned, what each stage took, and how the reload went."""
    console = Console()
    console.print(comparison(results))
    console.print(stages(results))
    reload = results["reload"]
    console.print(
        f"{adapter}: reloaded in a fresh process with stock PEFT, without lora_null. Largest logit difference "
        f"{reload['difference']:.1e} (largest logit {reload['largest_logit']:.1f}).",
        highlight=False,
        soft_wrap=True,
    )


def comparison(results: Mapping[str, Any]) -> Table:
    """Return the table before / LoRA / LoRA-Null."""
    outcomes = results["outcomes"]
    settings = results["settings"]
    table = Table(
        title=f"r={settings['r']}, {settings['steps']} steps of {settings['batch_size']}, learning rate "
        f"{settings['learning_rate']:g}, seed {settings['seed']}, {results['calibration_tokens']} calibration tokens",
        title_justify="left",
    )
    table.add_column("")
    for name in outcomes:
        table.add_column(name, justify="right")
    rows: dict[str, Callable[[Mapping[str, Any]], str]] = {
        f"accuracy on {results['held_out_facts']} held-out facts": lambda o: f"{o['knowledge']['accuracy']:.3f}",
        "log-likelihood of the right answer (nats)": lambda o: f"{o['knowledge']['log_likelihood']:.3f}",
        "task loss on held-out problems (nats per token)": lambda o: f"{o['task_loss']:.3f}",
        "energy that A sees, over the optimum (median layer)": lambda o: _ratio(o["energy_ratio"]),
    }
    for label, cell in rows.items():
        table.add_row(label, *(cell(outcome) for outcome in outcomes.values()))
    table.add_section()
    for kind in outcomes["before"]["knowledge"]["by_kind"]:
        table.add_row(f"accuracy: {kind}", *(f"{o['knowledge']['by_kind'][kind]:.2f}" for o in outcomes.values()))
    return table


def stages(results: Mapping[str, Any]) -> Table:
    """Return the table of times and memory."""
    table = Table("stage", title_justify="left")
    table.add_column("seconds", justify="right")
    table.add_column("peak memory (MiB)", justify="right")
    for stage in results["stages"]:
        peak = "-" if stage["peak_bytes"] is None else f"{stage['peak_bytes'] / 2**20:.0f}"
        table.add_row(stage["name"], f"{stage['seconds']:.1f}", peak)
    table.add_row("total", f"{sum(stage['seconds'] for stage in results['stages']):.1f}", "")
    return table


def _ratio(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4f}" if value < 100 else f"{value:.1e}"

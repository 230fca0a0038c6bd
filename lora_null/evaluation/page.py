"""What was done with an adapter, and what it kept and learned, as one page that needs nothing else."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import Tensor

from ..adapters.files import Adapter
from ..covariances.covariances import Covariances
from ..models.arguments import PATH, takes
from ..system.files import read_json, replacing, require_writable
from ..system.version import __version__
from . import drawings, markup
from .advice import advise
from .report import LayerSpectrum, LayerUpdate, adapter_report, eigenvalues_of, layer_spectrum, require_fitting
from .results import Evaluation, rows_of

# Decades below the largest eigenvalue that may be drawn; beyond them sums in fp32 are rounding.
_FLOOR = -9
# More spectra than this are folded away by kind.
_OPEN = 24
_TRAINED = {
    "b": "B, from zero; A is frozen in the null space and the base weights are untouched",
    "b_in_basis": "A and B, A within the free directions (Null-Basis LoRA); the base weights are untouched",
    "ab": "A and B freely, from the null space, on shifted base weights",
}


@dataclass(frozen=True)
class _Spectra:
    """Of each sharing group: eigenvalues ``(d,)``, how many directions the adapter has, and its row of figures."""

    values: Mapping[str, Tensor]
    chosen: Mapping[str, int]
    rows: Sequence[LayerSpectrum]
    kinds: Mapping[str, str]


@takes(adapter=PATH, output=PATH, covariances=Covariances)
def write_report(
    adapter: str | os.PathLike,
    output: str | os.PathLike = "report.html",
    *,
    covariances: Covariances | None = None,
    evaluation: Evaluation | str | os.PathLike | None = None,
    overwrite: bool = False,
    progress: bool = True,
) -> Path:
    """Write one HTML file about an adapter: no network, no script, light and dark, readable on a phone.

    It says what was done, what was kept and learned, how strongly the update answers to the calibration activations,
    and shows spectra with the chosen edge, energy and effective rank by depth and kind of layer. What is not given is
    named as missing.

    Args:
        adapter: Adapter folder, ours or plain LoRA of another program.
        output: The file to write.
        covariances: Those that the adapter started from, or of other text of the same model.
        evaluation: What :func:`lora_null.evaluate` found, or the file of ``lora-null eval --json``, which also holds
            times and memory.
        overwrite: Replace an earlier report, and no other file.
        progress: Show progress bars.

    Returns:
        The path of the file.

    Raises:
        FileExistsError: ``output`` exists, and ``overwrite`` is not set or it is no report.
        FileNotFoundError: There is no such adapter or file.
        ValueError: A file is damaged, the covariances belong to another model, or the evaluation to another adapter.
    """
    folder, path = Path(adapter), Path(output)
    require_writable(path)
    _check_target(path, overwrite)
    found, extras = (evaluation, {}) if isinstance(evaluation, Evaluation | None) else _read(Path(evaluation), folder)
    read = Adapter.read(folder)
    eigenvalues = None
    if covariances is not None:
        require_fitting(read.factors, covariances)
        used = {covariances.group_of(name) for name in read.factors}
        eigenvalues = eigenvalues_of(covariances, [key for key in covariances if key in used], progress=progress)
    summary, updates = adapter_report(folder, covariances, eigenvalues=eigenvalues, progress=progress)
    spectra = None if covariances is None or eigenvalues is None else _spectra(read, covariances, eigenvalues)
    sections = {
        "What was done": markup.facts(_facts(read, summary, covariances, extras)),
        "Evaluation": _evaluated(found),
        "After training": _trained(updates),
        "Spectra": _drawn(spectra),
        "Energy and effective rank": _energies(read, spectra),
        "Times and memory": _times(extras.get("stages", [])),
    }
    lead = markup.text(_sentence(read)) + markup.tiles(_headline(found, updates))
    foot = f"Written by lora_null {__version__} with torch {torch.__version__}."
    page = markup.document(f"Report on {folder.resolve().name}", lead, sections, foot)
    with replacing(path) as temporary:
        temporary.write_text(page, encoding="utf-8")
    return path


def _check_target(path: Path, overwrite: bool) -> None:
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True (--overwrite) to replace it, or another path.")
    head = path.read_bytes()[:2000] if path.is_file() else b""
    if markup.GENERATOR.encode() not in head:
        raise FileExistsError(
            f"{path} exists and is no report of this package; overwriting replaces nothing else. Choose another path."
        )


def _read(path: Path, adapter: Path) -> tuple[Evaluation, dict[str, Any]]:
    """Return the evaluation of ``adapter`` in a file, and what else the file says."""
    values = read_json(path)
    if "evaluations" not in values:
        return Evaluation.from_dict(values, str(path)), {}
    entries = values["evaluations"] if isinstance(values["evaluations"], dict) else {}
    own = [key for key in entries if Path(key).resolve() == adapter.resolve()] or list(entries)
    if len(own) != 1:
        raise ValueError(
            f"{path} has the evaluations of {sorted(entries)}, and none of them is {adapter}; expected one of this "
            "adapter. Run lora-null eval --json on it."
        )
    return Evaluation.from_dict(entries[own[0]], str(path)), values


def _spectra(adapter: Adapter, covariances: Covariances, eigenvalues: Mapping[str, Tensor]) -> _Spectra:
    chosen = {key: _chosen(adapter, key, covariances.groups[key]) for key in eigenvalues}
    rows = [layer_spectrum(key, covariances, eigenvalues[key], chosen[key]) for key in eigenvalues]
    kinds = _kinds({key: covariances.groups[key] for key in eigenvalues})
    return _Spectra(eigenvalues, chosen, rows, kinds)


def _chosen(adapter: Adapter, key: str, members: Iterable[str]) -> int:
    """Return how many directions of a group's input the adapter may have."""
    if adapter.state is None:
        return max(len(adapter.factors[name][0]) for name in members if name in adapter.factors)
    ranks = [adapter.state.config.rank_of(name) for name in members if name in adapter.factors]
    return adapter.state.free.get(key, max(ranks))


def _kinds(groups: Mapping[str, Iterable[str]]) -> dict[str, str]:
    """Return what kind of layers each group is, in a few words: the last parts of their names."""
    stems = {key: re.split(r"\.\d+\.", key)[0] for key in groups}
    several = len(set(stems.values())) > 1 and any(re.search(r"\.\d+\.", key) for key in groups)
    kinds = {}
    for key, members in groups.items():
        kind = ", ".join(dict.fromkeys(name.rpartition(".")[2].removesuffix("_proj") for name in members))
        kinds[key] = f"{stems[key].rpartition('.')[0] or stems[key]}: {kind}" if several else kind
    return kinds


def _depth(name: str, otherwise: Any) -> Any:
    """Return the number of the layer in a name."""
    found = re.search(r"\.(\d+)\.", name)
    return int(found[1]) if found else otherwise


def _in_order(updates: Sequence[LayerUpdate]) -> list[LayerUpdate]:
    """Sort by name, numbers as numbers: layer 2 before layer 10."""
    return sorted(updates, key=lambda row: [(len(part), part) for part in row.name.split(".")])


def _by_kind(values: Mapping[str, float], kinds: Mapping[str, str]) -> dict[str, list[tuple[int, float]]]:
    series: dict[str, list[tuple[int, float]]] = {}
    for place, (name, value) in enumerate(values.items()):
        series.setdefault(kinds[name], []).append((_depth(name, place), value))
    return series


def _sentence(adapter: Adapter) -> str:
    base = f" of {_name(adapter.base_model)}" if adapter.base_model else ""
    if adapter.state is None:
        return f"A plain LoRA adapter{base}, made by another program."
    return f"An adapter{base}. Trained: {_TRAINED[adapter.state.config.train or 'b']}."


def _name(model: object) -> str:
    """Return a model's name without the folders of this machine."""
    text = str(model or "")
    return Path(text).name if os.path.isabs(text) else text


def _facts(
    adapter: Adapter, summary: Mapping[str, Any], covariances: Covariances | None, extras: Mapping[str, Any]
) -> dict[str, object]:
    facts: dict[str, object] = {
        "Base model": _name(adapter.base_model),
        "Evaluated beside": _name(extras.get("model")),
        "Layers": f"{summary['layers']}, {summary['parameters']:,} parameters in {summary['dtype']}",
        "Rank on disk": summary["r"],
    }
    if adapter.state is not None:
        config = adapter.state.config
        share = "the least used" if config.protected is None else f"beyond {100 * config.protected:g} % of the energy"
        facts |= {
            "Directions": f"{share}; rank {config.r}" + (", others by pattern" if config.rank_pattern else ""),
            "Scaling": f"lora_alpha {config.lora_alpha or config.r:g}" + (", rsLoRA" if config.use_rslora else ""),
            "Dropout": config.lora_dropout or None,
            "Seed": config.seed,
            "Adapter written by": f"lora_null {adapter.state.version}",
            "Base weights": adapter.state.base_fingerprint and f"fingerprint {adapter.state.base_fingerprint[:12]}",
        }
    if covariances is not None:
        known = covariances.metadata
        tokens = sorted(set(covariances.tokens.values()))
        facts |= {
            "Calibration tokens": f"{tokens[0]:,}" + (f" to {tokens[-1]:,}" if len(tokens) > 1 else ""),
            "Calibration text": known.get("data") and f"fingerprint {known['data'][:12]}",
            "Calibrated model": " ".join(
                filter(None, (known.get("model"), _name(known.get("model_name")), known.get("model_dtype")))
            ),
            "Tokens that count": known.get("mask"),
            "Calibrated by": known.get("lora_null") and f"lora_null {known['lora_null']}",
        }
    else:
        facts["Calibration"] = "not given; pass covariances (--covariances)"
    return facts


def _headline(found: Evaluation | None, updates: Sequence[LayerUpdate]) -> dict[str, str]:
    values = {}
    if found is not None and found.keep is not None:
        values["Forgetting, nats per token"] = str(found.keep.cross_entropy.change)
        values["KL on kept text"] = str(found.keep.kl)
    if found is not None and found.task is not None:
        values["Task loss, change"] = str(found.task.cross_entropy.change)
    if found is not None and found.questions is not None:
        values["Questions right, change"] = str(found.questions.accuracy.change)
    answers = [row.response for row in updates if row.response is not None]
    if answers:
        values["Leakage, median layer"] = f"{drawings.number(median(answers))} of random directions"
    return values


def _evaluated(found: Evaluation | None) -> str:
    if found is None:
        return markup.text("Not given; lora-null eval --json writes it, and --eval reads it.", soft=True)
    note = (
        "Before is the pre-trained model. Brackets hold 95 % intervals by a bootstrap over documents or questions; of "
        "the change, paired. KL and agreement compare both models by themselves. The change of keep: cross-entropy is "
        "what PEFT's benchmark calls forgetting."
    )
    columns = ["measure", "before", "after", "change"]
    kinds = [row for row in rows_of(found) if row[0].startswith("questions, ")]
    rows = [row for row in rows_of(found) if row not in kinds]
    parts = [markup.table("Evaluation", columns, rows), markup.text(note, soft=True)]
    if kinds:
        parts.append(markup.details("By kind of question", markup.table("By kind of question", columns, kinds)))
    if found.questions is not None:
        bins = found.questions.reliability
        title = "Share of right answers over confidence, before and after"
        parts.append("<h3>Reliability</h3>")
        caption = (
            "On the dashed line probabilities are honest, below it too sure. Each mark is a bin of confidence, its "
            f"area the share of the {found.questions.questions} questions."
        )
        parts.append(markup.figure(drawings.reliability(bins, title), caption, drawings.legend(bins), "square"))
    return "".join(parts)


def _trained(updates: Sequence[LayerUpdate]) -> str:
    updates = _in_order(updates)
    kinds = _kinds({row.name: [row.name] for row in updates})
    answers = {row.name: row.response for row in updates if row.response is not None}
    norms = _by_kind({row.name: row.norm for row in updates}, kinds)
    title = "Size of the update of each layer over its depth"
    pictures = [_depths(norms, title, "Size of the update |dW| over the depth; zero where nothing was trained.")]
    parts = []
    if answers:
        worst = max(answers, key=lambda name: answers[name])
        parts.append(
            markup.text(
                f"Leakage: the update answers to these activations {drawings.number(median(answers.values()))} times "
                f"as strongly as one in random directions would (median layer); the most is "
                f"{drawings.number(answers[worst])}, in {worst}."
            )
        )
        caption = "Response to the activations over that of random directions (dashed: 1), over the depth."
        pictures.insert(
            0, _depths(_by_kind(answers, kinds), "Leakage of each layer over its depth", caption, guide=1.0)
        )
    elif any(row.norm for row in updates):
        parts.append(markup.text("Leakage was not measured: it needs the covariances (--covariances).", soft=True))
    else:
        parts.append(markup.text("The adapter changes nothing yet: it has not been trained.", soft=True))
    columns = ["layer", "r", "|dW|", "energy / optimum", "leakage"]
    rows = [
        (row.name, str(row.r), drawings.number(row.norm), *map(_maybe, (row.row_energy, row.response)))
        for row in updates
    ]
    parts.append(f'<div class="pair">{"".join(pictures)}</div>')
    parts.append(markup.details(f"All {len(rows)} layers", markup.table("Updates", columns, rows)))
    return "".join(parts)


def _drawn(spectra: _Spectra | None) -> str:
    if spectra is None:
        return markup.text("Not given; pass the covariances (--covariances) to see them.", soft=True)
    least = min(float(v[v > 0].min() / v[-1]) for v in spectra.values.values() if v[-1] > 0)
    floor = max(_FLOOR, min(-1, math.floor(math.log10(least))))
    lead = (
        "Eigenvalues of each input's second moment in ascending order, over the largest, on a logarithmic scale of "
        f"{-floor} decades. Shaded: the directions of the adapter, up to the chosen edge; the percentage is the share "
        "of the activations' energy that they hold."
    )
    parts, kinds = [markup.text(lead, soft=True)], dict.fromkeys(spectra.kinds.values())
    for kind in kinds:
        rows = [row for row in spectra.rows if spectra.kinds[row.name] == kind]
        figures = []
        for row in rows:
            chosen = spectra.chosen[row.name]
            what = f"{chosen} of {row.d}, {100 * row.null_energy:.2g}\u00a0%"
            title, depth = f"Spectrum of the input of {row.name}: {what}", _depth(row.name, None)
            picture = drawings.spectrum(spectra.values[row.name], chosen, floor, title)
            figures.append(markup.figure(picture, f"{row.name if depth is None else f'layer {depth}'}: {what}"))
        content = f'<div class="many">{"".join(figures)}</div>'
        few = f"{len(rows)} input{'s' if len(rows) > 1 else ''}"
        parts.append(
            markup.details(f"{kind} ({few})", content, opened=len(spectra.rows) <= _OPEN or kind == next(iter(kinds)))
        )
    return "".join(parts)


def _energies(adapter: Adapter, spectra: _Spectra | None) -> str:
    energies = dict(adapter.state.energies) if adapter.state is not None else {}
    if spectra is not None:
        energies = {row.name: row.null_energy for row in spectra.rows}
    if not energies:
        return markup.text("Not known; pass the covariances (--covariances).", soft=True)
    kinds = spectra.kinds if spectra else _kinds({key: [key] for key in energies})
    caption = "Share of the activations' energy in the adapter's directions, over the depth (logarithmic)."
    pictures = [_depths(_by_kind(energies, kinds), "Energy in the adapter's directions over the depth", caption)]
    if spectra is None:
        return f'<div class="pair">{pictures[0]}</div>'
    ranks = {row.name: row.effective_rank for row in spectra.rows}
    caption = "Effective rank of the activations, over the depth: how many directions they use (logarithmic)."
    pictures.append(_depths(_by_kind(ranks, kinds), "Effective rank of the activations over the depth", caption))
    columns = ["input of", "d", "tokens", "chosen", "energy", "effective rank"]
    rows = [
        (
            row.name,
            str(row.d),
            f"{row.tokens:,}",
            str(spectra.chosen[row.name]),
            f"{100 * row.null_energy:.2g} %",
            f"{row.effective_rank:.0f}",
        )
        for row in spectra.rows
    ]
    sizes = set(spectra.chosen.values())
    words = markup.text(*advise(spectra.rows, *sizes).sentences[:-1]) if len(sizes) == 1 else ""
    return (
        f'<div class="pair">{"".join(pictures)}</div>{words}'
        f"{markup.details(f'All {len(rows)} inputs', markup.table('Inputs', columns, rows))}"
    )


def _times(stages: Any) -> str:
    rows = []
    for stage in stages if isinstance(stages, list) else []:
        peak = stage.get("peak_bytes")
        rows.append((stage["name"], f"{stage['seconds']:.1f}", "" if peak is None else f"{peak / 2**20:,.0f}"))
    if not rows:
        return markup.text(
            "Not recorded; the file of lora-null eval --json records those of the evaluation.", soft=True
        )
    return markup.table("Times and memory", ["stage", "seconds", "peak memory, MiB"], rows)


def _depths(
    series: Mapping[str, list[tuple[int, float]]], title: str, caption: str, *, guide: float | None = None
) -> str:
    picture = drawings.by_depth(series, title, guide=guide)
    return markup.figure(picture, caption, drawings.legend(series) if picture else "")


def _maybe(value: float | None) -> str:
    return "" if value is None else drawings.number(value)

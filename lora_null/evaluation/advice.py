"""What the spectra of an adapter's inputs mean and what to do about them, in words."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from ..covariances.covariances import saw_few
from .report import LayerSpectrum

# Gaussian rows of 192 features, r of 8 and 32, spectra from flat to 1/i^2: with 2 d tokens in each half the ratio is
# 4 to 8, with d tokens 45 to 890, with 16 d 1.2 to 1.7.
_CHANCE = 10.0
# The same rows: a flat spectrum leaves 1.0 on the other half and a spectrum of 1/i 0.2 to 0.3, from 2 d tokens on.
_EVEN = 0.5
# Of the sums, as a share of the trace for each direction.
_ROUNDING = torch.finfo(torch.float32).eps

_LEARNING_RATE = (
    "Learning rate: with A frozen start at LoRA's, since null directions carry little of the input and a task that "
    "needs new features is learned more slowly; raise it or r before giving up. With A trained start at about a tenth, "
    "since both factors start away from zero."
)


@dataclass(frozen=True)
class Advice:
    """What to do before an adapter of rank ``r`` is made; layers are the keys of their sharing groups.

    Attributes:
        few_tokens: Layers with fewer tokens than ``2 d``, in either text.
        chance: Layers whose null space catches over ten times the optimum of the other text, beyond the rounding of
            fp32 sums; empty where there is no other text.
        beyond_knee: Layers where ``r`` is larger than the knee of the spectrum.
        no_null_space: Layers whose ``r`` directions hold at least half of the even share ``r / d`` of the energy, on
            the other text where there is one: few tokens make any spectrum look as if it had a null space.
        sentences: The same in words, and the learning rate to start with.
    """

    few_tokens: tuple[str, ...]
    chance: tuple[str, ...]
    beyond_knee: tuple[str, ...]
    no_null_space: tuple[str, ...]
    sentences: tuple[str, ...]


def advise(rows: Sequence[LayerSpectrum], r: int) -> Advice:
    """Read the rows of :func:`~lora_null.evaluation.report.spectrum_report` for the same ``r``.

    Raises:
        ValueError: There are no rows.
    """
    if not rows:
        raise ValueError("advise got no rows; expected those of spectrum_report. Are the covariances empty?")
    few = tuple(row.name for row in rows if saw_few(row.tokens, row.d))
    ratios = {row.name: _generalisation(row, r) for row in rows if row.generalisation is not None}
    chance = tuple(name for name, ratio in ratios.items() if ratio > _CHANCE)
    none = tuple(row.name for row in rows if _EVEN <= _share(row, r) < math.inf)
    beyond = tuple(row.name for row in rows if r > row.knee and row.name not in none)
    sentences = (
        _tokens(rows, few),
        _other_text(ratios, chance, few, len(rows)),
        _knee(rows, r, beyond),
        _null_space(rows, r, none),
        _LEARNING_RATE,
    )
    return Advice(few, chance, beyond, none, sentences)


def _share(row: LayerSpectrum, r: int) -> float:
    """Return the energy of the null directions over an even share of it, on the other text where there is one."""
    return (row.null_energy if row.against_energy is None else row.against_energy) * row.d / r


def _generalisation(row: LayerSpectrum, r: int) -> float:
    """Return the row's ratio, or 1 where the energy caught is rounding, of which ratios say nothing."""
    ratio, energy = row.generalisation or 1.0, row.against_energy or 0.0
    return ratio if energy > r * _ROUNDING else 1.0


def _tokens(rows: Sequence[LayerSpectrum], few: tuple[str, ...]) -> str:
    worst = min(rows, key=lambda row: row.tokens / row.d)
    least = f"the least is {worst.tokens} tokens for d={worst.d}, of {worst.name}"
    if few:
        needed = max(2 * row.d for row in rows)
        return f"Tokens: too few in {_of(few, len(rows))}; {least}. Calibrate on at least 2 d = {needed} tokens."
    return f"Tokens: at least 2 d in every layer; {least}."


def _other_text(ratios: dict[str, float], chance: tuple[str, ...], few: tuple[str, ...], layers: int) -> str:
    if not ratios:
        return (
            "Other text: not measured. Calibrate on two halves of the text and pass the second as against, to see "
            "whether the null space of one holds on the other."
        )
    name = max(ratios, key=lambda each: ratios[each])
    found = f"the null space catches at most {ratios[name]:.3g} times the optimum there, in {name}"
    if chance:
        return (
            f"Other text: {found}; more than {_CHANCE:.0f} times in {_of(chance, layers)}, whose null space is chance, "
            "or the texts differ in kind. Calibrate on more text of both kinds."
        )
    verdict = "" if few else " By that rule the text suffices."
    return f"Other text: {found}. Independent rows give 4 to 8 at 2 d tokens and near 1 with many more.{verdict}"


def _knee(rows: Sequence[LayerSpectrum], r: int, beyond: tuple[str, ...]) -> str:
    lowest = min(rows, key=lambda row: row.knee)
    where = f"the lowest knee is at {lowest.knee} of {lowest.d} directions, of {lowest.name}"
    if beyond:
        named = _of(beyond, len(rows))
        return f"Rank: r={r} is beyond the knee in {named}; {where}. Choose a smaller r, or rank_pattern for these."
    return (
        f"Rank: r={r} is below the knee wherever there is a null space; {where}. r may grow while null energy is small."
    )


def _null_space(rows: Sequence[LayerSpectrum], r: int, none: tuple[str, ...]) -> str:
    worst = max(rows, key=lambda row: _share(row, r))
    where = f"the most is {_share(worst, r):.2g} of an even share of the energy, in {worst.name}"
    if none:
        return (
            f"Null space: none to speak of in {_of(none, len(rows))}, where the {r} directions are used nearly as "
            f"much as any; {where}. Leave these out with exclude_modules, or expect little of them."
        )
    return f"Null space: in every layer the {r} directions are used less than others; {where}."


def _of(names: tuple[str, ...], layers: int) -> str:
    more = ", ..." if len(names) > 3 else ""
    return f"{len(names)} of {layers} layers ({', '.join(names[:3])}{more})"

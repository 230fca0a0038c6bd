"""Small pictures as SVG: without scripts and fonts, in the colours of the page that they stand in."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from statistics import median

from torch import Tensor

from .metrics import Bin

# Points of a drawn spectrum; more cannot be seen at its size.
_POINTS = 72
# How many colours the page has; beyond them, and for who does not tell them apart, marks differ too.
COLOURS = 8
_MARKS = (
    '<circle cx="{x}" cy="{y}" r="2.6"{more}',
    '<rect x="{left}" y="{top}" width="4.8" height="4.8"{more}',
    '<path d="M{x} {up}l3.2 5.6h-6.4z"{more}',
    '<path d="M{x} {up}l3.4 3.4l-3.4 3.4l-3.4 -3.4z"{more}',
)


def spectrum(eigenvalues: Tensor, chosen: int, floor: int, title: str) -> str:
    """Draw eigenvalues ``(d,)``, ascending, over the largest down to ``10^floor``; the first ``chosen`` are shaded."""
    d, width, height = len(eigenvalues), 166.0, 84.0
    largest = max(float(eigenvalues[-1]), math.ulp(0.0))
    shown = sorted(
        {round(i * (d - 1) / (_POINTS - 1)) for i in range(_POINTS)} | {min(chosen, d) - 1, min(chosen, d - 1)}
    )
    points = []
    for index in shown:
        size = math.log10(max(float(eigenvalues[index]) / largest, 10.0**floor))
        points.append(f"{(index + 0.5) / d * width:.1f},{3 + size / floor * (height - 6):.1f}")
    edge = chosen / d * width
    body = (
        f'<rect class="chosen" width="{edge:.1f}" height="{height:g}"/>'
        f'<path class="edge" d="M{edge:.1f} 0V{height:g}"/><polyline class="curve" points="{" ".join(points)}"/>'
        f'<path class="axis" d="M0 0V{height:g}H{width:g}"/>'
    )
    return _svg(width, height, title, body)


def by_depth(series: Mapping[str, Sequence[tuple[int, float]]], title: str, *, guide: float | None = None) -> str:
    """Draw positive values over the depth, one line per kind through its medians; ``guide`` is a level to compare with.

    Args:
        series: Kind to ``(depth, value)``; what is not positive and finite is left out.
        title: What is shown, for those who cannot see it.
        guide: A level to draw.
    """
    width, height, left, bottom = 360.0, 200.0, 44.0, 26.0
    kept = {kind: [p for p in points if 0 < p[1] < math.inf] for kind, points in series.items()}
    values = [value for points in kept.values() for _, value in points] + ([guide] if guide else [])
    depths = [depth for points in kept.values() for depth, _ in points]
    if not depths:
        return ""
    low, high = min(values) / 1.15, max(values) * 1.15
    first, last = min(depths), max(depths)

    def x(depth: float) -> float:
        return left + 8 + (depth - first) / max(1, last - first) * (width - left - 18)

    def y(value: float) -> float:
        return 6 + math.log(high / value) / math.log(high / low) * (height - bottom - 6)

    body = [
        f'<path class="grid" d="M{left:g} {y(tick):.1f}H{width:g}"/>'
        f'<text x="{left - 5:g}" y="{y(tick) + 4:.1f}" text-anchor="end">{number(tick)}</text>'
        for tick in _ticks(low, high)
    ]
    steps = max(1, math.ceil((last - first) / 6))
    body += [
        f'<text x="{x(depth):.1f}" y="{height - 8:g}" text-anchor="middle">{depth}</text>'
        for depth in range(first, last + 1, steps)
    ]
    body.append(f'<path class="axis" d="M{left:g} 0V{height - bottom:g}H{width:g}"/>')
    if guide:
        body.append(f'<path class="edge" d="M{left:g} {y(guide):.1f}H{width:g}"/>')
    for place, points in enumerate(kept.values()):
        levels = {depth: median(v for d, v in points if d == depth) for depth in sorted({d for d, _ in points})}
        line = " ".join(f"{x(depth):.1f},{y(value):.1f}" for depth, value in levels.items())
        body.append(f'<polyline class="line s{place % COLOURS}" points="{line}"/>')
        body += [mark(place, x(depth), y(value), f"layer {depth}: {number(value)}") for depth, value in points]
    return _svg(width, height, title, "".join(body))


def reliability(bins: Mapping[str, Sequence[Bin]], title: str) -> str:
    """Draw accuracy over confidence; honest probabilities lie on the diagonal, the area of a mark is its share."""
    side, left = 250.0, 34.0
    size = side - left - 8

    def x(value: float) -> float:
        return left + value * size

    def y(value: float) -> float:
        return 8 + (1 - value) * size

    body = [f'<path class="guide" d="M{x(0):g} {y(0):g}L{x(1):g} {y(1):g}"/>']
    for tick in (0.0, 0.5, 1.0):
        body.append(f'<text x="{left - 5:g}" y="{y(tick) + 4:g}" text-anchor="end">{tick:g}</text>')
        body.append(f'<text x="{x(tick):g}" y="{y(0) + 15:g}" text-anchor="middle">{tick:g}</text>')
    body.append(f'<path class="axis" d="M{x(0):g} {y(1):g}V{y(0):g}H{x(1):g}"/>')
    body.append(f'<text x="{x(0.5):g}" y="{side - 4:g}" text-anchor="middle">confidence</text>')
    body.append(f'<text x="{x(0) + 4:g}" y="{y(1) + 6:g}">share right</text>')
    for place, (when, found) in enumerate(bins.items()):
        line = " ".join(f"{x(b.confidence):.1f},{y(b.accuracy):.1f}" for b in found)
        body.append(f'<polyline class="line s{place}" points="{line}"/>')
        for b in found:
            text = (
                f"{when}: confidence {b.confidence:.2f}, right {b.accuracy:.2f}, {100 * b.share:.0f} % of the questions"
            )
            radius = 2 + 9 * math.sqrt(b.share)
            body.append(
                f'<circle class="dot s{place}" cx="{x(b.confidence):.1f}" cy="{y(b.accuracy):.1f}" r="{radius:.1f}">'
                f"<title>{escape(text)}</title></circle>"
            )
    return _svg(side, side, title, "".join(body))


def legend(names: Iterable[str]) -> str:
    """Return the marks and names of the lines of a picture, as a list that wraps."""
    entries = "".join(
        f'<li><svg viewBox="0 0 10 10" aria-hidden="true">{mark(place, 5, 5)}</svg>{escape(name)}</li>'
        for place, name in enumerate(names)
    )
    return f'<ul class="legend">{entries}</ul>'


def mark(place: int, x: float, y: float, title: str = "") -> str:
    """Return the mark of the line number ``place`` at a point."""
    form = _MARKS[place % len(_MARKS)]
    more = f' class="s{place % COLOURS}"'
    shape = form.format(
        x=f"{x:.1f}", y=f"{y:.1f}", left=f"{x - 2.4:.1f}", top=f"{y - 2.4:.1f}", up=f"{y - 3.4:.1f}", more=more
    )
    tag = shape[1 : shape.index(" ")]
    return f"{shape}><title>{escape(title)}</title></{tag}>" if title else f"{shape}/>"


def number(value: float) -> str:
    """Return a number in a few characters."""
    if value and not 1e-3 <= abs(value) < 1e5:
        digits, _, exponent = f"{value:.2e}".partition("e")
        return f"{float(digits):g}e{int(exponent)}" if exponent else digits
    return f"{value:.3g}"


def _ticks(low: float, high: float) -> list[float]:
    """Return at most seven round numbers of a logarithmic axis, at least one."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [step * 10.0**decade for decade in decades for step in steps if low <= step * 10.0**decade <= high]
        if len(found) > 2:
            break
    every = math.ceil(len(found) / 7)
    return found[::every] or [math.sqrt(low * high)]


def _svg(width: float, height: float, title: str, body: str) -> str:
    text = escape(title, quote=True)
    return f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{text}"><title>{text}</title>{body}</svg>'

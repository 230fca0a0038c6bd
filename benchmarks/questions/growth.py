"""Growth: how the cost of a null space rises with the width and with the rank."""

from __future__ import annotations

import math
from collections.abc import Iterable

from ..harness import Case, Provider
from .null_space import NullSpaces, _call, _eigh, _evr, _ours


class Growth(NullSpaces):
    """The solvers over a range of widths at r = 128, and over a range of ranks at d = 2048.

    The points d = 2048, 4096 and 8192 at r = 128 are those of ``null-space``; tables and plots join the two.
    """

    name = "growth"
    title = "Growth of the null-space cost with d and r"
    seconds = 1.5
    memory = False

    def cases(self, device, full):
        """Two sweeps around d = 2048, r = 128."""
        widths = [1024, 1448, 2896] + ([5793] if full or device == "cuda" else [])
        ranks = [16, 32, 64, 256]
        points = [(d, 128) for d in widths] + [(2048, r) for r in ranks]
        return [Case({"d": d, "r": r, "spectrum": "o"}) for d, r in points]

    def providers(self):
        """Ours and the library eigensolvers."""
        return [
            Provider("lora_null", _ours, role="ours"),
            # A full solve does not depend on the rank.
            Provider(
                "torch eigh", lambda case, inputs: _call(lambda: _eigh(inputs.C, case["r"])),
                only=lambda case: case["r"] == 128,
            ),
            Provider(
                "scipy evr", lambda case, inputs: _call(lambda: _evr(inputs.C, case["r"])),
                requires=("scipy",), devices=("cpu",),
            ),
        ]  # fmt: skip


def joined(entries: Iterable[dict]) -> list[dict]:
    """Return the records of the sweeps: this question's and those of ``null-space`` on the same spectrum."""
    solvers = {provider.name for provider in Growth().providers()}
    return [
        r
        for r in entries
        if r["question"] in ("growth", "null-space")
        and r["status"] == "ok"
        and r["provider"] in solvers
        and r["case"].get("spectrum", "o") == "o"
    ]


def fitted_exponent(points: Iterable[tuple[float, float]]) -> float | None:
    """Return ``p`` of ``y = c x^p`` by least squares on logarithms; ``None`` for fewer than three points."""
    logs = [(math.log(x), math.log(y)) for x, y in points if x > 0 and y > 0]
    if len({x for x, _ in logs}) < 3:
        return None
    mean_x = sum(x for x, _ in logs) / len(logs)
    mean_y = sum(y for _, y in logs) / len(logs)
    covariance = sum((x - mean_x) * (y - mean_y) for x, y in logs)
    return covariance / sum((x - mean_x) ** 2 for x, _ in logs)

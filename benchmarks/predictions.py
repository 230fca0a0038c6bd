"""What the written models say of accelerators that nobody has measured: arithmetic on paper, labelled as such.

A layer's time is the time of its large products plus its passes over ``(T, d)`` matrices that no product hides, as
:mod:`lora_null.ops.roofline` counts them for the way that a call takes.
"""

from __future__ import annotations

from collections.abc import Sequence

from lora_null.ops import dispatch, roofline

from . import limits
from .report import milliseconds
from .shapes import shapes

_VENDOR = dict.fromkeys(dispatch.PRODUCTS, "cublas")
PASSES = {
    "eager": roofline.SEPARATE_PASSES,
    "vendor": roofline.passes(_VENDOR),
    "vendor, dy read once": roofline.passes(_VENDOR | {"backward_dy": "triton"}),
    "fused": roofline.passes(dict.fromkeys(dispatch.PRODUCTS, "triton")),
}


def linear_rows() -> list[tuple[str, ...]]:
    """Return, per accelerator and width, the ratios between the ways of computing an adapted layer."""
    rows: list[tuple[str, ...]] = [
        ("accelerator", "d", "eager / base", *(f"eager / {way}" for way in PASSES if way != "eager"))
    ]
    for name, card in roofline.CARDS.items():
        for d in (2048, 4096, 8192):
            base = roofline.linear_seconds(card, 8192, d, d, 0)
            eager, *ways = (roofline.linear_seconds(card, 8192, d, d, passes) for passes in PASSES.values())
            ratios = (eager / base, *(eager / way for way in ways))
            rows.append((name, str(d), *(f"{ratio:.2f}x" for ratio in ratios)))
    return rows


def sample_rows(samples: int = 4, T: int = 8192) -> list[tuple[str, ...]]:
    """Return what samples of a square layer on one input cost beside one forward of it: passes over outputs decide.

    As it is, the output is copied for each sample, and a product adds to the copies: four passes a sample. At least,
    each sample's output is written once.
    """
    rows: list[tuple[str, ...]] = [("accelerator", "d", f"{samples} samples / forward", "at least")]
    for name, card in roofline.CARDS.items():
        for d in (2048, 4096, 8192):
            base, one = 2 * T * d * d / card.bf16_flops_per_s, T * d * 2 / card.bytes_per_s
            ratios = ((base + passes * one) / base for passes in (4 * samples, samples))
            rows.append((name, str(d), *(f"{ratio:.2f}x" for ratio in ratios)))
    return rows


def task_rows() -> list[tuple[str, ...]]:
    """Return the least times of the suite's tasks on each accelerator."""
    shape = shapes()["llama-3-8b"]
    tasks = {
        "covariance update, d = 4096, T = 8192, bf16": limits.covariance_work(8192, 4096, "bf16"),
        "covariance update, d = 14336, T = 8192, bf16": limits.covariance_work(8192, 14336, "bf16"),
        "null space, d = 4096, r = 128": limits.null_space_work(4096, 128),
        "null space, d = 14336, r = 128": limits.null_space_work(14336, 128),
        "null spaces of Llama-3-8B (128 matrices)": sum(
            (limits.null_space_work(d, 128) * shape.layers for d in shape.covariance_widths), limits.Work(0.0)
        ),
        "initialisation of Llama-3-8B, 256 x 2048 tokens, r = 128": limits.initialization_work(
            shape, 256 * 2048, 128, "bf16", 2048
        ),
        "training step of Llama-3-8B, 4096 tokens, r = 16, A frozen": limits.training_work(
            shape, 4096, 16, "bf16", 2048, layers=shape.layers, vocab=shape.vocab_size, train_a=False
        ),
    }
    rows: list[tuple[str, ...]] = [("task, least time by the written model", *roofline.CARDS)]
    for task, work in tasks.items():
        rows.append((task, *(_least(card, work) for card in roofline.CARDS.values())))
    return rows


def _least(card: roofline.Card, work: limits.Work) -> str:
    rates = limits.Ceilings(card.bytes_per_s, {"bf16": card.bf16_flops_per_s, "fp64": card.fp64_flops_per_s})
    limit = rates.limit_ms(work)
    assert limit is not None, "the tasks use no dtype whose rate is not assumed"
    return milliseconds(limit)


def markdown(rows: Sequence[tuple[str, ...]]) -> str:
    """Return rows as a Markdown table; the first is the header."""
    head, *body = rows
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in body)])


def text() -> str:
    """Return all predictions, with their label."""
    sources = "\n".join(f"- {name}: {card.source}." for name, card in roofline.CARDS.items())
    return (
        "PREDICTION on paper, not a measurement. Rates assumed:\n\n"
        f"{sources}\n\n"
        "Forward and backward of a square adapted layer in bf16, T = 8192, small r, A frozen. "
        f"Separate operations make {PASSES['eager']} passes over (T, d) beside the two products, the vendor's in our "
        f"order {PASSES['vendor']}, with a kernel that reads dy once {PASSES['vendor, dy read once']}, fused kernels "
        f"{PASSES['fused']}, if their products are as fast as the vendor's:\n\n"
        f"{markdown(linear_rows())}\n\n"
        "Four samples of such a layer on one input, forward, beside one forward of it:\n\n"
        f"{markdown(sample_rows())}\n\n"
        "Least times if every operation ran at the assumed rate; no program reaches them:\n\n"
        f"{markdown(task_rows())}"
    )

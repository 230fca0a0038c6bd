"""What :mod:`benchmarks.gpu` runs: correctness, comparisons that only a device decides, tuning, peers."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import torch
from lora_null.kernels import config, lora, runtime, syrk
from lora_null.kernels import tune as kernels
from torch import Tensor

from lora_null.ops import covariance, tune, vendor
from lora_null.system import extension

from . import environment, limits, timing
from .__main__ import parser
from .__main__ import run as run_suite
from .gpu import TESTS, Context, Stage
from .questions import registry

BF16 = torch.bfloat16
# (T, d, m) of the comparisons: layers of Llama-3-8B and of Llama-3.2-1B.
SHAPES = ((8192, 4096, 4096), (8192, 2048, 2048), (8192, 4096, 14336), (2048, 4096, 4096))


def what_is_here(context: Context) -> None:
    """Note the card, the versions, the clocks and whether the extension was found."""
    found = environment.describe(context.device)
    context.keep("environment", "machine", **found, extension=extension.ready() is not None)
    context.keep("environment", "clocks", **environment.clocks(context.device))


def tests(context: Context) -> None:
    """Run the tests that the device takes part in; fails with them."""
    missing = [path for path in TESTS if not (environment.ROOT / path).exists()]
    if missing:
        raise FileNotFoundError(f"there is no {', '.join(missing)}")
    how = ["--collect-only", "tests/system/test_architecture.py"] if context.dry else [*TESTS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *how]
    seconds = max(10.0, context.deadline - time.monotonic())
    with (context.folder / "tests.txt").open("w") as output:
        code = subprocess.run(command, cwd=environment.ROOT, stdout=output, stderr=subprocess.STDOUT, timeout=seconds)
    last = (context.folder / "tests.txt").read_text().strip().splitlines()[-1:]
    context.keep("tests", "pytest", code=code.returncode, says=" ".join(last)[:120])
    if code.returncode:
        raise RuntimeError(f"pytest ended with {code.returncode}; see {context.folder / 'tests.txt'}")


def race(context: Context) -> None:
    """Project with dropout again and again: the same bits, and near the truth (triton#9433 overwrote operands)."""
    T, d, repeats = (64, 128, 2) if context.dry else (8192, 4096, 200)
    project: Callable[..., Tensor] = vendor.project if context.dry else lora.project
    for r in (16, 64, 128, 256):
        x, A = normal(context, T, d), normal(context, r, d, scale=d**-0.5)
        keep = lora.keep_mask(T, d, dropout=0.3, seed=5, device=context.device)
        truth = (x.double() * keep / 0.7) @ A.double().t()
        first = project(x, A, dropout=0.3, seed=5)
        same, worst = True, 0.0
        for _ in range(repeats):
            S = project(x, A, dropout=0.3, seed=5)
            same &= torch.equal(S, first)
            worst = max(worst, float((S.double() - truth).norm() / truth.norm()))
        context.keep("race", f"projection with dropout, r={r}", runs=repeats, same_bits=same, worst_error=worst)
        if not same or not worst < 4e-3:  # one rounding to bf16 is 1.7e-3
            raise ArithmeticError(f"r={r}: same bits {same}, error {worst:.3g}")


def order(context: Context) -> None:
    """Compare the two orders of a low-rank and a large product that accumulate into one output."""
    for T, d, m in sizes(context):
        for r in (16, 128):
            x, W, S, B = (normal(context, *shape) for shape in ((T, d), (m, d), (T, r), (m, r)))
            y = torch.empty(T, m, device=context.device, dtype=BF16)
            in_turn = ((x, W.t()), (S, B.t()))
            case = f"T={T} d={d} m={m} r={r}"
            compare(context, "order", f"y, {case}", {
                "base": partial(torch.mm, x, W.t(), out=y),
                "base_then_low_rank": partial(_accumulated, y, in_turn),
                "low_rank_then_base": partial(_accumulated, y, in_turn[::-1]),
            })  # fmt: skip
            # an adapter whose B is zero leaves y as it is: to the bit, if the vendor chooses the same kernel
            same = torch.equal(torch.zeros_like(y).addmm_(x, W.t()), torch.mm(x, W.t()))
            context.keep("order", f"y has the bits of the base at B = 0, {case}", same_bits=same)


def _accumulated(out: Tensor, factors: Sequence[tuple[Tensor, Tensor]]) -> Tensor:
    """Write the first product to ``out`` and accumulate the others into it."""
    torch.mm(*factors[0], out=out)
    for left, right in factors[1:]:
        out.addmm_(left, right)
    return out


def group(context: Context) -> None:
    """Compare dx of q, k and v as three products that are added, and as one that accumulates."""
    T, d, _ = sizes(context)[0]
    widths = (d, d // 4, d // 4)
    dys, Ws = [normal(context, T, m) for m in widths], [normal(context, m, d) for m in widths]

    def added() -> Tensor:
        first, *others = (torch.mm(dy, W) for dy, W in zip(dys, Ws, strict=True))
        for dx in others:
            first = first + dx
        return first

    accumulated = partial(_accumulated, torch.empty_like(added()), list(zip(dys, Ws, strict=True)))
    compare(context, "group", f"dx of q, k, v, T={T} d={d}", {"added": added, "accumulated": accumulated})


def masked(context: Context) -> None:
    """Compare the symmetric kernel with a mask, with rows gathered before, and the full product."""
    for d in (64, 128) if context.dry else (2048, 4096, 8192):
        T = 128 if context.dry else 8192
        x, C = normal(context, T, d), torch.zeros(d, d, device=context.device)
        mask = torch.arange(T, device=context.device) % 8 != 0
        update: Callable[..., Any] = covariance.update_by_blocks if context.dry else syrk.covariance_update

        def full(C: Tensor = C, x: Tensor = x) -> Tensor:
            if x.is_cuda:
                return torch.addmm(C, x.t(), x, out_dtype=torch.float32, out=C)  # type: ignore[call-overload]
            return C.addmm_(x.t().float(), x.float())

        compare(context, "masked", f"C += X^T X, T={T} d={d}", {
            "full_product": full,
            "kernel": partial(update, C, x),
            "kernel_masked": partial(update, C, x, mask),
            "kernel_gathered": partial(_gathered, update, C, x, mask.nonzero()[:, 0]),
        })  # fmt: skip


def _gathered(update: Callable[..., Any], C: Tensor, x: Tensor, rows: Tensor) -> None:
    update(C, x.index_select(0, rows))


def tune_kernel(kernel: str, context: Context) -> None:
    """Time the launch configurations of one kernel and keep the fastest."""
    options: dict[str, Any] = {"deadline": context.deadline}
    arch, median_ms = "sm_90 imitated", kernels.graph_ms
    with imitation(context):
        if context.dry:
            times = imitated()
            options |= {"device": "meta", "verified": lambda *_: lambda: None, "prepare": lambda *_: None}
            median_ms = lambda call: (call(), next(times))[1]  # noqa: E731
        else:
            arch = config.architecture("cuda")
        for overlay in kernels.measure([kernel], BF16, arch, median_ms, **options):
            config.save_tuned(arch, {**overlay, "source": f"timed on {arch}, torch {torch.__version__}"})
            best = [entry for entry in overlay["kernels"][kernel]["16"] if "aligned_min" in entry.get("when", {})][-1]
            context.keep(f"tune {kernel}", json.dumps(best["when"]), **{k: v for k, v in best.items() if k != "when"})
    shutil.copy(config.tuned_path(arch), context.folder)


def tune_ways(context: Context) -> None:
    """Time covariances and the products of a linear, ours and the vendor's, and keep what is chosen by."""
    times = imitated()
    arch = "sm_90 imitated" if context.dry else config.architecture("cuda")
    median_ms = (lambda call: next(times)) if context.dry else kernels.graph_ms
    covariances = {} if context.dry else tune.measure_covariance(BF16, "cuda", median_ms)
    if covariances:
        config.save_tuned(arch, covariances)
    for entry in covariances.get("dispatch", {}).get("covariance", {}).get("16", []):
        context.keep("tune ways", f"covariance {entry['when']}", **{k: v for k, v in entry.items() if k != "when"})
    layers = ((4096, 4096), (14336, 4096), (2048, 2048))
    for T, (m, d), r in ((T, layer, r) for r in (16, 128) for T in (8192, 2048) for layer in layers):
        if time.monotonic() > context.deadline:
            break
        shape = (8, 32, 16, 4) if context.dry else (T, d, m, r)
        entries = list(tune.measure_linear([shape], BF16, context.device, median_ms))
        tune.save_linear(arch, entries)
        for entry in entries:
            figures = {k: entry[k] for k in ("triton_us", "cublas_us")}
            context.keep(
                "tune ways", f"{entry['product']} T={shape[0]} d={shape[1]} m={shape[2]} r={shape[3]}", **figures
            )
        if context.dry:
            break
    shutil.copy(config.tuned_path(arch), context.folder)


def peers(question: str, context: Context) -> None:
    """Ask one question of the suite; the compiled peers, of tens of seconds each, are left to ``make bench-gpu``."""
    asked = registry(context.device)[question]
    quick = [p.name for p in asked.providers() if "compiled" not in p.name and not (context.dry and p.requires)]
    minutes = (context.deadline - time.monotonic()) / 60
    words = ["--output", str(context.folder / "measurements.jsonl"), "--minutes", f"{minutes:.2f}"]
    words += ["--device", context.device, *(f"--provider={name}" for name in quick)]
    arguments = parser().parse_args(words + (["--where", "T=4", "--samples-scale", "1e-3"] if context.dry else []))
    with mock.patch("benchmarks.limits.measure_ceilings", no_ceilings) if context.dry else mock.patch.dict({}):
        code = run_suite([asked], arguments)
    context.keep(f"peers {question}", "see measurements.jsonl", code=code)
    if code:
        raise RuntimeError("a provider of ours failed or was refused")


def no_ceilings(device: str, dtypes: tuple[str, ...], seconds: float) -> tuple[Any, dict]:
    """Stand for the measurement of the ceilings."""
    return limits.Ceilings(1e9, dict.fromkeys(dtypes, 1e9)), {}


def normal(context: Context, rows: int, columns: int, *, scale: float = 1.0) -> Tensor:
    """Return random bf16."""
    return (torch.randn(rows, columns, device=context.device) * scale).to(BF16)


def sizes(context: Context) -> list[tuple[int, int, int]]:
    """Return ``(T, d, m)`` of the comparisons, small where nothing is timed."""
    return [(256, 128, 128)] if context.dry else list(SHAPES)


def compare(context: Context, stage: str, what: str, calls: dict[str, Callable[[], Any]]) -> None:
    """Time calls in turns, as CUDA graphs, and keep their medians in us."""
    timed = {name: timing.Timed(call) for name, call in calls.items()}
    if not context.dry:
        timed = {name: timing.captured(call) for name, call in timed.items()}
    samples = timing.interleave(timed, timing.clock(context.device), seconds=0.0 if context.dry else 0.6, at_least=1)
    medians = {name: round(1e3 * timing.Times.of(values).median_ms, 2) for name, values in samples.items()}
    context.keep(stage, what, **medians, unit="us")


def imitated() -> Iterator[float]:
    """Yield times that differ, so that something wins."""
    while True:
        yield from (0.3, 0.2, 0.1, 0.4)


@contextmanager
def imitation(context: Context) -> Iterator[None]:
    """In a dry run let launchers run without a device and without launching."""
    if not context.dry:
        yield
        return
    with (
        mock.patch.object(runtime, "launch", lambda *a, **k: None),
        mock.patch.object(runtime, "multiprocessors", lambda device: 132),
    ):
        yield


PEERS = {
    "linear": 150.0, "covariance": 90.0, "linear-group": 90.0, "layer": 90.0,
    "null-space": 60.0, "training": 120.0, "initialization": 60.0,
}  # fmt: skip


def _kernels() -> dict[str, tuple[float, Stage]]:
    seconds = {"dy": 90.0, "project": 90.0, "outer": 90.0, "syrk": 150.0, "linear": 150.0}
    return {f"tune {name}": (limit, partial(tune_kernel, name)) for name, limit in seconds.items()}


STAGES: dict[str, tuple[float, Stage]] = {
    "environment": (30.0, what_is_here),
    "tests": (270.0, tests),
    "race": (60.0, race),
    "order": (60.0, order),
    "group": (20.0, group),
    "masked": (30.0, masked),
    **_kernels(),
    "tune ways": (180.0, tune_ways),
    **{f"peers {name}": (limit, partial(peers, name)) for name, limit in PEERS.items()},
}

"""Time launch configurations on this machine's GPU and keep the fastest as data.

The command is ``lora-null tune``, which then measures where these kernels beat the vendor's.

Every candidate runs on the sizes of ``SIZES``, and with dropout where the kernel applies a mask; one that does not
compile, does not fit, or whose results are not as good as torch's is passed over. The winners, with bounds halfway
(geometrically) between the sizes, stand in front of the shipped entries, which stay for what the winners do not cover.
"""

import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise, product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from . import config, lora, runtime, syrk

__all__ = ["SIZES", "Workload", "candidates", "compile_ahead", "graph_ms", "measure", "verifier"]

logger = logging.getLogger("lora_null")

# The size that a kernel's entries are distinguished by, and its values: widths and ranks of LLaMA layers.
SIZES = {
    "syrk": ("d", (1024, 2048, 4096, 8192, 14336)),
    "linear": ("T", (512, 2048, 8192)),
    "project": ("r", (16, 64, 128)),
    "outer": ("r", (16, 64, 128)),
    "dy": ("r", (16, 64, 128)),
}
TOKENS = 8192
WIDTH = 4096
# Timed without and with it: the mask costs registers, and another tile may win.
DROPOUT = {"linear": (0.0, 0.1), "project": (0.0, 0.1), "outer": (0.0, 0.1)}
# sides (M, N), steps, stages, warps, programs on a multiprocessor. A 128 x 128 tile asks 64 bytes of the L2 cache
# per cycle and multiprocessor at full rate, a 128 x 256 one 48, an H100 delivers about half of that: the large
# tiles come first. Two small ones on a multiprocessor hide each other's beginning and end.
_TMA_TILES = (
    (128, 256, 64, 4, 8, 1), (256, 128, 64, 4, 8, 1), (128, 256, 64, 3, 8, 1), (256, 128, 64, 3, 8, 1),
    (256, 128, 128, 2, 8, 1), (128, 128, 64, 4, 8, 1), (128, 128, 64, 3, 8, 2), (128, 128, 64, 3, 4, 2),
    (128, 128, 128, 3, 8, 1), (64, 256, 64, 3, 4, 1), (128, 64, 64, 4, 4, 2), (64, 128, 64, 4, 4, 2),
)  # fmt: skip
_POINTER_TILES = (
    (128, 256, 64, 3, 8), (256, 128, 64, 3, 8), (128, 128, 64, 3, 8), (128, 128, 64, 4, 8), (128, 128, 32, 4, 4),
    (128, 128, 32, 4, 8), (64, 128, 64, 3, 4), (64, 128, 32, 4, 4),
)  # fmt: skip


def candidates(kernel: str, dtype: torch.dtype, arch: str, size: int) -> Iterator[dict[str, Any]]:
    """Yield the configurations to time at ``size``: the shipped ones, then others, most promising first."""
    bits = "32" if dtype.itemsize >= 4 else "16"
    for entry in config.shipped(arch)["kernels"][kernel][bits]:
        yield {name: value for name, value in entry.items() if name != "when"}
    if bits == "32":
        return
    tma = config.family(arch) in ("sm_90", "sm_100", "sm_103")
    if kernel in ("syrk", "linear"):
        tiles = [(*tile[:5], {"TMA": True, "OCCUPANCY": tile[5]}) for tile in _TMA_TILES * tma]
        tiles += [(*tile, {}) for tile in _POINTER_TILES[: 3 if tma else None]]
        for m, n, k, stages, warps, way in tiles:
            common = {**way, "GROUP": 8, "num_warps": warps, "num_stages": stages}
            if kernel == "linear":
                entry = {**common, "BLOCK_T": m, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_R": min(k, 64)}
                yield entry
                # Triton 3.6 and 3.9 do not compile it for sm_100; two programs overlap without it
                if config.family(arch) == "sm_90" and way.get("OCCUPANCY") == 1:
                    yield {**entry, "ONE_LOOP": True}
            else:
                yield {**common, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_T": k, "ATOMIC": tma, "SLICE_STEPS": 6}
        return
    # a block wider than the rank is cut to it: the same launch again
    ranks = [n for n in (64, 128, 256) if n < 2 * size] or [64]
    if kernel == "project":
        for n, k, t, stages in product(ranks[::-1][:2], (64, 128), (64, 128, 32), (3, 4)):
            yield {
                "BLOCK_T": t, "BLOCK_N": n, "BLOCK_K": k, "SLICE_STEPS": 4,
                "num_warps": 8 if t == 128 else 4, "num_stages": stages,
            }  # fmt: skip
    elif kernel == "outer":
        for r, n, t, warps, stages in product(ranks[::-1][:2], (128, 64), (64, 32), (8, 4), (4, 3)):
            yield {
                "BLOCK_T": t, "BLOCK_N": n, "BLOCK_R": r, "SLICE_STEPS": 6,
                "num_warps": warps, "num_stages": stages,
            }  # fmt: skip
    else:
        # tall tiles read the factors less often: by arithmetic 235 instead of 336 MB from L2 at r = 128, d = 4096
        for r, m in product(ranks[::-1][:2], (256, 128)):
            yield {
                "ROWS": 128, "BLOCK_K": 64, "BLOCK_T": 64, "BLOCK_M": m, "BLOCK_R": r, "SLAB_BYTES": 24 << 20,
                "SLICE_STEPS": 6, "num_warps": 8, "num_stages": 3,
            }  # fmt: skip
        for r, mib, m, rows, warps in product(ranks[::-1][:2], (24, 8, 64), (128, 64), (64, 32), (8, 4)):
            yield {
                "ROWS": rows, "BLOCK_K": 64, "BLOCK_T": 64, "BLOCK_M": m, "BLOCK_R": r, "SLAB_BYTES": mib << 20,
                "SLICE_STEPS": 6, "num_warps": warps, "num_stages": 3,
            }  # fmt: skip


@dataclass(frozen=True)
class Workload:
    """A call to time, and what it must compute.

    Attributes:
        call: The call.
        outputs: Runs it and returns its results.
        plain: The same results from torch, in the dtype given.
    """

    call: Callable[[], object]
    outputs: Callable[[], tuple[Tensor, ...]]
    plain: Callable[[torch.dtype], tuple[Tensor, ...]]


def workload(kernel: str, size: int, dtype: torch.dtype, device: str, dropout: float = 0.0) -> Workload:
    """Return ``kernel`` at ``size`` (of what ``SIZES`` names) on random activations."""
    drop: dict[str, Any] = {"dropout": dropout, "seed": 1} if dropout else {}

    def kept(like: Tensor) -> Tensor | float:
        """Return what the kernels multiply by under dropout, in the type of ``like``."""
        if not dropout:
            return 1.0
        T, d = like.shape
        return lora.keep_mask(T, d, dropout=dropout, seed=1, device=device).to(like.dtype) / (1.0 - dropout)

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device).mul_(columns**-0.5).to(dtype)

    def same(call: Callable[[], Any], plain: Callable[..., tuple[Tensor, ...]], *operands: Tensor) -> Workload:
        return Workload(call, call, lambda wide: plain(*(operand.to(wide) for operand in operands)))

    if kernel == "syrk":
        x, C = normal(TOKENS, size), torch.zeros(size, size, device=device)

        def added() -> tuple[Tensor, ...]:
            syrk.covariance_update(C.zero_(), x)
            return (C.tril(),)

        def product_of(wide: torch.dtype) -> tuple[Tensor, ...]:
            operand = x.to(torch.promote_types(wide, torch.float32))  # C is fp32 whatever x is
            return ((operand.t() @ operand).tril(),)

        return Workload(lambda: syrk.covariance_update(C, x), added, product_of)
    if kernel == "linear":
        x, weight, S, A = normal(size, WIDTH), normal(WIDTH, WIDTH), normal(size, 64), normal(64, WIDTH)
        B = A.t().contiguous()
        return same(
            lambda: (lora.forward(x, weight, S, B, scaling=1.0), lora.backward_dx(x, weight, S, A, **drop)),
            lambda x, w, s, b, a: (x @ w.t() + s @ b.t(), x @ w + kept(x) * (s @ a)),
            x, weight, S, B, A,
        )  # fmt: skip
    x, A = normal(TOKENS, WIDTH), normal(size, WIDTH)
    S, B = normal(TOKENS, size), normal(WIDTH, size)
    if kernel == "project":
        return same(lambda: (lora.project(x, A, **drop),), lambda x, a: ((kept(x) * x) @ a.t(),), x, A)
    if kernel == "outer":
        return same(lambda: (lora.backward_dA(S, x, **drop),), lambda s, x: (s.t() @ (kept(x) * x),), S, x)
    return same(
        lambda: lora.backward_dy(x, S, B, scaling=1.0),
        lambda x, s, b: (x @ b, x.t() @ s),
        x, S, B,
    )  # fmt: skip


def verifier(work: Workload, dtype: torch.dtype) -> Callable[[], None]:
    """Return a call that raises ArithmeticError if ``work``'s results are more than twice as wrong as torch's.

    Matrix units truncate each partial sum instead of rounding it, which leaves a sum of 8192 positive products 1e-5
    short: that much is granted, and more. One wrong tile or one step left out is a hundred times as far off.
    """

    def error(got: Tensor, truth: Tensor) -> float:
        return float((got.double() - truth).norm() / truth.norm())

    truths = work.plain(torch.float64)
    allowed = [2 * error(own, truth) + 1e-4 for own, truth in zip(work.plain(dtype), truths, strict=True)]

    def verify() -> None:
        for got, truth, most in zip(work.outputs(), truths, allowed, strict=True):
            if not (found := error(got, truth)) <= most:
                raise ArithmeticError(f"relative error {found:.3g}, at most {most:.3g} is right")

    return verify


def graph_ms(call: Callable[[], object], samples: int = 15) -> float:
    """Return the median time of ``call`` on the device, in ms, replayed as a CUDA graph: no launch gap counts.

    The L2 cache is overwritten before each sample, as other layers do between two calls of one.
    """
    current, aside = torch.cuda.current_stream(), torch.cuda.Stream()
    aside.wait_stream(current)
    with torch.cuda.stream(aside):
        for _ in range(2):
            call()
    current.wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        call()
    cache = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    pairs = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(samples)]
    for start, end in pairs:
        cache.zero_()
        start.record()
        graph.replay()
        end.record()
    torch.cuda.synchronize()
    return median(start.elapsed_time(end) for start, end in pairs)


def compile_ahead(kernel: str, entries: Sequence[dict[str, Any]], call: Callable[[], object]) -> None:
    """Compile what ``call`` launches with each entry, on all processors; what fails here fails again when timed."""
    import triton

    launch = runtime.launch

    def warm(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
        with torch.cuda.device(device):
            kernel.warmup(*args, grid=grid, enable_fp_fusion=True, **options)

    runtime.launch = warm
    try:
        # What failed at first is tried again, one at a time: threads that parse at once may make CPython's ast.parse
        # raise a SystemError, about once in a hundred compilations on 3.11.
        for workers in (os.cpu_count(), 1):
            with ThreadPoolExecutor(workers) as pool, triton.AsyncCompileMode(pool, ignore_errors=True):
                for entry in entries:
                    with config.forced(kernel, entry):
                        call()
    finally:
        runtime.launch = launch


def measure(
    kernels: Iterable[str],
    dtype: torch.dtype,
    arch: str,
    median_ms: Callable[[Callable[[], object]], float],
    *,
    device: str = "cuda",
    deadline: float = float("inf"),
    verified: Callable[[Workload, torch.dtype], Callable[[], None]] = verifier,
    prepare: Callable[[str, list[dict[str, Any]], Callable[[], object]], None] = compile_ahead,
) -> Iterator[dict[str, Any]]:
    """Yield, after every size of every kernel, a table overlay with the fastest candidates known for that kernel.

    A size at which no candidate runs is passed over with a warning; the entry of the next one serves it.

    Args:
        kernels: Keys of ``SIZES``.
        dtype: Of the operands.
        arch: Whose candidates.
        median_ms: Times a call in ms; it may raise what Triton raises for a candidate that does not fit.
        device: Where.
        deadline: On ``time.monotonic()``; afterwards nothing more is timed.
        verified: As ``verifier``.
        prepare: As ``compile_ahead``.
    """
    bits = "32" if dtype.itemsize >= 4 else "16"
    for kernel in kernels:
        name, sizes = SIZES[kernel]
        winners: list[dict[str, Any]] = []
        dropouts = DROPOUT.get(kernel, (0.0,))
        for (size, bound), dropout in product(zip(sizes, bounds(name, sizes), strict=True), dropouts):
            where = f"{kernel} {name}={size}" + (" with dropout" if dropout else "")
            if time.monotonic() > deadline:
                logger.warning("out of time before %s", where)
                return
            work = workload(kernel, size, dtype, device, dropout)
            entries = [*{str(entry): entry for entry in candidates(kernel, dtype, arch, size)}.values()]
            verify = verified(work, dtype)
            prepare(kernel, entries, work.call)
            best, least = None, float("inf")
            for entry in entries:
                if best and time.monotonic() > deadline:
                    break
                with config.forced(kernel, entry):
                    try:
                        verify()
                        spent = median_ms(work.call)
                    except Exception as error:
                        logger.info("%s passed over, %s: %.150s", entry, type(error).__name__, error)
                        continue
                if spent < least:
                    best, least = entry, spent
            if best is None:
                logger.warning("no configuration of %s ran on %s", where, arch)
                continue
            logger.info("%s: %.4f ms with %s", where, least, best)
            masked = {} if kernel not in DROPOUT else {"dropout_min": 1} if dropout else {"dropout_max": 0}
            winners.append({"when": {**bound, **masked, "aligned_min": 1}, **best})
            yield {"kernels": {kernel: {bits: winners + config.shipped(arch)["kernels"][kernel][bits]}}}


def bounds(name: str, sizes: tuple[int, ...]) -> list[dict[str, int]]:
    """Return the ``when`` of each size: up to the geometric mean with the next one, the last without end."""
    middles = [round((a * b) ** 0.5) for a, b in pairwise(sizes)]
    return [{f"{name}_max": middle} for middle in middles] + [{}]

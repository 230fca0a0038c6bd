"""Time launch configurations on this machine's GPU and keep the fastest as data.

    python -m lora_null.kernels.tune [--dtype bfloat16] [--kernels syrk linear project outer dy]

Every candidate runs on the sizes of `SIZES`; one that does not compile or does not fit is passed over. The
winners, with bounds halfway (geometrically) between the sizes, go to ``LORA_NULL_CACHE``, in front of the shipped
entries, which stay for what the winners do not cover. Nothing is ever timed while a model trains.

Which implementation computes a product, these kernels or the vendor's, is measured afterwards, by
``python -m lora_null.ops.tune`` and ``python -m lora_null.ops.tune_covariance``.
"""

import argparse
import logging
from collections.abc import Callable, Iterable, Iterator
from itertools import pairwise, product
from typing import Any

import torch
from torch import Tensor

from . import config, lora, syrk

__all__ = ["SIZES", "candidates", "main", "measure"]

logger = logging.getLogger("lora_null")

# The size that a kernel's entries are distinguished by, and its values: widths and ranks of LLaMA layers.
SIZES = {
    "syrk": ("d", (1024, 2048, 4096, 8192, 14336)),
    "linear": ("T", (512, 2048, 8192)),
    "project": ("r", (16, 64, 128, 384)),
    "outer": ("r", (16, 64, 128)),
    "dy": ("r", (16, 64, 128)),
}
TOKENS = 8192
WIDTH = 4096


def candidates(kernel: str, dtype: torch.dtype, arch: str) -> Iterator[dict[str, Any]]:
    """Yield the configurations to time: the shipped ones, then a grid around what public GEMMs use."""
    bits = "32" if dtype.itemsize >= 4 else "16"
    for entry in config.shipped(arch)["kernels"][kernel][bits]:
        yield {name: value for name, value in entry.items() if name != "when"}
    if bits == "32":
        return
    tma = arch in ("sm_90", "sm_100", "sm_103")
    ways: list[dict[str, Any]] = [{"TMA": True, "OCCUPANCY": o} for o in (1, 2)] * tma + [{}]
    if kernel == "syrk":
        tiles = [(128, 128, 4), (128, 128, 8), (256, 128, 8)]
        for (m, n, warps), k, stages, way in product(tiles, (32, 64), (3, 4), ways):
            yield {
                **way, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_T": k, "GROUP": 8, "ATOMIC": tma,
                "SLICE_STEPS": 6, "num_warps": warps, "num_stages": stages,
            }  # fmt: skip
    elif kernel == "linear":
        tiles = [(128, 128, 4), (128, 128, 8), (128, 256, 8), (256, 128, 8), (64, 128, 4)]
        for (t, n, warps), k, stages, way in product(tiles, (32, 64), (3, 4), ways):
            yield {
                **way, "BLOCK_T": t, "BLOCK_N": n, "BLOCK_K": k, "BLOCK_R": k, "GROUP": 8,
                "num_warps": warps, "num_stages": stages,
            }  # fmt: skip
    elif kernel == "project":
        for t, n, k, warps, stages in product((32, 64, 128), (128, 256), (64, 128), (4, 8), (3, 4)):
            yield {
                "BLOCK_T": t, "BLOCK_N": n, "BLOCK_K": k, "SLICE_STEPS": 4,
                "num_warps": warps, "num_stages": stages,
            }  # fmt: skip
    elif kernel == "outer":
        for t, n, r, warps, stages in product((32, 64), (64, 128), (64, 128), (4, 8), (3, 4)):
            yield {
                "BLOCK_T": t, "BLOCK_N": n, "BLOCK_R": r, "SLICE_STEPS": 6,
                "num_warps": warps, "num_stages": stages,
            }  # fmt: skip
    else:
        for rows, m, r, warps, mib in product((32, 64), (64, 128), (64, 128), (4, 8), (8, 24, 64)):
            yield {
                "ROWS": rows, "BLOCK_K": 64, "BLOCK_T": 64, "BLOCK_M": m, "BLOCK_R": r, "SLAB_BYTES": mib << 20,
                "SLICE_STEPS": 6, "num_warps": warps, "num_stages": 3,
            }  # fmt: skip


def workload(kernel: str, size: int, dtype: torch.dtype, device: str) -> Callable[[], object]:
    """Return a call that runs ``kernel`` at ``size`` (of what `SIZES` names) on random activations."""

    def normal(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, device=device).mul_(columns**-0.5).to(dtype)

    if kernel == "syrk":
        x, C = normal(TOKENS, size), torch.zeros(size, size, device=device)
        return lambda: syrk.covariance_update(C, x)
    if kernel == "linear":
        x, weight, S, A = normal(size, WIDTH), normal(WIDTH, WIDTH), normal(size, 64), normal(64, WIDTH)
        B = A.t().contiguous()
        return lambda: (
            lora.forward(x, weight, S, B, scaling=1.0),
            lora.backward_dx(x, weight, S, A),
        )
    x, A = normal(TOKENS, WIDTH), normal(size, WIDTH)
    S, B = normal(TOKENS, size), normal(WIDTH, size)
    if kernel == "project":
        return lambda: lora.project(x, (A,))
    if kernel == "outer":
        return lambda: lora.backward_dA(S, x)
    return lambda: lora.backward_dy(x, S, B, scaling=1.0)


def measure(
    kernels: Iterable[str],
    dtype: torch.dtype,
    arch: str,
    median_ms: Callable[[Callable[[], object]], float],
    device: str = "cuda",
) -> dict[str, Any]:
    """Return a table overlay with the fastest candidate of every kernel and size.

    Args:
        kernels: Keys of `SIZES`.
        median_ms: Times a call in ms; it may raise what Triton raises for a candidate that does not fit.
    """
    bits = "32" if dtype.itemsize >= 4 else "16"
    overlay: dict[str, Any] = {"kernels": {}}
    for kernel in kernels:
        name, sizes = SIZES[kernel]
        winners = []
        for size in sizes:
            call = workload(kernel, size, dtype, device)
            best, least = None, float("inf")
            for entry in candidates(kernel, dtype, arch):
                with config.forced(kernel, entry):
                    try:
                        time = median_ms(call)
                    except Exception as error:
                        logger.debug("%s %s: %s", kernel, entry, error)
                        continue
                if time < least:
                    best, least = entry, time
            if best is None:
                raise RuntimeError(f"no configuration of {kernel} ran at {name}={size} on {arch}")
            logger.info("%s %s=%d: %.4f ms with %s", kernel, name, size, least, best)
            winners.append(best)
        entries = [
            {"when": {**bound, "aligned_min": 1}, **winner}
            for winner, bound in zip(winners, bounds(name, sizes), strict=True)
        ]
        overlay["kernels"][kernel] = {bits: entries + config.shipped(arch)["kernels"][kernel][bits]}
    return overlay


def bounds(name: str, sizes: tuple[int, ...]) -> list[dict[str, int]]:
    """Return the ``when`` of each size: up to the geometric mean with the next one, the last without end."""
    middles = [round((a * b) ** 0.5) for a, b in pairwise(sizes)]
    return [{f"{name}_max": middle} for middle in middles] + [{}]


def main() -> None:
    """Measure on the current CUDA device and write the result."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0], prog="python -m lora_null.kernels.tune")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--kernels", nargs="+", default=list(SIZES), choices=list(SIZES))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: the kernels run on CUDA devices only")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    import triton
    from triton.testing import do_bench

    arch = config.architecture("cuda")
    overlay = measure(
        arguments.kernels,
        getattr(torch, arguments.dtype),
        arch,
        lambda call: do_bench(call, return_mode="median"),
    )
    device = torch.cuda.get_device_name()
    overlay["source"] = f"timed on {device}, torch {torch.__version__}, triton {triton.__version__}"
    logger.info("written to %s", config.save_tuned(arch, overlay))


if __name__ == "__main__":
    main()

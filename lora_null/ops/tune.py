"""Time what can be tuned on this machine's GPU: the kernels' configurations, then the choice between ways.

The command is ``lora-null tune``.

``kernels``: the launch configurations (:mod:`lora_null.kernels.tune`). ``covariance``: the symmetric kernel against
blocks through cuBLAS. ``linear``: each of the five products fused and through cuBLAS, on the layer shapes of LLaMA
models. The result goes to ``LORA_NULL_CACHE``, after every shape, so that an interrupted run keeps what it knows. A
kernel that fails, or whose result is not the vendor's to rounding, counts as endless. Nothing is ever timed while a
model trains.
"""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from itertools import product as every
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..kernels import config, lora, syrk
from ..kernels import tune as kernels
from . import covariance, vendor
from .dispatch import PRODUCTS

logger = logging.getLogger("lora_null")

PARTS = ("kernels", "covariance", "linear")
# Milliseconds of what must not be chosen.
ENDLESS = 1e6
# (m, d): attention and MLP of Llama-3-8B, then of Llama-3.2-1B.
LAYERS = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (2048, 2048), (512, 2048), (8192, 2048)]
WIDTHS = (1024, 2048, 4096, 8192, 14336)
TOKENS = (512, 2048, 8192)

Median = Callable[[Callable[[], object]], float]


def require_equal(result: object, truth: object) -> None:
    """Raise ArithmeticError unless tensors, or tuples of them, agree to the rounding of the less exact dtype."""
    if isinstance(result, tuple) and isinstance(truth, tuple):
        for one, other in zip(result, truth, strict=True):
            require_equal(one, other)
        return
    assert isinstance(result, Tensor) and isinstance(truth, Tensor)
    # Two roundings differ by half an eps of root mean square. Matrix units truncate partial sums: 1e-5 for 1e4 terms.
    limit = max(1e-4, *(torch.finfo(dtype).eps for dtype in (result.dtype, truth.dtype)))
    error = float((result.float() - truth.float()).norm() / truth.float().norm())
    if not error <= limit:
        raise ArithmeticError(f"the kernel's result is {error:.3g} off the vendor's, relative; at most {limit:.3g} is")


def verified_ms(name: str, call: Callable[[], object], verify: Callable[[], None], median_ms: Median) -> float:
    """Return the median of ``call``, or what is endless if it fails or ``verify`` raises."""
    try:
        verify()
        return median_ms(call)
    except Exception as error:
        logger.warning("%s: %s: %s", name, type(error).__name__, error)
        return ENDLESS


def products(
    T: int, d: int, m: int, r: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[ModuleType], Callable[[], object]]]:
    """Return, by product, a function from a namespace (``lora`` or ``vendor``) to a call ready to be timed."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        scale = columns**-0.5
        return (torch.randn(rows, columns, generator=generator, device=device) * scale).to(dtype)

    x, W, A, B = normal(T, d), normal(m, d), normal(r, d), normal(m, r)
    S, dy = normal(T, r), normal(T, m)
    return {
        "project": lambda way: lambda: way.project(x, A),
        "forward": lambda way: lambda: way.forward(x, W, S, B, scaling=1.0),
        "backward_dy": lambda way: lambda: way.backward_dy(dy, S, B, scaling=1.0, need_dS=True, need_dB=True),
        "backward_dx": lambda way: lambda: way.backward_dx(dy, W, S, A),
        "backward_dA": lambda way: lambda: way.backward_dA(S, x),
    }


def measure_linear(
    shapes: Iterable[tuple[int, int, int, int]], dtype: torch.dtype, device: str, median_ms: Median
) -> Iterator[dict]:
    """Yield one entry per shape ``(T, d, m, r)`` and product, in the form that ``dispatch.nearest`` reads."""
    for T, d, m, r in shapes:
        calls = products(T, d, m, r, dtype, device)
        for product in PRODUCTS:
            fused, plain = (calls[product](way) for way in (lora, vendor))
            verify = partial(_agree, fused, plain)
            triton = verified_ms(f"{product} at T={T}, d={d}, m={m}, r={r}", fused, verify, median_ms)
            yield {
                "product": product, "dtype": str(dtype).removeprefix("torch."), "T": T, "d": d, "m": m, "r": r,
                "triton_us": round(1e3 * triton, 2), "cublas_us": round(1e3 * median_ms(plain), 2),
            }  # fmt: skip


def save_linear(arch: str, entries: list[dict]) -> str:
    """Put the entries into the tuned data of ``arch``, in place of those for the same calls; return the path."""
    path = config.tuned_path(arch)
    data = json.loads(path.read_text()) if path.exists() else {}

    def call(entry: dict) -> tuple:
        return tuple(entry[name] for name in ("product", "dtype", "T", "d", "m", "r"))

    new = {call(entry) for entry in entries}
    kept = [entry for entry in data.get("dispatch", {}).get("linear", []) if call(entry) not in new]
    return str(config.save_tuned(arch, {"dispatch": {"linear": kept + entries}}))


def measure_covariance(dtype: torch.dtype, device: str, median_ms: Median) -> dict[str, Any]:
    """Return a table overlay with the faster backend for every width and number of tokens."""
    entries = []
    for d, width in zip(WIDTHS, kernels.bounds("d", WIDTHS), strict=True):
        C = torch.zeros(d, d, device=device)
        for T, tokens in zip(TOKENS, kernels.bounds("T", TOKENS), strict=True):
            x = torch.randn(T, d, device=device).to(dtype)
            fused, plain = (partial(update, C, x) for update in (syrk.covariance_update, covariance.update_by_blocks))
            verify = partial(_agree, *(partial(_sum, C, call) for call in (fused, plain)))
            triton = verified_ms(f"the symmetric kernel at d={d}, T={T}", fused, verify, median_ms)
            blocks = median_ms(plain)
            entries.append(
                {
                    "when": {**width, **tokens},
                    "backend": "triton" if triton < blocks else "blocks",
                    "triton_ms": round(triton, 5),
                    "blocks_ms": round(blocks, 5),
                }
            )
    bits = "32" if dtype.itemsize >= 4 else "16"
    return {"dispatch": {"covariance": {bits: entries}}}


def _agree(result: Callable[[], object], truth: Callable[[], object]) -> None:
    require_equal(result(), truth())


def _sum(C: Tensor, update: Callable[[], object]) -> Tensor:
    C.zero_()
    update()
    return C.tril()


def tune(
    only: Sequence[str] = PARTS,
    *,
    dtype: torch.dtype = torch.bfloat16,
    tokens: Sequence[int] = (8192, 2048),
    ranks: Sequence[int] = (16, 64, 128),
    minutes: float = float("inf"),
) -> Path:
    """Measure on the current CUDA device and return the file that the results are in.

    Args:
        only: Which of :data:`PARTS`.
        dtype: Of activations and weights.
        tokens: Of the linear's shapes.
        ranks: Of the linear's shapes.
        minutes: Start nothing more after this time.

    Raises:
        ValueError: There is no CUDA device, or a part of another name.
    """
    unknown = [part for part in only if part not in PARTS]
    if unknown or not only:
        raise ValueError(f"only is {', '.join(unknown) or 'empty'}; expected some of {', '.join(PARTS)}.")
    if not torch.cuda.is_available():
        raise ValueError("There is no CUDA device; expected one: on a CPU there is nothing to choose between.")
    import triton

    deadline = time.monotonic() + 60 * minutes
    arch = config.architecture("cuda")
    if "kernels" in only:
        name = torch.cuda.get_device_name()
        source = f"timed on {name}, torch {torch.__version__}, triton {triton.__version__}"
        for overlay in kernels.measure(list(kernels.SIZES), dtype, arch, kernels.graph_ms, deadline=deadline):
            config.save_tuned(arch, {**overlay, "source": source})
    if "covariance" in only and time.monotonic() < deadline:
        config.save_tuned(arch, measure_covariance(dtype, "cuda", kernels.graph_ms))
    if "linear" in only:
        shapes = [(T, d, m, r) for T, (m, d), r in every(tokens, LAYERS, ranks)]
        for shape in tqdm(shapes, unit="shape"):
            if time.monotonic() > deadline:
                logger.warning("out of time before T, d, m, r = %s", shape)
                break
            save_linear(arch, list(measure_linear([shape], dtype, "cuda", kernels.graph_ms)))
    return config.tuned_path(arch)

"""Time the fused kernels against the vendor's GEMM on this machine's GPU, for the choice between them.

    python -m lora_null.ops.tune [--dtype bfloat16] [--tokens 8192 2048] [--ranks 16 64 128] [--minutes 8]

Each of the five products is timed in both ways on the layer shapes of LLaMA models, and the medians are written next
to the kernels' tuned configurations (``LORA_NULL_CACHE``), after every shape. A kernel that fails, or whose result is
not the vendor's to rounding, counts as endless. Nothing is ever timed while a model trains.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Callable, Iterable, Iterator
from itertools import product as every

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..kernels import lora
from ..kernels.config import architecture, save_tuned, tuned_path
from . import vendor
from .dispatch import PRODUCTS

logger = logging.getLogger("lora_null")

# Microseconds of what must not be chosen.
ENDLESS = 1e9
# (m, d): attention and MLP of Llama-3-8B, then of Llama-3.2-1B.
LAYERS = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (2048, 2048), (512, 2048), (8192, 2048)]


def products(
    T: int, d: int, m: int, r: int, dtype: torch.dtype, device: str
) -> dict[str, Callable[[object], Callable[[], object]]]:
    """Return, by product, a function from a namespace (``lora`` or ``vendor``) to a call ready to be timed."""
    generator = torch.Generator(device).manual_seed(0)

    def normal(rows: int, columns: int) -> Tensor:
        scale = columns**-0.5
        return (torch.randn(rows, columns, generator=generator, device=device) * scale).to(dtype)

    x, W, A, B = normal(T, d), normal(m, d), normal(r, d), normal(m, r)
    S, dy = normal(T, r), normal(T, m)
    return {
        "project": lambda way: lambda: way.project(x, A),  # type: ignore[attr-defined]
        "forward": lambda way: lambda: way.forward(x, W, S, B, scaling=1.0),  # type: ignore[attr-defined]
        "backward_dy": lambda way: (
            lambda: way.backward_dy(dy, S, B, scaling=1.0, need_dS=True, need_dB=True)  # type: ignore[attr-defined]
        ),
        "backward_dx": lambda way: lambda: way.backward_dx(dy, W, S, A),  # type: ignore[attr-defined]
        "backward_dA": lambda way: lambda: way.backward_dA(S, x),  # type: ignore[attr-defined]
    }


def require_equal(found: object, wanted: object) -> None:
    """Raise ArithmeticError unless tensors, or tuples of them, agree to the rounding of the less exact dtype."""
    if isinstance(found, tuple) and isinstance(wanted, tuple):
        for one, other in zip(found, wanted, strict=True):
            require_equal(one, other)
        return
    assert isinstance(found, Tensor) and isinstance(wanted, Tensor)
    # Two roundings differ by half an eps of root mean square. Matrix units truncate partial sums: 1e-5 for 1e4 terms.
    limit = max(1e-4, *(torch.finfo(dtype).eps for dtype in (found.dtype, wanted.dtype)))
    error = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not error <= limit:
        raise ArithmeticError(f"the kernel's result is {error:.3g} off the vendor's, relative; at most {limit:.3g} is")


def measure(
    shapes: Iterable[tuple[int, int, int, int]],
    dtype: torch.dtype,
    device: str,
    median_ms: Callable[[Callable[[], object]], float],
) -> Iterator[dict]:
    """Yield one entry per shape ``(T, d, m, r)`` and product, in the form that ``dispatch.nearest`` reads."""
    for T, d, m, r in shapes:
        calls = products(T, d, m, r, dtype, device)
        for product in PRODUCTS:
            fused, plain = (calls[product](way) for way in (lora, vendor))
            try:
                require_equal(fused(), plain())
                triton = 1e3 * median_ms(fused)
            except Exception as error:
                logger.warning("%s at T=%d, d=%d, m=%d, r=%d: %s: %s", product, T, d, m, r, type(error).__name__, error)
                triton = ENDLESS
            cublas = 1e3 * median_ms(plain)
            yield {
                "product": product, "dtype": str(dtype).removeprefix("torch."), "T": T, "d": d, "m": m, "r": r,
                "triton_us": round(triton, 2), "cublas_us": round(cublas, 2),
            }  # fmt: skip


def write(arch: str, entries: list[dict]) -> str:
    """Put the entries into the tuned data of ``arch``, in place of those for the same calls; return the path."""
    path = tuned_path(arch)
    data = json.loads(path.read_text()) if path.exists() else {}

    def call(entry: dict) -> tuple:
        return tuple(entry[name] for name in ("product", "dtype", "T", "d", "m", "r"))

    new = {call(entry) for entry in entries}
    kept = [entry for entry in data.get("dispatch", {}).get("linear", []) if call(entry) not in new]
    return str(save_tuned(arch, {"dispatch": {"linear": kept + entries}}))


def main() -> None:
    """Measure on the current CUDA device and write the result."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog="python -m lora_null.ops.tune")
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[8192, 2048])
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64, 128])
    parser.add_argument("--minutes", type=float, default=float("inf"), help="start no further shape after this time")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to choose between on a CPU.")
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    from triton.testing import do_bench

    deadline = time.monotonic() + 60 * arguments.minutes
    shapes = [(T, d, m, r) for T, (m, d), r in every(arguments.tokens, LAYERS, arguments.ranks)]
    dtype, path = getattr(torch, arguments.dtype), ""
    for shape in tqdm(shapes, unit="shape"):
        if time.monotonic() > deadline:
            logger.warning("out of time before T, d, m, r = %s", shape)
            break
        found = measure([shape], dtype, "cuda", lambda call: do_bench(call, return_mode="median"))
        path = write(architecture("cuda"), list(found))
    print(path)


if __name__ == "__main__":
    main()

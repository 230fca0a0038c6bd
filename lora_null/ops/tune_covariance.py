"""Time the symmetric kernel against blocks through cuBLAS on this machine's GPU, for the choice between them.

    python -m lora_null.ops.tune_covariance [--dtype bfloat16]

The result is written next to the kernels' tuned configurations (``LORA_NULL_CACHE``); run
``python -m lora_null.kernels.tune`` first.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable
from typing import Any

import torch

from ..kernels import config, syrk
from ..kernels.tune import bounds
from . import covariance

WIDTHS = (1024, 2048, 4096, 8192, 14336)
TOKENS = (512, 2048, 8192)


def measure(dtype: torch.dtype, device: str, median_ms: Callable[[Callable[[], object]], float]) -> dict[str, Any]:
    """Return a table overlay with the faster backend for every width and number of tokens; ``median_ms`` in ms."""
    entries = []
    for d, width in zip(WIDTHS, bounds("d", WIDTHS), strict=True):
        C = torch.zeros(d, d, device=device)
        for T, tokens in zip(TOKENS, bounds("T", TOKENS), strict=True):
            x = torch.randn(T, d, device=device).to(dtype)
            kernel = median_ms(lambda C=C, x=x: syrk.covariance_update(C, x))  # type: ignore[misc]
            blocks = median_ms(lambda C=C, x=x: covariance._blocks(C, x, None))  # type: ignore[misc]
            entries.append(
                {
                    "when": {**width, **tokens},
                    "backend": "triton" if kernel < blocks else "blocks",
                    "triton_ms": round(kernel, 5),
                    "blocks_ms": round(blocks, 5),
                }
            )
    bits = "32" if dtype.itemsize >= 4 else "16"
    return {"dispatch": {"covariance": {bits: entries}}}


def main() -> None:
    """Measure on the current CUDA device and write the result."""
    parser = argparse.ArgumentParser(
        description=str(__doc__).splitlines()[0], prog="python -m lora_null.ops.tune_covariance"
    )
    parser.add_argument("--dtype", default="bfloat16", choices=["bfloat16", "float16", "float32"])
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("no CUDA device: there is nothing to choose between on a CPU")
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    from triton.testing import do_bench

    overlay = measure(getattr(torch, arguments.dtype), "cuda", lambda call: do_bench(call, return_mode="median"))
    path = config.save_tuned(config.architecture("cuda"), overlay)
    logging.getLogger("lora_null").info("written to %s", path)


if __name__ == "__main__":
    main()

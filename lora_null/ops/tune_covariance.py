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
from torch import Tensor

from ..kernels import config, syrk
from ..kernels.tune import bounds
from . import covariance
from .tune import ENDLESS, require_equal

logger = logging.getLogger("lora_null")

WIDTHS = (1024, 2048, 4096, 8192, 14336)
TOKENS = (512, 2048, 8192)


def measure(dtype: torch.dtype, device: str, median_ms: Callable[[Callable[[], object]], float]) -> dict[str, Any]:
    """Return a table overlay with the faster backend for every width and number of tokens; ``median_ms`` in ms."""
    entries = []
    for d, width in zip(WIDTHS, bounds("d", WIDTHS), strict=True):
        C = torch.zeros(d, d, device=device)
        for T, tokens in zip(TOKENS, bounds("T", TOKENS), strict=True):
            x = torch.randn(T, d, device=device).to(dtype)

            def by_kernel(C=C, x=x) -> Tensor:
                syrk.covariance_update(C, x)
                return C

            def by_blocks(C=C, x=x) -> Tensor:
                covariance._blocks(C, x, None)
                return C

            try:
                C.zero_()
                found = by_kernel().tril()
                C.zero_()
                require_equal(found, by_blocks().tril())
                kernel = median_ms(by_kernel)
            except Exception as error:
                logger.warning("the kernel at d=%d, T=%d: %s: %s", d, T, type(error).__name__, error)
                kernel = ENDLESS
            blocks = median_ms(by_blocks)
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
    logger.info("written to %s", path)


if __name__ == "__main__":
    main()

"""What every launcher needs: is Triton there, what is the device, start a kernel.

Nothing here imports Triton before a launcher asks for it, so that the package loads on machines without it.
"""

from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from ..system.environment import interprets_triton
from . import config
from .config import cdiv

__all__ = [
    "aligned",
    "descriptor",
    "interpreting",
    "launch",
    "multiprocessors",
    "padded",
    "precision",
    "reduce",
    "splits_for",
    "unavailable",
]


@cache
def _installed() -> bool:
    return find_spec("triton") is not None


def interpreting() -> bool:
    """Say whether kernels run in Triton's interpreter, on CPU tensors (``TRITON_INTERPRET=1``)."""
    return interprets_triton()


def unavailable(device: torch.device) -> str | None:
    """Return why Triton kernels cannot run on ``device``, or None if they can."""
    if not _installed():
        return "triton is not installed"
    if device.type != "cuda" and not interpreting():
        return f"the tensors are on {device.type}, the kernels run on CUDA devices"
    if device.type == "cuda" and not torch.version.hip and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{config.architecture(device)} has no bf16 matrix units; sm_80 or later is needed"
    return None


@cache
def _multiprocessors(index: int) -> int:
    return torch.cuda.get_device_properties(index).multi_processor_count


def multiprocessors(device: torch.device) -> int:
    """Return the number of multiprocessors of ``device``; 1 in the interpreter."""
    if device.type != "cuda":
        return 1
    return _multiprocessors(device.index if device.index is not None else torch.cuda.current_device())


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *args: Any, **options: Any) -> None:
    """Start ``kernel`` on ``device``'s current stream, whichever device is current in the caller."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            kernel[grid](*args, enable_fp_fusion=True, **options)
    else:
        for name in ("num_warps", "num_stages"):
            options.pop(name, None)
        kernel[grid](*args, **options)


def aligned(x: Tensor) -> bool:
    """Say whether tensor descriptors can address ``x``: 16-byte base and row strides, unit columns, no overlap."""
    rows_fit = all(stride * x.itemsize % 16 == 0 and stride >= x.shape[-1] for stride in x.stride()[:-1])
    return x.data_ptr() % 16 == 0 and x.stride(-1) == 1 and rows_fit


def descriptor(x: Tensor, *block: int) -> Any:
    """Return a tensor descriptor of an ``aligned`` ``x`` for blocks of the given sides."""
    from triton.tools.tensor_descriptor import TensorDescriptor

    return TensorDescriptor.from_tensor(x, list(block))


def padded(size: int) -> int:
    """Return the smallest tile side that holds ``size``: a power of two, 16 or more for the matrix units."""
    return max(16, 1 << (size - 1).bit_length())


def splits_for(tiles: int, steps: int, slice_steps: int, device: torch.device, occupancy: int = 1) -> int:
    """Return into how many parts to cut sums of ``steps`` steps, one sum to each of ``tiles`` programs.

    The device runs ``occupancy`` programs on each multiprocessor at a time; 136 tiles on 132 of them take as
    long as 264. Cutting evens that out, and each part costs as much as ``slice_steps`` steps for its slice of
    partial sums. The cheapest number wins, the smaller one of equals; it leaves no part empty.
    """
    return _splits(tiles, steps, slice_steps, multiprocessors(device) * occupancy)


# Up to 63 rounds of Python, 6 to 12 us: more than a launch.
@lru_cache(maxsize=4096)
def _splits(tiles: int, steps: int, slice_steps: int, slots: int) -> int:
    best, least = 1, cdiv(tiles, slots) * steps
    for parts in range(2, min(steps, 64) + 1):
        cost = cdiv(tiles * parts, slots) * (cdiv(steps, parts) + slice_steps)
        if cost < least:
            best, least = parts, cost
    return cdiv(steps, cdiv(steps, best))


def precision(x: Tensor) -> str:
    """Return how fp32 operands are multiplied: exactly, or in TF32 where torch's own switch allows that."""
    if x.dtype == torch.float32 and x.device.type == "cuda" and not torch.version.hip:
        # both of torch's interfaces set this one; `get_float32_matmul_precision` raises after the use of the newer
        return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"
    return "ieee"


def reduce(part: Tensor, out: Tensor) -> None:
    """Add the slices of ``part (slices, ...)`` fp32 in their order into ``out (...)``, contiguous."""
    from .tiles import reduce_kernel

    block = 1024
    grid = (cdiv(out.numel(), block),)
    launch(reduce_kernel, grid, out.device, part, out, out.numel(), part.shape[0], BLOCK=block)

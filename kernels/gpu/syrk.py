"""Launcher of the symmetric kernel ``C += X^T X``."""

import torch
from torch import Tensor

from . import config, runtime
from .config import cdiv

__all__ = ["covariance_update", "supported"]

# Tokens summed in fp32 before they are added to an fp64 C.
FLUSH = 8192
# Offsets inside a tile are 32-bit: 256 rows of this many elements stay below 2^31.
_MAX_STRIDE = 1 << 22


def supported(x: Tensor, *, dtype: torch.dtype = torch.float32) -> str | None:
    """Return why the kernel cannot add ``x^T x`` into a C of ``dtype``, or None if it can."""
    reason = runtime.unavailable(x.device)
    if reason is not None:
        return reason
    if x.dtype not in (torch.bfloat16, torch.float16, torch.float32):
        return f"x is {x.dtype}"
    if dtype not in (torch.float32, torch.float64):
        return f"C is {dtype}"
    if x.dim() > 1 and x.stride(-2) > _MAX_STRIDE:
        return f"x has row stride {x.stride(-2)}"
    return None


def covariance_update(C: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    """Add ``x^T x`` to the lower triangle of ``C`` in place; what lies above the diagonal is unspecified.

    Args:
        C: ``(d, d)`` fp32 or fp64, unit column stride. Into fp64 every 8192 tokens are flushed: it costs the
            memory that a compensated fp32 pair would, and one addition per element and launch.
        x: ``(T, d)`` bf16, fp16 or fp32, any row stride. fp32 is multiplied in full fp32, never TF32.
        mask: bool ``(T,)``, True = the row counts; others are not read.
    """
    if x.shape[1] > 1 and x.stride(1) != 1:
        x = x.contiguous()
    step = FLUSH if C.dtype == torch.float64 else max(x.shape[0], 1)
    for start in range(0, x.shape[0], step):
        part = slice(start, start + step)
        _launch(C, x[part], None if mask is None else mask[part].contiguous())


def _launch(C: Tensor, x: Tensor, mask: Tensor | None) -> None:
    T, d = x.shape
    aligned = runtime.aligned(x)
    c = config.launch_config(
        config.SyrkConfig, x.dtype, config.architecture(x.device), tma=aligned and x.itemsize == 2 and mask is None,
        multiprocessors=runtime.multiprocessors(x.device), T=T, d=d, aligned=int(aligned),
    )  # fmt: skip
    tiles = c.tiles(d=d)
    splits = runtime.splits_for(tiles, cdiv(T, c.BLOCK_T), c.SLICE_STEPS, x.device, c.OCCUPANCY)
    # a tile of fp64 beside its fp32 sum would not fit into the registers: it goes through a slice of its own
    direct = splits == 1 and C.dtype == torch.float32
    part = C
    if not direct:
        shape = (splits, tiles, c.BLOCK_M, c.BLOCK_N)
        part = torch.empty(shape, device=x.device, dtype=torch.float32)
    from . import syrk_kernels

    walk = dict(BLOCK_M=c.BLOCK_M, BLOCK_N=c.BLOCK_N, GROUP=c.GROUP)
    tile = dict(
        **walk, BLOCK_T=c.BLOCK_T, ATOMIC=c.ATOMIC, DIRECT=direct, num_warps=c.num_warps, num_stages=c.num_stages
    )
    if c.TMA:
        left = runtime.descriptor(x, c.BLOCK_T, c.BLOCK_M)
        right = runtime.descriptor(x, c.BLOCK_T, c.BLOCK_N)
        programs = min(tiles * splits, runtime.multiprocessors(x.device) * c.OCCUPANCY)
        runtime.launch(
            syrk_kernels.syrk_tma_kernel, (programs,), x.device,
            left, right, C, part, T, d, tiles, splits, C.stride(0), **tile,
        )  # fmt: skip
    else:
        runtime.launch(
            syrk_kernels.syrk_kernel, (tiles, splits), x.device,
            x, mask, C, part, T, d, tiles, splits, x.stride(0), C.stride(0), **tile,
            EVEN_D=d % max(c.BLOCK_M, c.BLOCK_N) == 0, MASK=mask is not None, PRECISION="ieee",
        )  # fmt: skip
    if not direct:
        rows = min(32, 4096 // c.BLOCK_N)  # 32 rows of 256 spill with Triton 3.6
        runtime.launch(
            syrk_kernels.syrk_reduce_kernel, (tiles, c.BLOCK_M // rows), x.device,
            part, C, d, tiles, splits, C.stride(0), **walk, ROWS=rows,
        )  # fmt: skip

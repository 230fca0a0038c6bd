"""``C += X^T X`` over a stream of activations, one triangle only.

Four ways to compute it. ``triton``: the symmetric kernel of :mod:`lora_null.kernels.syrk`. ``compiled``: the C++ kernel
for x86 CPUs, which multiplies bf16 as bf16 where the CPU can. ``blocks``: rectangles of the lower triangle through
BLAS, which every device has; on CUDA cuBLAS multiplies bf16 and fp16 operands and writes fp32. ``torch``: the full
product, the definition that the others are tested against.

:func:`lora_null.ops.covariance_backend` says which of them a call takes.
"""

import torch
from torch import Tensor

from ..kernels import syrk
from ..system import extension
from .dispatch import covariance_backend
from .reference import covariance_update_reference, full_precision

__all__ = ["covariance_update", "symmetrize_"]

# Halving stops here. On 2 CPU cores (fp32, d = T = 4096) leaves of 128 to 384 run at 1.79x to 1.81x the full
# product, 512 at 1.70x (more wasted above the diagonal). A GPU needs larger products to fill its cores: one of 2048 by
# 2048 is 128 tiles of 128 x 256, as many as an H100 works on at a time, so that d = 4096 takes 3 rounds and the full
# product 4; leaves of 1024, each a round of 32 tiles, would take 7. By arithmetic; not measured.
_LEAF = {"cpu": 256, "cuda": 2048}
# Side of the blocks that :func:`symmetrize_` transposes. On the CPU they stay in the cache (d = 4096: 18 ms of one
# core, against 71 ms in strips of 1024 rows); on a GPU the number of launches counts.
_MIRROR = {"cpu": 256}
# Elements of x converted or gathered at a time on the CPU: 64 MiB in fp32.
_CHUNK = 1 << 24


def covariance_update(C: Tensor, x: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Add ``x^T x`` to the lower triangle of ``C`` in place.

    Args:
        C: ``(d, d)`` fp32 or fp64, unit column stride, rows that do not overlap. Only elements on and below the
            diagonal are results; what lies above is unspecified until :func:`symmetrize_` is called, once, at the
            end of the stream. With fp64, every 8192 tokens are summed in fp32 and flushed into C on CUDA; on the
            CPU the product itself is fp64.
        x: ``(..., d)`` bf16, fp16, fp32 (fp64 only into an fp64 ``C``) on C's device, any strides, in other memory
            than C. Products below fp32's least normal number, 1.2e-38 (of entries below 1e-19), may count as zero: bf16
            instructions of CPUs and a GPU's additions in its L2 cache flush them.
        mask: bool, ``x.shape[:-1]``; rows where it is False do not count, even if they hold NaN.

    Returns:
        ``C`` itself.

    Raises:
        ValueError, TypeError: for shapes, types, devices or memory that do not fit together; C is then unchanged.
    """
    _check(C, x, mask)
    torch.ops.lora_null.covariance_update(C, x.detach(), mask)
    return C


def symmetrize_(C: Tensor) -> Tensor:
    """Mirror the lower triangle of ``C`` ``(d, d)`` to the upper one, in place, and return ``C``.

    Works block by block: no second ``d x d`` matrix is allocated.
    """
    _require_tensors("symmetrize_", C=C)
    if C.dim() != 2 or C.shape[0] != C.shape[1]:
        raise ValueError(f"symmetrize_: expected a square matrix (d, d), got shape {tuple(C.shape)}")
    d, side = C.shape[0], _MIRROR.get(C.device.type, 4096)
    for start in range(0, d, side):
        end = min(start + side, d)
        corner = C[start:end, start:end]
        corner.copy_(corner.tril() + corner.tril(-1).t())
        for below in range(end, d, side):
            block = C[below : below + side, start:end]
            # torch transposes between contiguous tensors in tiles, and strided ones element by element
            C[start:end, below : below + side].copy_(block.contiguous().t().contiguous())
    return C


def _check(C: Tensor, x: Tensor, mask: Tensor | None) -> None:
    _require_tensors("covariance_update", C=C, x=x)
    if C.dim() != 2 or C.shape[0] != C.shape[1]:
        raise ValueError(f"covariance_update: C must be square (d, d), got shape {tuple(C.shape)}")
    if x.dim() < 1 or x.shape[-1] != C.shape[0]:
        raise ValueError(
            f"covariance_update: x has shape {tuple(x.shape)}, but C {tuple(C.shape)} expects "
            f"(..., {C.shape[0]}); C belongs to a layer of another width"
        )
    if C.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"covariance_update: C is {C.dtype}, expected float32 or float64; lower precision destroys "
            "the smallest eigenvalues, which are the result"
        )
    if not x.is_floating_point() or (x.dtype == torch.float64 and C.dtype != torch.float64):
        raise TypeError(
            f"covariance_update: x is {x.dtype} and C {C.dtype}; expected bfloat16, float16 or float32, "
            "or float64 with a float64 C"
        )
    if C.device != x.device:
        raise ValueError(f"covariance_update: C is on {C.device} and x on {x.device}; allocate C on the input's device")
    if C.shape[0] > 1 and (C.stride(1) != 1 or C.stride(0) < C.shape[0]):
        raise ValueError(
            f"covariance_update: C needs unit column stride and rows that do not overlap, got strides {C.stride()}; "
            "an expanded or transposed C needs .contiguous()"
        )
    if mask is not None and (mask.dtype != torch.bool or mask.shape != x.shape[:-1]):
        raise ValueError(
            f"covariance_update: mask is {mask.dtype} {tuple(mask.shape)}, expected bool "
            f"{tuple(x.shape[:-1])} (True = the token counts); an attention mask of 0 and 1 needs .bool()"
        )


def _require_tensors(what: str, **tensors: object) -> None:
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{what}: {name} is a {type(tensor).__name__}; expected a torch tensor: C (d, d), x (..., d), in this "
                "order. Stack a list of batches, or call it for each."
            )


def _check_memory(C: Tensor, x: Tensor, mask: Tensor | None) -> None:
    """Refuse operands that lie in C's memory: they would change while they are read.

    From first to last byte: with any strides it cannot be told what lies in between.
    """
    begin, end = _bytes(C)
    for name, tensor in (("x", x), ("mask", mask)):
        if tensor is None:
            continue
        first, last = _bytes(tensor)
        if first < end and begin < last:
            raise ValueError(
                f"covariance_update: {name} lies in the memory of C, which changes while {name} is read; is it a view "
                f"of C, or of a buffer around it? Pass {name}.clone()"
            )


def _bytes(tensor: Tensor) -> tuple[int, int]:
    """Return the addresses of a tensor's first byte and of the one after its last."""
    elements = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.data_ptr(), tensor.data_ptr() + elements * tensor.itemsize


@torch.library.custom_op("lora_null::covariance_update", mutates_args=("C",))
def _covariance_update(C: Tensor, x: Tensor, mask: Tensor | None) -> None:
    if x.numel() == 0:
        return
    _check_memory(C, x, mask)
    rows = x.reshape(-1, x.shape[-1])
    counts = None if mask is None else mask.reshape(-1)
    name = covariance_backend(x, dtype=C.dtype)
    if name == "triton":
        syrk.covariance_update(C, rows, counts)
    elif name == "torch":
        covariance_update_reference(C, rows, mask=counts)
    elif name == "compiled":
        _compiled(C, rows, counts)
    else:
        update_by_blocks(C, rows, counts)


@_covariance_update.register_fake
def _(C: Tensor, x: Tensor, mask: Tensor | None) -> None:
    return None


def _compiled(C: Tensor, x: Tensor, mask: Tensor | None) -> None:
    module = extension.load()
    assert module is not None
    if mask is None:
        module.covariance_update(C, x)
        return
    step = max(_CHUNK // x.shape[1], 256)
    for start in range(0, x.shape[0], step):
        module.covariance_update(C, x[start : start + step][mask[start : start + step]])


def update_by_blocks(C: Tensor, x: Tensor, mask: Tensor | None = None) -> None:
    """Update the lower triangle through BLAS: both halves of the diagonal, then the square below them.

    Halving gives products that are as square as they can be; rows of blocks would be thin near the top (1.79x
    against 1.68x the full product at d = T = 4096 on 2 CPU cores).
    """
    leaf = _LEAF.get(x.device.type, 1024)
    on_cpu = x.device.type == "cpu"
    if x.dtype == C.dtype:
        step = x.shape[0]
    elif on_cpu:
        step = max(_CHUNK // x.shape[1], 256)
    else:
        step = syrk.FLUSH if C.dtype == torch.float64 else x.shape[0]
    with full_precision():
        for start in range(0, x.shape[0], step):
            piece = x[start : start + step]
            if mask is not None:
                keep = mask[start : start + step]
                # indexing by a mask makes a CUDA stream wait for the count
                piece = piece[keep] if on_cpu else piece.masked_fill(~keep[:, None], 0)
            if on_cpu:
                piece = piece.to(C.dtype)
            if 1 not in piece.stride():
                piece = piece.contiguous()
            _halve(C, piece, 0, C.shape[0], leaf)


def _halve(C: Tensor, x: Tensor, start: int, end: int, leaf: int) -> None:
    if end - start <= leaf:
        _add_product(C[start:end, start:end], x[:, start:end], x[:, start:end])
        return
    # a multiple of 64 keeps every operand of the products aligned to cache lines and vector registers
    middle = start + ((end - start) // 2 + 63) // 64 * 64
    _halve(C, x, start, middle, leaf)
    _halve(C, x, middle, end, leaf)
    _add_product(C[middle:end, start:middle], x[:, middle:end], x[:, start:middle])


def _add_product(block: Tensor, left: Tensor, right: Tensor) -> None:
    """``block += left^T right`` with fp32 accumulation whatever the operands' type."""
    if left.dtype == block.dtype:
        block.addmm_(left.t(), right)
    elif block.dtype == torch.float32:
        torch.addmm(block, left.t(), right, out_dtype=torch.float32, out=block)
    elif left.dtype == torch.float32:
        # autocast would make a product without ``out`` in half precision
        block.add_(torch.mm(left.t(), right, out=left.new_empty(block.shape)))
    else:
        block.add_(torch.mm(left.t(), right, out_dtype=torch.float32))

"""Launchers of the base + LoRA linear ``y = x W^T + s (x A^T) B^T + bias`` and of its gradients.

Shapes: x ``(T, d)``, W ``(m, d)``, A ``(r, d)``, B ``(m, r)``, S = drop(x) A^T ``(T, r)``, dy and y ``(T, m)``.
Every matrix has unit column stride and any row stride; outputs are allocated here, contiguous. x, W and dy are
bf16, fp16 or fp32 and share their type; the small matrices may also be fp32 and are converted to it. Sums are
fp32; fp32 operands are multiplied in full fp32 unless ``torch.set_float32_matmul_precision`` allows TF32. All
sums have a fixed order: the same call gives the same bits.
"""

from types import ModuleType

import torch
from torch import Tensor

from . import config, runtime
from .config import cdiv
from .dropout import Dropout, keep_mask
from .runtime import padded, splits_for

__all__ = ["backward_dA", "backward_dx", "backward_dy", "forward", "keep_mask", "project", "supported"]

MAX_RANK = 512
_TYPES = (torch.bfloat16, torch.float16, torch.float32)
# Offsets inside a tile are 32-bit: 256 rows of this many elements stay below 2^31.
_MAX_STRIDE = 1 << 22


def supported(x: Tensor, weight: Tensor, *small: Tensor, rank: int | None = None) -> str | None:
    """Return why the kernels cannot take these tensors, or None if they can.

    Args:
        x: ``(T, d)`` or ``(T, m)``, as ``forward`` or ``backward_dx`` get it.
        weight: ``(m, d)``.
        small: A's, B, S, dS; their types and places are checked.
        rank: r; taken from the second dimension of the first small matrix if it is not given.
    """
    reason = runtime.unavailable(x.device)
    if reason is not None:
        return reason
    if type(weight) not in (Tensor, torch.nn.Parameter):
        return f"the weight is a {type(weight).__name__}"
    if x.dtype not in _TYPES:
        return f"x is {x.dtype}"
    if weight.dtype != x.dtype:
        return f"x is {x.dtype} and the weight {weight.dtype}"
    if any(t.dtype not in (x.dtype, torch.float32) for t in small):
        return f"x is {x.dtype} and an adapter matrix {[t.dtype for t in small]}"
    if any(t.device != x.device for t in (weight, *small)):
        return "the tensors are on several devices"
    if any(t.dim() != 2 for t in (x, weight, *small)):
        return "a matrix is not 2-D"
    for t in (x, weight):
        if t.shape[1] > 1 and t.stride(1) != 1:
            return f"a matrix has column stride {t.stride(1)}"
        if t.stride(0) > _MAX_STRIDE:
            return f"a matrix has row stride {t.stride(0)}"
    r = rank if rank is not None else (min(small[0].shape) if small else 1)
    if not 1 <= r <= MAX_RANK:
        return f"rank {r} is outside 1..{MAX_RANK}"
    return None


def project(x: Tensor, lora_A: Tensor, *, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Return ``S (T, r) = drop(x) A^T`` in x's type.

    The mask of the dropout is :func:`keep_mask`'s; kept elements are scaled by 1/(1-p).
    """
    return _project_rows(x, _operand(lora_A, x), 1.0, dropout, seed)


def forward(
    x: Tensor, weight: Tensor, S: Tensor, lora_B: Tensor, *, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """Return ``y (T, m) = x W^T + scaling * S B^T + bias`` in x's type, summed in one accumulator."""
    return _base_and_low_rank(x, weight, S, lora_B, bias, scaling, transposed=False, dropout=0.0, seed=0)


def backward_dx(
    dy: Tensor, weight: Tensor, dS: Tensor, lora_A: Tensor, *, dropout: float = 0.0, seed: int = 0
) -> Tensor:
    """Return ``dx (T, d) = dy W + drop'(dS A)``; drop' masks and scales by 1/(1-p) as the forward's drop did."""
    return _base_and_low_rank(dy, weight, dS, lora_A, None, 1.0, transposed=True, dropout=dropout, seed=seed)


def backward_dy(
    dy: Tensor,
    S: Tensor | None,
    lora_B: Tensor | None,
    *,
    scaling: float,
    need_dS: bool = True,
    need_dB: bool = True,
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``dS (T, r) = scaling * dy B`` in dy's type and ``dB (m, r) = scaling * dy^T S`` in fp32.

    What is not needed is None; without dB, S may be None, and without dS, lora_B may be.
    """
    if need_dS and lora_B is None:
        raise ValueError("backward_dy: need_dS=True needs lora_B (m, r), got None")
    if need_dB and S is None:
        raise ValueError("backward_dy: need_dB=True needs S (T, r), got None")
    if lora_B is not None and S is not None and need_dS and need_dB:
        return _gradients_of_dy(dy, _operand(S, dy), _operand(lora_B, dy), scaling)
    dS = _project_rows(dy, _operand(lora_B, dy).t(), scaling, 0.0, 0) if lora_B is not None and need_dS else None
    dB = _accumulate_outer(dy, S, scaling, False, 0.0, 0) if S is not None and need_dB else None
    return dS, dB


def backward_dA(dS: Tensor, x: Tensor, *, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Return ``dA (r, d) = dS^T drop(x)`` in fp32."""
    return _accumulate_outer(x, dS, 1.0, True, dropout, seed)


def _project_rows(x: Tensor, factor: Tensor, scaling: float, dropout: float, seed: int) -> Tensor:
    """Return ``scaling * drop(x) factor^T`` ``(T, R)`` in x's type, factor ``(R, K)`` with any strides."""
    (T, K), R = x.shape, factor.shape[0]
    out = _empty(x, T, R)
    if T == 0:
        return out
    aligned, arch = int(runtime.aligned(x)), config.architecture(x.device)
    sizes = {"T": T, "d": K, "r": R, "aligned": aligned, "dropout": int(dropout > 0)}
    c = config.launch_config(config.ProjectConfig, x.dtype, arch, tma=False, **sizes)
    block_n = min(padded(R), c.BLOCK_N)
    tiles = cdiv(T, c.BLOCK_T) * cdiv(R, block_n)
    splits = splits_for(tiles, cdiv(K, c.BLOCK_K), c.SLICE_STEPS, x.device)
    target = out if splits == 1 else _empty(x, splits, T, R, dtype=torch.float32)
    words = Dropout.of(dropout, seed)
    runtime.launch(
        _kernels().project_kernel, (tiles, splits), x.device,
        x, factor, target, T, K, R, splits, x.stride(0), factor.stride(0), factor.stride(1),
        scaling * words.scale, *words[:3],
        BLOCK_T=c.BLOCK_T, BLOCK_N=block_n, BLOCK_K=c.BLOCK_K, EVEN_K=K % c.BLOCK_K == 0, DROPOUT=dropout > 0,
        PRECISION=runtime.precision(x), num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if splits > 1:
        runtime.reduce(target, out)
    return out


def _accumulate_outer(y: Tensor, S: Tensor, scaling: float, transposed: bool, dropout: float, seed: int) -> Tensor:
    """Return ``scaling * drop(y)^T S`` ``(N, r)`` or its transpose, a sum over the tokens, in fp32."""
    S = _operand(S, y)
    (T, N), R = y.shape, S.shape[1]
    shape = (R, N) if transposed else (N, R)
    out = _empty(y, *shape, dtype=torch.float32)
    if T == 0:
        return out.zero_()
    aligned, arch = int(runtime.aligned(y)), config.architecture(y.device)
    sizes = {"T": T, "d": N, "r": R, "aligned": aligned, "dropout": int(dropout > 0)}
    c = config.launch_config(config.OuterConfig, y.dtype, arch, tma=False, **sizes)
    block_r = min(padded(R), c.BLOCK_R)
    tiles = cdiv(N, c.BLOCK_N) * cdiv(R, block_r)
    splits = splits_for(tiles, cdiv(T, c.BLOCK_T), c.SLICE_STEPS, y.device)
    target = out if splits == 1 else _empty(y, splits, *shape, dtype=torch.float32)
    words = Dropout.of(dropout, seed)
    runtime.launch(
        _kernels().outer_kernel, (tiles, splits), y.device,
        y, S, target, T, N, R, splits, y.stride(0), S.stride(0), *((1, N) if transposed else (R, 1)),
        scaling * words.scale, *words[:3],
        BLOCK_T=c.BLOCK_T, BLOCK_N=c.BLOCK_N, BLOCK_R=block_r, EVEN_N=N % c.BLOCK_N == 0, DROPOUT=dropout > 0,
        PRECISION=runtime.precision(y), num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if splits > 1:
        runtime.reduce(target, out)
    return out


def _gradients_of_dy(dy: Tensor, S: Tensor, lora_B: Tensor, scaling: float) -> tuple[Tensor, Tensor]:
    """Return dS and dB as :func:`backward_dy` does, while dy crosses the DRAM bus once."""
    (T, M), R = dy.shape, S.shape[1]
    dS = _empty(dy, T, R)
    dB = _empty(dy, M, R, dtype=torch.float32)
    if T == 0:
        return dS, dB.zero_()
    c = config.launch_config(config.DyConfig, dy.dtype, config.architecture(dy.device), T=T, m=M, r=R)
    block_r = min(padded(R), c.BLOCK_R)
    tiles_r, tiles_m = cdiv(R, block_r), cdiv(M, c.BLOCK_M)
    # whole row tiles of both roles; small enough to be found in the L2 cache by the second of them
    unit = max(c.ROWS, c.BLOCK_T)
    slab = min(max(c.SLAB_BYTES // (M * dy.itemsize * unit), 1), cdiv(T, unit)) * unit
    slabs = cdiv(T, slab)
    splits_m = splits_for(cdiv(T, c.ROWS) * tiles_r, cdiv(M, c.BLOCK_K), c.SLICE_STEPS, dy.device)
    splits_t = splits_for(slabs * tiles_m * tiles_r, slab // c.BLOCK_T, c.SLICE_STEPS, dy.device)
    while slab // c.BLOCK_T % splits_t:
        splits_t -= 1
    part_dS = dS if splits_m == 1 else _empty(dy, splits_m, T, R, dtype=torch.float32)
    part_dB = dB if slabs * splits_t == 1 else _empty(dy, slabs * splits_t, M, R, dtype=torch.float32)
    programs = slab // c.ROWS * tiles_r * splits_m + tiles_m * tiles_r * splits_t
    runtime.launch(
        _kernels().dy_kernel, (slabs * programs,), dy.device,
        dy, S, lora_B, part_dS, part_dB, T, M, R, dy.stride(0), S.stride(0), *lora_B.stride(), scaling,
        slab, splits_m, splits_t,
        ROWS=c.ROWS, BLOCK_K=c.BLOCK_K, BLOCK_T=c.BLOCK_T, BLOCK_M=c.BLOCK_M, BLOCK_R=block_r,
        EVEN_M=M % max(c.BLOCK_M, c.BLOCK_K) == 0, PRECISION=runtime.precision(dy),
        num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if part_dS is not dS:
        runtime.reduce(part_dS, dS)
    if part_dB is not dB:
        runtime.reduce(part_dB, dB)
    return dS, dB


def _base_and_low_rank(
    x: Tensor, weight: Tensor, S: Tensor, factor: Tensor, bias: Tensor | None, scaling: float,
    *, transposed: bool, dropout: float, seed: int,
) -> Tensor:  # fmt: skip
    """Return ``x W^T + scaling * drop'(S factor^T) + bias``, or with ``transposed`` ``x W + drop'(S factor)``."""
    S, factor = _operand(S, x), _operand(factor, x)
    (T, K), R = x.shape, S.shape[1]
    N = weight.shape[1] if transposed else weight.shape[0]
    y = _empty(x, T, N)
    if T == 0:
        return y
    aligned = all(runtime.aligned(t) for t in (x, weight, S, factor))
    words = Dropout.of(dropout, seed)
    scalars = (scaling * words.scale, *words[:3])
    plain = scalars[0] == 1.0 and dropout == 0.0
    c = config.launch_config(
        config.LinearConfig, x.dtype, config.architecture(x.device), tma=aligned and x.itemsize == 2,
        multiprocessors=runtime.multiprocessors(x.device), T=T, d=K, m=N, r=R, aligned=int(aligned),
        dropout=int(dropout > 0), plain=int(plain),
    )  # fmt: skip
    tiles, block_r = c.tiles(T=T, m=N), min(padded(R), c.BLOCK_R)
    tile = dict(
        BLOCK_T=c.BLOCK_T, BLOCK_N=c.BLOCK_N, BLOCK_K=c.BLOCK_K, BLOCK_R=block_r, GROUP=c.GROUP,
        BIAS=bias is not None, DROPOUT=dropout > 0, num_warps=c.num_warps, num_stages=c.num_stages,
    )  # fmt: skip
    if c.TMA:
        programs = min(tiles, runtime.multiprocessors(x.device) * c.OCCUPANCY)
        lefts = [runtime.descriptor(t, c.BLOCK_T, k) for t, k in ((x, c.BLOCK_K), (S, block_r))]
        sides = [(c.BLOCK_N, k)[:: -1 if transposed else 1] for k in (c.BLOCK_K, block_r)]
        rights = [runtime.descriptor(t, *side) for t, side in zip((weight, factor), sides, strict=True)]
        runtime.launch(
            _kernels().linear_tma_kernel, (programs,), x.device,
            lefts[0], rights[0], lefts[1], rights[1], bias, y, T, N, K, R, N, *scalars, **tile, TRANSPOSED=transposed,
            ONE_LOOP=c.ONE_LOOP and plain and block_r >= R,
        )  # fmt: skip
    else:
        # to the kernel W is (N, K) and the factor (N, R), whichever way they lie in memory
        order = (1, 0) if transposed else (0, 1)
        runtime.launch(
            _kernels().linear_kernel, (tiles,), x.device,
            x, weight, S, factor, bias, y, T, N, K, R, x.stride(0), *(weight.stride(i) for i in order),
            S.stride(0), *(factor.stride(i) for i in order), N, *scalars,
            **tile, EVEN_N=N % c.BLOCK_N == 0, EVEN_K=K % c.BLOCK_K == 0, PRECISION=runtime.precision(x),
        )  # fmt: skip
    return y


def _kernels() -> ModuleType:
    """Import the kernels, and with them Triton, at the first launch: this module loads without it."""
    from . import lora_kernels

    return lora_kernels


def _operand(matrix: Tensor, x: Tensor) -> Tensor:
    """Return an adapter matrix in x's type with unit column stride; x itself is never converted."""
    matrix = matrix.to(x.dtype)
    return matrix if matrix.stride(1) == 1 or matrix.shape[1] == 1 else matrix.contiguous()


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, device=like.device, dtype=dtype or like.dtype)

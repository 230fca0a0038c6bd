"""The five products of an adapted linear through the vendor's GEMM: cuBLAS on CUDA, oneDNN or MKL on CPU.

Same functions and arguments as the Triton launchers in ``lora_null.kernels.lora``. A low-rank product is
accumulated into the large one (``beta = 1``), or the large one into it, instead of being written, scaled and added:
that leaves 8 of the 16 extra passes over a ``(T, d)`` matrix that separate operations make. Matrices are 2-D:
``x (T, d)``, ``dy (T, m)``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import reference


def project(x: Tensor, lora_A: Tensor, *, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Return ``S = drop(x) A^T`` ``(T, r)`` in ``x.dtype``."""
    x = reference.dropped(x, dropout, seed) if dropout else x
    return torch.mm(x, lora_A.to(x.dtype).t())


def forward(
    x: Tensor, weight: Tensor, projected: Tensor, lora_B: Tensor, *, scaling: float, bias: Tensor | None = None
) -> Tensor:
    """Return ``y = x W^T + s S B^T + bias`` ``(T, m)``."""
    # The large product first, and as torch does it: with B = 0, y has the bits of the layer without an adapter.
    y = torch.nn.functional.linear(x, weight, bias)
    return y.addmm_(projected, lora_B.to(y.dtype).t(), alpha=scaling)


def backward_dy(
    dy: Tensor, projected: Tensor | None, lora_B: Tensor | None, *, scaling: float, need_dS: bool, need_dB: bool
) -> tuple[Tensor | None, Tensor | None]:
    """Return ``dS = s dy B`` ``(T, r)`` in ``dy.dtype`` and ``dB = s dy^T S`` ``(m, r)``, each where needed."""
    dS = dB = None
    if need_dS:
        assert lora_B is not None
        dS = _scaled_mm(dy, lora_B.to(dy.dtype), scaling)
    if need_dB:
        assert projected is not None
        dB = _mm_fp32(dy.t(), projected, scaling)
    return dS, dB


def backward_dx(
    dy: Tensor, weight: Tensor, dS: Tensor, lora_A: Tensor, *, dropout: float = 0.0, seed: int = 0
) -> Tensor:
    """Return ``dx = dy W + drop'(dS A)`` ``(T, d)``."""
    A = lora_A.to(dS.dtype)
    if dropout:
        return reference.dropped(torch.mm(dS, A), dropout, seed).addmm_(dy, weight)
    # Where a product accumulates at no cost, the small one comes first: the large one reads it while it multiplies.
    # Those of oneDNN in bf16 take 1 to 6 % longer for it (2-core EPYC).
    if dy.is_cuda or dy.dtype.itemsize > 2:
        return torch.mm(dS, A).addmm_(dy, weight)
    return torch.mm(dy, weight).addmm_(dS, A)


def backward_dA(dS: Tensor, x: Tensor, *, dropout: float = 0.0, seed: int = 0) -> Tensor:
    """Return ``dA = dS^T drop(x)`` ``(r, d)``."""
    x = reference.dropped(x, dropout, seed) if dropout else x
    return _mm_fp32(dS.t(), x)


def _scaled_mm(a: Tensor, b: Tensor, alpha: float) -> Tensor:
    if alpha == 1:
        return torch.mm(a, b)
    # beta = 0 ignores the uninitialised operand; alpha scales before the only rounding.
    return a.new_empty(a.shape[0], b.shape[1]).addmm_(a, b, beta=0, alpha=alpha)


def _mm_fp32(a: Tensor, b: Tensor, alpha: float = 1.0) -> Tensor:
    """Multiply with an fp32 result where the vendor library offers one; gradients of fp32 factors deserve it."""
    if a.is_cuda and torch.version.cuda and a.dtype in (torch.bfloat16, torch.float16):
        return torch.mm(a, b, out_dtype=torch.float32).mul_(alpha)
    return _scaled_mm(a, b, alpha)

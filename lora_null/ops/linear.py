"""The adapted linear layer as differentiable operations: ``y = x W^T + s drop(x) A^T B^T + bias``.

    lora_linear      S = drop(x) A^T,  y = x W^T + s S B^T + bias
    backward         dS = s dy B + (gradient of S from elsewhere),  dx = dy W + drop'(dS A),
                     dA = dS^T drop(x),  dB = s dy^T S
    lora_up_linear   the same with S ready made: one projection serves the layers that read the same x

Forward and backward are ``torch.library`` custom operations without in-place effects. ``needs_input_grad`` decides
what is saved and computed: with A and W frozen, S ``(T, r)`` is kept and x is not. The products themselves come
from the backend that :mod:`lora_null.ops.dispatch` names. A compiler gets plain operations to trace where
:func:`lora_null.ops.dispatch.traced_plainly` says so; in eager code C++ makes the vendor's products where it can.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..system import extension
from . import dispatch, linear_autograd, reference
from .operation import autocast_dtype


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    training: bool = True,
    seed: int | Tensor | None = None,
) -> Tensor:
    """Apply a linear layer and its low-rank adapter: ``y = x W^T + s drop(x) A^T B^T + bias``.

    Differentiable once in every tensor argument; forward mode runs plain torch operations. ``weight`` and ``bias``
    are usually frozen; if one requires a gradient it gets the exact one, at the price of keeping x. Under autocast
    everything runs in the autocast dtype, as ``torch.nn.functional.linear`` does.

    Args:
        x: ``(..., d)``, bf16, fp16, fp32 or fp64.
        weight: ``W (m, d)`` in the dtype of ``x``.
        lora_A: ``A (r, d)``, in the dtype of ``x`` or another: the small factors are cast, never ``x``.
        lora_B: ``B (m, r)``.
        scaling: The factor ``s``.
        bias: ``(m,)``.
        dropout: Probability of dropping an entry of the adapter's input, in ``[0, 1)``. The mask is made again
            in the backward from a seed, and never stored. Not inside a captured CUDA graph.
        training: ``False`` switches the dropout off.
        seed: Seed of the dropout mask; by default drawn from torch's CPU generator.

    Returns:
        ``y (..., m)`` in the dtype of ``x``, contiguous.

    Raises:
        ValueError: Shapes or probabilities do not fit.
        TypeError: ``x`` and ``weight`` differ in dtype outside autocast.
        RuntimeError: A fallback was necessary and ``LORA_NULL_STRICT=1``; a second derivative is asked for; or
            dropout inside a CUDA graph that is being captured.
    """
    dropout = _dropout_in_effect(dropout, training)
    if not dropout and (found := _compiled("lora_linear", x, weight, lora_A, lora_B, bias, None, scaling)) is not None:
        return found[0]
    if dispatch.use_reference(x, weight, lora_A, lora_B, bias):
        return reference.lora_linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, dropout=dropout, seed=seed)
    x, weight, bias = _cast_for_autocast(x, weight, bias)
    _check(x, weight, bias, lora_A=lora_A, lora_B=lora_B)
    if dispatch.traced_plainly(x, dropout):
        return reference.lora_linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias)
    seed = _seed(dropout, seed)
    return linear_autograd.lora_linear(x, weight, lora_A, lora_B, bias, None, float(scaling), dropout, seed)[0]


def lora_linear_and_projection(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    mixing: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return ``(y, S)`` of :func:`lora_linear` without dropout, ``S = x A^T`` ``(..., r)`` differentiable in x and A.

    For the first of several layers that read the same x: the others take S through :func:`lora_up_linear`, their
    gradients of S come back to this operation, and ``dS A`` joins x's gradient inside this layer's own product.
    With ``mixing`` the layer's own factor is ``M A``, as in :func:`lora_up_linear`.
    """
    if (found := _compiled("lora_linear", x, weight, lora_A, lora_B, bias, mixing, scaling)) is not None:
        return found
    if dispatch.use_reference(x, weight, lora_A, lora_B, bias, mixing):
        return reference.lora_linear_and_projection(
            x, weight, lora_A, lora_B, scaling=scaling, bias=bias, mixing=mixing
        )
    x, weight, bias = _cast_for_autocast(x, weight, bias)
    _check(x, weight, bias, mixing, lora_A=lora_A, lora_B=lora_B)
    if dispatch.traced_plainly(x, 0.0):
        return reference.lora_linear_and_projection(
            x, weight, lora_A, lora_B, scaling=scaling, bias=bias, mixing=mixing
        )
    return linear_autograd.lora_linear(x, weight, lora_A, lora_B, bias, mixing, float(scaling), 0.0, None)


def lora_up_linear(
    x: Tensor,
    weight: Tensor,
    projected: Tensor,
    lora_B: Tensor,
    *,
    scaling: float = 1.0,
    bias: Tensor | None = None,
    mixing: Tensor | None = None,
) -> Tensor:
    """Apply a linear layer and the upper half of its adapter: ``y = x W^T + s P (B M)^T + bias``.

    Args:
        x: ``(..., d)``.
        weight: ``W (m, d)`` in the dtype of ``x``.
        projected: ``P (..., p)``, a projection of x made elsewhere. Its gradient is ``s dy B M``; gradients of
            several layers that take the same P are summed by autograd, in rank-p space.
        lora_B: ``B (m, r)``.
        scaling: The factor ``s``.
        bias: ``(m,)``.
        mixing: ``M (r, p)``, where P is ``x U^T`` with a factor U ``(p, d)`` of several layers and this layer's
            is ``A = M U``. A constant, which gets no gradient; its dtype is that of the product ``B M``, which is
            made again in the backward and not kept. Without it M is the identity and P is ``x A^T``.

    Returns:
        ``y (..., m)``. Errors are those of :func:`lora_linear`.
    """
    if (found := _compiled("lora_up_linear", x, weight, projected, lora_B, bias, mixing, scaling)) is not None:
        return found
    if dispatch.use_reference(x, weight, projected, lora_B, bias, mixing):
        return reference.lora_up_linear(x, weight, projected, lora_B, scaling=scaling, bias=bias, mixing=mixing)
    x, weight, bias = _cast_for_autocast(x, weight, bias)
    projected = projected.to(x.dtype)
    _check(x, weight, bias, mixing, projected=projected, lora_B=lora_B)
    if dispatch.traced_plainly(x, 0.0):
        return reference.lora_up_linear(x, weight, projected, lora_B, scaling=scaling, bias=bias, mixing=mixing)
    return linear_autograd.lora_up_linear(x, weight, projected, lora_B, bias, mixing, float(scaling))


def _compiled(name: str, *arguments: Any) -> Any:
    """Let C++ make the products and their backward; ``None`` where it cannot, or Python has something to say.

    The interpreter takes longer over a call than the products do wherever there are few tokens.
    """
    if torch.compiler.is_compiling() or dispatch.transformed() or (module := extension.ready()) is None:
        return None
    *tensors, scaling = arguments
    return getattr(module, name)(*tensors, float(scaling), dispatch.LAUNCH_BOUND)


def _dropout_in_effect(dropout: float, training: bool) -> float:
    if not 0.0 <= dropout < 1.0:
        raise ValueError(f"dropout is {dropout!r}; expected a probability in [0, 1).")
    return float(dropout) if training else 0.0


def _seed(dropout: float, seed: int | Tensor | None) -> Tensor | None:
    if not dropout:
        return None
    if not torch.compiler.is_compiling() and torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        raise RuntimeError(
            f"dropout={dropout} while a CUDA graph is captured: the seed is read on the host, so that every replay "
            "would drop the same entries. Capture with dropout=0, or run this layer outside the graph."
        )
    if seed is None:
        return reference.draw_seed()
    return seed if isinstance(seed, Tensor) else torch.tensor(seed, dtype=torch.int64)


def _cast_for_autocast(x: Tensor, *others: Tensor | None) -> tuple:
    """Cast as autocast would. The small factors are left to the operations, which cast them in any case."""
    dtype = autocast_dtype(x.device.type)
    if dtype is None:
        return x, *others
    return tuple(t if t is None or t.dtype == dtype or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))


def _check(
    x: Tensor,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    mixing: Tensor | None = None,
    **factors: Tensor,
) -> None:
    d = x.shape[-1] if x.ndim else None
    lora_A, lora_B, projected = (factors.get(name) for name in ("lora_A", "lora_B", "projected"))
    if weight is not None and weight.shape[1] != d:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}: expected x (..., d) and weight (m, d) with the "
            "same d. A weight stored as (d, m), as in GPT-2's Conv1D, has to be transposed."
        )
    if weight is not None and weight.dtype != x.dtype:
        raise TypeError(
            f"x is {x.dtype} and weight {weight.dtype}: expected the same dtype. Often x comes from a normalisation "
            "kept in fp32; run the model under torch.autocast, or cast x."
        )
    if lora_A is not None and lora_A.shape[1] != d:
        raise ValueError(f"lora_A is {tuple(lora_A.shape)}, but x has {d} features: expected (r, {d}).")
    if projected is not None and projected.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"projected is {tuple(projected.shape)} and x {tuple(x.shape)}: expected the same leading dimensions; "
            "was the projection made from another x?"
        )
    if weight is None or lora_B is None:
        return
    r = lora_A.shape[0] if lora_A is not None else projected.shape[-1] if projected is not None else None
    if mixing is not None:
        if mixing.ndim != 2 or mixing.shape[1] != r:
            raise ValueError(f"mixing is {tuple(mixing.shape)}: expected (r, {r}) for a projection of rank {r}.")
        if mixing.requires_grad:
            raise ValueError("mixing requires a gradient, but is a constant here; multiply it into lora_B instead.")
        r = mixing.shape[0]
    if tuple(lora_B.shape) != (weight.shape[0], r):
        raise ValueError(f"lora_B is {tuple(lora_B.shape)}: expected (m, r) = ({weight.shape[0]}, {r}).")
    if bias is not None and tuple(bias.shape) != (weight.shape[0],):
        raise ValueError(f"bias is {tuple(bias.shape)}: expected (m,) = ({weight.shape[0]},).")

"""The adapted linear layer as differentiable operations: ``y = x W^T + s drop(x) A^T B^T + bias``.

    lora_linear      S = drop(x) A^T,  y = x W^T + s S B^T + bias
    backward         dS = s dy B + (gradient of S from elsewhere),  dx = dy W + drop'(dS A),
                     dA = dS^T drop(x),  dB = s dy^T S
    lora_up_linear   the same with S ready made: one projection serves the layers that read the same x

Forward and backward are ``torch.library`` custom operations without in-place effects. ``needs_input_grad`` decides
what is saved and computed: with A and W frozen, S ``(T, r)`` is kept and x is not. Which implementation a call takes,
:mod:`lora_null.ops.dispatch` says.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..system.tensors import PLAIN_TENSORS
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
    return call("lora_linear", x, weight, lora_A, lora_B, bias, None, scaling, dropout, seed)


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
    return call("lora_linear_and_projection", x, weight, lora_A, lora_B, bias, mixing, scaling)


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
    return call("lora_up_linear", x, weight, projected, lora_B, bias, mixing, scaling)


def call(
    name: str,
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    mixing: Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    seed: int | Tensor | None = None,
    *,
    may_refuse: bool = False,
) -> Any:
    """Check a call and give it to the implementation that :mod:`lora_null.ops.dispatch` names.

    ``name`` is that of one of the functions above: with A as its factor, or P for ``lora_up_linear``. With
    ``may_refuse`` it returns ``None`` for tensors that only torch's own operators understand.
    """
    operands: tuple = (x, weight, factor, lora_B)
    if bias is not None or mixing is not None:
        operands += tuple(tensor for tensor in (bias, mixing) if tensor is not None)
    for tensor in operands:
        if not isinstance(tensor, Tensor):
            raise TypeError(
                f"{name}: an operand is a {type(tensor).__name__}; expected torch tensors x, weight, lora_A (or "
                "projected) and lora_B, in this order, and perhaps a bias. Pass the weight of a layer, and stack lists."
            )
    compiled = dispatch.compiled(x, weight, lora_B, dropout)
    if compiled is not None:
        outputs = getattr(compiled, name)(x, weight, factor, lora_B, bias, mixing, float(scaling))
        if outputs is not None:
            return outputs
    if may_refuse and dispatch.reason_against(x, *operands[1:]) is not None:
        return None
    projected = name == "lora_up_linear"
    way = dispatch.choose(x, weight, factor, lora_B, bias, mixing, dropout=dropout)
    if way == "torch":
        _check_plain(x, weight, factor, lora_B, projected)
    else:
        x, weight, bias = _cast_for_autocast(x, weight, bias)
        factor = factor.to(x.dtype) if projected else factor
    # autocast casts in torch's own operators, and what is quantised has a dtype of its own
    foreign = way == "torch" and (type(weight) not in PLAIN_TENSORS or autocast_dtype(x.device.type) is not None)
    _check(x, weight, factor, lora_B, bias, mixing, projected, foreign)
    if way == "operation":
        if projected:
            return linear_autograd.lora_up_linear(x, weight, factor, lora_B, bias, mixing, float(scaling))
        words = _seed(dropout, seed)
        both = linear_autograd.lora_linear(x, weight, factor, lora_B, bias, mixing, float(scaling), dropout, words)
    elif projected:
        return reference.lora_up_linear(x, weight, factor, lora_B, scaling=scaling, bias=bias, mixing=mixing)
    else:
        both = reference.lora_linear_and_projection(
            x, weight, factor, lora_B, scaling=scaling, bias=bias, mixing=mixing, dropout=dropout, seed=seed
        )
    return both[0] if name == "lora_linear" else both


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


def _check_plain(x: Tensor, weight: Tensor, factor: Tensor, lora_B: Tensor, projected: bool) -> None:
    """Refuse what no operator of torch understands either."""
    if weight.ndim != 2:
        raise ValueError(
            f"weight is {tuple(weight.shape)}; expected a matrix (m, d). FSDP1 flattens weights outside its forward, "
            "and quantised ones are packed: dequantise it, or call this inside summon_full_params."
        )
    operands = (x, weight, factor, lora_B)
    places = [tensor.device for tensor in operands]
    if all(type(tensor) in PLAIN_TENSORS for tensor in operands) and any(place != x.device for place in places):
        names = ("x", "weight", "projected" if projected else "lora_A", "lora_B")
        found = ", ".join(f"{name} on {place}" for name, place in zip(names, places, strict=True))
        raise ValueError(f"{found}; expected one device. Move them with .to().")


def _check(
    x: Tensor,
    weight: Tensor,
    factor: Tensor,
    lora_B: Tensor,
    bias: Tensor | None,
    mixing: Tensor | None,
    projected: bool,
    foreign: bool,
) -> None:
    if not factor.ndim or (factor.ndim != 2 and not projected):
        raise ValueError(f"lora_A, or the projection, is {tuple(factor.shape)}; expected (r, d), or (..., r).")
    d, m = x.shape[-1] if x.ndim else None, weight.shape[0]
    if weight.shape[1] != d:
        raise ValueError(
            f"x is {tuple(x.shape)} and weight {tuple(weight.shape)}: expected x (..., d) and weight (m, d) with the "
            "same d. A weight stored as (d, m), as in GPT-2's Conv1D, has to be transposed."
        )
    if weight.dtype != x.dtype and not foreign:
        raise TypeError(
            f"x is {x.dtype} and weight {weight.dtype}: expected the same dtype. Often x comes from a normalisation "
            "kept in fp32; run the model under torch.autocast, or cast x."
        )
    if not projected and factor.shape[1] != d:
        raise ValueError(f"lora_A is {tuple(factor.shape)}, but x has {d} features: expected (r, {d}).")
    if projected and factor.shape[:-1] != x.shape[:-1]:
        raise ValueError(
            f"projected is {tuple(factor.shape)} and x {tuple(x.shape)}: expected the same leading dimensions; "
            "was the projection made from another x?"
        )
    r = factor.shape[-1] if projected else factor.shape[0]
    if mixing is not None:
        if mixing.ndim != 2 or mixing.shape[1] != r:
            raise ValueError(f"mixing is {tuple(mixing.shape)}: expected (r, {r}) for a projection of rank {r}.")
        if mixing.requires_grad:
            raise ValueError("mixing requires a gradient, but is a constant here; multiply it into lora_B instead.")
        r = mixing.shape[0]
    if tuple(lora_B.shape) != (m, r):
        raise ValueError(f"lora_B is {tuple(lora_B.shape)}: expected (m, r) = ({m}, {r}).")
    if bias is not None and tuple(bias.shape) != (m,):
        raise ValueError(f"bias is {tuple(bias.shape)}: expected (m,) = ({m},).")

"""The custom operations behind :mod:`lora_null.ops.linear`: plain tensors in, plain tensors out, nothing in place.

What both share comes first, then ``y, S`` from x and A, then ``y`` from a projection made elsewhere. Each reads: body,
its shapes, what is saved, the gradient of autograd, the backward (an operation of its own that returns the gradients
that are needed, in the order of the inputs), its shapes, registration. Gradients of the small factors leave it in fp32
and are cast to the factor's dtype outside.
"""

from __future__ import annotations

import torch
from torch import Tensor

from . import dispatch
from .operation import Operation


def _rows(x: Tensor) -> Tensor:
    """View ``(..., n)`` as ``(T, n)`` with unit inner stride, copying only where that is impossible."""
    flat = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    return flat if flat.stride(1) == 1 or flat.shape[1] == 1 else flat.contiguous()


def _unrows(rows: Tensor, lead: torch.Size) -> Tensor:
    """Give ``(T, n)`` the leading dimensions back; not a view to autograd, so that callers may write into it."""
    return rows if len(lead) == 1 else torch.ops.aten._unsafe_view(rows, (*lead, rows.shape[1]))


def _factor_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _spread(gradients: list[Tensor], needs: list[bool], dtypes: list[torch.dtype | None], inputs: int) -> tuple:
    """Put the gradients at the positions that asked for one, cast to the inputs' dtypes."""
    remaining = iter(gradients)
    spread = [next(remaining).to(dtype) if need and dtype else None for need, dtype in zip(needs, dtypes, strict=True)]
    return (*spread, *[None] * (inputs - len(spread)))


def _dtypes(*tensors: Tensor | None) -> list[torch.dtype | None]:
    return [None if t is None else t.dtype for t in tensors]


def _folded(lora_B, mixing):
    """Return ``B M (m, p)`` for a projection of which A is ``M`` times the factor, in the precision of M.

    Made again in the backward: as many bytes as B would otherwise be kept for every layer.
    """
    return lora_B if mixing is None else torch.mm(lora_B.to(mixing.dtype), mixing)


def _unfolded(dB, mixing):
    """Turn the gradient of ``B M`` into that of B."""
    return dB if mixing is None else torch.mm(dB.to(mixing.dtype), mixing.t())


def _lora_linear(x, weight, lora_A, lora_B, bias, mixing, scaling, dropout, seed):
    """Return ``y = x W^T + s S (B M)^T + bias`` ``(..., m)`` and ``S = drop(x) A^T`` ``(..., r)``."""
    rows, number = _rows(x), int(seed) if dropout else 0
    plan = dispatch.plan(rows, weight.shape[0], lora_A.shape[0], weight=weight, dropout=dropout)
    S = plan.project(rows, lora_A, dropout=dropout, seed=number)
    y = plan.forward(rows, weight, S, _folded(lora_B, mixing), scaling=scaling, bias=bias)
    return _unrows(y, x.shape[:-1]), _unrows(S, x.shape[:-1])


def _lora_linear_fake(x, weight, lora_A, lora_B, bias, mixing, scaling, dropout, seed):
    return x.new_empty(*x.shape[:-1], weight.shape[0]), x.new_empty(*x.shape[:-1], lora_A.shape[0])


def _lora_linear_setup(ctx, inputs, output):
    x, weight, lora_A, lora_B, bias, mixing, ctx.scaling, ctx.dropout, seed = inputs
    need_x, need_W, need_A, need_B, _ = ctx.needs = list(ctx.needs_input_grad[:5])
    ctx.set_materialize_grads(False)
    ctx.dtypes = _dtypes(x, weight, lora_A, lora_B, bias)
    ctx.m, ctx.d = weight.shape
    ctx.save_for_backward(
        x if need_A or need_W else None,
        weight if need_x else None,
        lora_A if need_x else None,
        lora_B if need_x or need_A else None,
        output[1] if need_B else None,
        mixing,
        seed,
    )
    if not (need_x or need_A):
        ctx.mark_non_differentiable(output[1])


def _lora_linear_grad(ctx, dy, dS):
    if dy is None and dS is None:
        return (None,) * 9
    needs = ctx.needs
    if dy is None:
        dy = dS.new_zeros(*dS.shape[:-1], ctx.m)
        needs = [needs[0], False, needs[2], False, False]
    gradients = lora_linear_backward(dy, dS, *ctx.saved_tensors, ctx.d, ctx.scaling, ctx.dropout, needs)
    return _spread(gradients, needs, ctx.dtypes, 9)


def _lora_linear_backward(dy, dS_elsewhere, x, weight, lora_A, lora_B, S, mixing, seed, d, scaling, dropout, needs):
    """Return the needed ones of ``dx, dW, dA, dB, dbias``; S got a gradient from this layer and may have elsewhere."""
    need_x, need_W, need_A, need_B, need_bias = needs
    dy_rows, number = _rows(dy), int(seed) if dropout else 0
    need_dS = need_x or need_A
    folded_B, S_rows = _folded(lora_B, mixing) if need_dS else None, _rows(S) if need_B else None
    r = S.shape[-1] if need_B else folded_B.shape[1] if need_dS else 0
    plan = dispatch.plan(dy_rows, dy.shape[-1], r, weight=weight, d=d, dropout=dropout)
    dS, dB = plan.backward_dy(dy_rows, S_rows, folded_B, scaling=scaling, need_dS=need_dS, need_dB=need_B)
    if dS_elsewhere is not None and dS is not None:
        dS.add_(_rows(dS_elsewhere))
    gradients = []
    if need_x:
        dx = plan.backward_dx(dy_rows, weight, dS, lora_A, dropout=dropout, seed=number)
        gradients.append(_unrows(dx, dy.shape[:-1]))
    if need_W:
        gradients.append(torch.mm(dy_rows.t(), _rows(x)))
    if need_A:
        dA = plan.backward_dA(dS, _rows(x), dropout=dropout, seed=number)
        gradients.append(dA.to(_factor_dtype(dy.dtype)))
    if need_B:
        gradients.append(_unfolded(dB, mixing).to(_factor_dtype(dy.dtype)))
    if need_bias:
        gradients.append(dy_rows.sum(0))
    return gradients


def _lora_linear_backward_fake(dy, dS, x, weight, lora_A, lora_B, S, mixing, seed, d, scaling, dropout, needs):
    need_x, need_W, need_A, need_B, need_bias = needs
    m, factor = dy.shape[-1], _factor_dtype(dy.dtype)
    gradients = []
    if need_x:
        gradients.append(dy.new_empty(*dy.shape[:-1], d))
    if need_W:
        gradients.append(dy.new_empty(m, d))
    if need_A:
        gradients.append(dy.new_empty((lora_B if mixing is None else mixing).shape[1], d, dtype=factor))
    if need_B:
        gradients.append(dy.new_empty(m, S.shape[-1] if mixing is None else mixing.shape[0], dtype=factor))
    if need_bias:
        gradients.append(dy.new_empty(m))
    return gradients


lora_linear = Operation(
    "lora_null::lora_linear",
    "(Tensor x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor? bias, Tensor? mixing, float scaling,"
    " float dropout, Tensor? seed) -> (Tensor, Tensor)",
    _lora_linear,
    _lora_linear_fake,
    setup=_lora_linear_setup,
    gradient=_lora_linear_grad,
)
lora_linear_backward = Operation(
    "lora_null::lora_linear_backward",
    "(Tensor dy, Tensor? dS, Tensor? x, Tensor? weight, Tensor? lora_A, Tensor? lora_B, Tensor? S,"
    " Tensor? mixing, Tensor? seed, SymInt d, float scaling, float dropout, bool[] needs) -> Tensor[]",
    _lora_linear_backward,
    _lora_linear_backward_fake,
)


def _lora_up_linear(x, weight, projected, lora_B, bias, mixing, scaling):
    """Return ``y = x W^T + s P (B M)^T + bias`` ``(..., m)``."""
    rows = _rows(x)
    plan = dispatch.plan(rows, weight.shape[0], projected.shape[-1], weight=weight)
    y = plan.forward(rows, weight, _rows(projected), _folded(lora_B, mixing), scaling=scaling, bias=bias)
    return _unrows(y, x.shape[:-1])


def _lora_up_linear_fake(x, weight, projected, lora_B, bias, mixing, scaling):
    return x.new_empty(*x.shape[:-1], weight.shape[0])


def _lora_up_linear_setup(ctx, inputs, output):
    x, weight, projected, lora_B, bias, mixing, ctx.scaling = inputs
    need_x, need_W, need_P, need_B, _ = ctx.needs = list(ctx.needs_input_grad[:5])
    ctx.dtypes = _dtypes(x, weight, projected, lora_B, bias)
    ctx.d = weight.shape[1]
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(
        x if need_W else None,
        weight if need_x else None,
        projected if need_B else None,
        lora_B if need_P else None,
        mixing,
    )


def _lora_up_linear_grad(ctx, dy):
    if dy is None:
        return (None,) * 7
    gradients = lora_up_linear_backward(dy, *ctx.saved_tensors, ctx.d, ctx.scaling, ctx.needs)
    return _spread(gradients, ctx.needs, ctx.dtypes, 7)


def _lora_up_linear_backward(dy, x, weight, projected, lora_B, mixing, d, scaling, needs):
    """Return the needed ones of ``dx, dW, dP, dB, dbias``."""
    need_x, need_W, need_P, need_B, need_bias = needs
    dy_rows = _rows(dy)
    folded_B, P_rows = _folded(lora_B, mixing) if need_P else None, _rows(projected) if need_B else None
    r = projected.shape[-1] if need_B else folded_B.shape[1] if need_P else 0
    plan = dispatch.plan(dy_rows, dy.shape[-1], r, d=d)
    dP, dB = plan.backward_dy(dy_rows, P_rows, folded_B, scaling=scaling, need_dS=need_P, need_dB=need_B)
    gradients = []
    if need_x:
        gradients.append(_unrows(torch.mm(dy_rows, weight), dy.shape[:-1]))
    if need_W:
        gradients.append(torch.mm(dy_rows.t(), _rows(x)))
    if need_P:
        gradients.append(_unrows(dP, dy.shape[:-1]))
    if need_B:
        gradients.append(_unfolded(dB, mixing).to(_factor_dtype(dy.dtype)))
    if need_bias:
        gradients.append(dy_rows.sum(0))
    return gradients


def _lora_up_linear_backward_fake(dy, x, weight, projected, lora_B, mixing, d, scaling, needs):
    need_x, need_W, need_P, need_B, need_bias = needs
    m, lead = dy.shape[-1], dy.shape[:-1]
    gradients = []
    if need_x:
        gradients.append(dy.new_empty(*lead, d))
    if need_W:
        gradients.append(dy.new_empty(m, d))
    if need_P:
        gradients.append(dy.new_empty(*lead, (lora_B if mixing is None else mixing).shape[1]))
    if need_B:
        r = projected.shape[-1] if mixing is None else mixing.shape[0]
        gradients.append(dy.new_empty(m, r, dtype=_factor_dtype(dy.dtype)))
    if need_bias:
        gradients.append(dy.new_empty(m))
    return gradients


lora_up_linear = Operation(
    "lora_null::lora_up_linear",
    "(Tensor x, Tensor weight, Tensor projected, Tensor lora_B, Tensor? bias, Tensor? mixing, float scaling) -> Tensor",
    _lora_up_linear,
    _lora_up_linear_fake,
    setup=_lora_up_linear_setup,
    gradient=_lora_up_linear_grad,
)
lora_up_linear_backward = Operation(
    "lora_null::lora_up_linear_backward",
    "(Tensor dy, Tensor? x, Tensor? weight, Tensor? projected, Tensor? lora_B, Tensor? mixing, SymInt d,"
    " float scaling, bool[] needs) -> Tensor[]",
    _lora_up_linear_backward,
    _lora_up_linear_backward_fake,
)

"""The inputs of linear layers, handed out while the model runs; and which layers are linear in name only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ..models.experts import ExpertMatrix, Routing, hidden_of, output_of
from ..models.layout import matrix_of, shape_of
from ..models.quantised import is_dense
from ..models.weights import materialized

# Between the output of a layer and x W^T. Weights that are rounded to three values on the way, as in BitNet, leave 0.9
# (of normal ones), a softmax of the product 0.3 to 0.6.
_LEAST_COSINE = 0.7
# of the input, for that comparison
_ROWS = 64


class Routed(NamedTuple):
    """The tokens that an input was made of: ``tokens (..., d)`` of the layer, and the ``rows (n,)`` of these."""

    tokens: Tensor
    rows: Tensor


@contextmanager
def watching(linears: Mapping[str, nn.Linear], receive: Callable[..., Any], left_out: dict[str, str]) -> Iterator[None]:
    """Call ``receive(name, input)`` at every forward of the linear layers, for the length of the block.

    A subclass of ``nn.Linear`` may compute something else, such as the routers of Llama 4 and Phi-MoE, which return
    tuples. The first output of each is compared with ``x W^T``; a layer that computes something else is not handed
    out, and its name and the reason go into ``left_out``.

    Of experts fused into one parameter, all that read the layer's tokens are handed these; each down-projection is
    handed, made once more, what its expert makes of the tokens that go to it: ``receive(name, input, routed)``.
    """
    computed = set()

    def before(name: str, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        receive(name, _input(args, kwargs))

    def after(name: str, module: nn.Linear, args: tuple, kwargs: dict, output: Any) -> None:
        if name in left_out:
            return
        x = _input(args, kwargs)
        if name not in computed:
            if reason := mismatch(module, x, output):
                left_out[name] = reason
                return
            computed.add(name)
        receive(name, x)

    def of_experts(
        members: list[tuple[str, ExpertMatrix]], owner: nn.Module, args: tuple, kwargs: dict, y: Any
    ) -> None:
        routing = Routing.of_call(owner, args, kwargs)
        first = members[0][0]
        if first not in computed and first not in left_out:
            reason = "they are called with other arguments" if routing is None else _differs(owner, routing, y)
            computed.add(first)
            left_out.update({name: reason for name, _ in members} if reason else {})
        if first not in left_out and routing is not None:
            _hand_out(members, owner, routing, receive)

    handles = []
    experts: dict[nn.Module, list[tuple[str, ExpertMatrix]]] = {}
    try:
        for name, module in linears.items():
            if isinstance(module, ExpertMatrix):
                experts.setdefault(module.owner, []).append((name, module))
            elif type(module) is nn.Linear:
                handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(partial(after, name), with_kwargs=True))
        for owner, members in experts.items():
            handles.append(owner.register_forward_hook(partial(of_experts, members), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hand_out(
    members: list[tuple[str, ExpertMatrix]], owner: nn.Module, routing: Routing, receive: Callable[..., Any]
) -> None:
    """Hand out the tokens to what reads them, and to each down-projection what its expert makes of its own."""
    flat = routing.tokens.reshape(-1, routing.tokens.shape[-1])
    with materialized(owner), torch.no_grad():
        for name, matrix in members:
            if not matrix.is_routed:
                receive(name, routing.tokens)
                continue
            # There are no values to choose by on meta, where what counts is sizes.
            rows = torch.arange(0, device=flat.device) if flat.is_meta else routing.rows_of(matrix.expert)
            h = hidden_of(owner, matrix.expert, flat[rows])
            receive(name, h, Routed(routing.tokens, rows))


def _differs(owner: nn.Module, routing: Routing, output: Any) -> str | None:
    """Say why ``output`` is not what experts of the known kind make; ``None`` if it may be."""
    if not isinstance(output, Tensor) or output.shape != routing.tokens.shape:
        return f"they return a {type(output).__name__} of another form than what they read"
    if output.is_meta:
        return None
    with materialized(owner), torch.no_grad():
        expected = output_of(owner, routing, _ROWS)
    if _cosine(expected, output.reshape(-1, output.shape[-1])[:_ROWS]) < _LEAST_COSINE:
        return "their output is another than that of gate, up and down"
    return None


def mismatch(linear: nn.Linear, x: Tensor, output: Any) -> str | None:
    """Say why ``output`` is not what a linear layer makes of ``x (..., d)``; ``None`` if it may be."""
    expected = (*x.shape[:-1], shape_of(linear)[0])
    if not isinstance(output, Tensor):
        return f"it returns a {type(output).__name__}, where x W^T is a tensor"
    if not output.is_floating_point() or output.shape != expected:
        return f"it returns {output.dtype} {tuple(output.shape)}, where x W^T is {tuple(expected)}"
    if not is_dense(linear):
        return None
    weight = matrix_of(linear)
    if hasattr(weight, "full_tensor") or weight.device != x.device or x.is_meta:
        return None
    rows, outputs = (part.reshape(-1, part.shape[-1])[:_ROWS].float() for part in (x, output))
    with torch.no_grad(), torch.autocast(x.device.type, enabled=False):
        product = nn.functional.linear(rows, weight.float(), None if linear.bias is None else linear.bias.float())
    if _cosine(product, outputs) < _LEAST_COSINE:
        return "its output is another than x W^T"
    return None


@torch.no_grad()
def _cosine(one: Tensor, other: Tensor) -> float:
    one, other = one.float(), other.float()
    norms = float(one.norm() * other.norm())
    return float((one * other).sum()) / norms if norms else 1.0


def _input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]

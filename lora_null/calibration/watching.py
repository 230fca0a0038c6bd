"""The inputs of linear layers, handed out while the model runs; and which layers are linear in name only."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..models.layout import matrix_of, shape_of
from ..models.quantised import is_dense

# Between the output of a layer and x W^T. Weights that are rounded to three values on the way, as in BitNet, leave 0.9
# (of normal ones), a softmax of the product 0.3 to 0.6.
_LEAST_COSINE = 0.7
# of the input, for that comparison
_ROWS = 64


@contextmanager
def watching(
    linears: Mapping[str, nn.Linear], receive: Callable[[str, Tensor], Any], left_out: dict[str, str]
) -> Iterator[None]:
    """Call ``receive(name, input)`` at every forward of the linear layers, for the length of the block.

    A subclass of ``nn.Linear`` may compute something else, such as the routers of Llama 4 and Phi-MoE, which return
    tuples. The first output of each is compared with ``x W^T``; a layer that computes something else is not handed
    out, and its name and the reason go into ``left_out``.
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

    handles = []
    try:
        for name, module in linears.items():
            if type(module) is nn.Linear:
                handles.append(module.register_forward_pre_hook(partial(before, name), with_kwargs=True))
            else:
                handles.append(module.register_forward_hook(partial(after, name), with_kwargs=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


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
        norms = float(product.norm() * outputs.norm())
        cosine = float((product * outputs).sum()) / norms if norms else 1.0
    if cosine < _LEAST_COSINE:
        return "its output is another than x W^T"
    return None


def _input(args: tuple, kwargs: Mapping[str, Any]) -> Tensor:
    return args[0] if args else kwargs["input"]

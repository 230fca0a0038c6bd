"""A differentiable operation with two entrances: a custom operation for tracers, a plain Function for eager code."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor


class Operation:
    """One body, registered as ``torch.library`` custom operation ``name`` and callable without its overhead.

    torch.compile, FakeTensor, dispatch modes and functorch need the custom operation. Plain eager execution goes
    to the same body through an ``autograd.Function``: registering, alias checks and Python redispatch of a custom
    operation cost 60 us per forward on a 2-core CPU, and a small projection on a fast GPU takes 25 us in all.

    Args:
        name: Qualified name, ``lora_null::...``.
        schema: Types of arguments and results; nothing is mutated.
        body: The computation, without autograd and unaffected by autocast.
        fake: Shapes and dtypes of the results.
        setup: ``setup(ctx, inputs, output)`` saves what the gradient needs.
        gradient: ``gradient(ctx, *grads)`` returns one entry per input. Without it the operation is itself a
            backward, and asking for its gradient raises.
    """

    def __init__(
        self,
        name: str,
        schema: str,
        body: Callable,
        fake: Callable,
        *,
        setup: Callable | None = None,
        gradient: Callable | None = None,
    ):
        self.body = _isolated(body)
        self.op = torch.library.custom_op(name, self.body, mutates_args=(), schema=schema)
        self.op.register_fake(fake)
        self.op.register_autograd(gradient or _second_derivative, setup_context=setup)
        self.function: Any = None
        if gradient is not None and setup is not None:
            self.function = _function(name, self.body, setup, gradient)

    def __call__(self, *args: Any) -> Any:
        """Run on positional arguments, the first of them a tensor."""
        if is_observed(args[0]):
            return self.op(*args)
        if not torch.is_grad_enabled():
            return self.body(*args)
        return self.function.apply(*args) if self.function is not None else self.op(*args)


def is_observed(first: Tensor) -> bool:
    """Say whether a tracer or a mode has to see the operation as a whole."""
    return (
        torch.compiler.is_compiling()
        or type(first) not in (Tensor, torch.nn.Parameter)
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._functorch.maybe_current_level() is not None
    )


def autocast_dtype(device: str) -> torch.dtype | None:
    """Return the dtype that autocast casts to on ``device``, or ``None`` where it is off or unknown, as on meta."""
    if device == "meta" or not torch.is_autocast_enabled(device):
        return None
    return torch.get_autocast_dtype(device)


def _function(name: str, body: Callable, setup: Callable, gradient: Callable) -> Any:
    def forward(ctx, *args):
        output = body(*args)
        setup(ctx, args, output)
        return output

    members = {"forward": staticmethod(forward), "backward": staticmethod(gradient)}
    return type(name.replace("::", "_"), (torch.autograd.Function,), members)


def _isolated(body: Callable) -> Callable:
    """Keep autograd and autocast out of the body: dtypes are chosen already, and a backward may run under autocast."""

    @wraps(body)
    def run(first, *args):
        device = first.device.type
        with torch._C._AutoDispatchBelowAutograd():
            if autocast_dtype(device) is None:
                return body(first, *args)
            with torch.autocast(device, enabled=False):
                return body(first, *args)

    return run


def _second_derivative(ctx, *grads):
    raise RuntimeError(
        "lora_null's linear operations are differentiable once, and a second derivative was asked for (create_graph"
        "=True, or a Hessian). Set LORA_NULL_LINEAR_BACKEND=torch, or call lora_null.ops.reference."
    )

"""Every way of putting an adapter on a linear layer, behind one signature.

``attach(parent, name, A, B, train_a)`` replaces or wraps ``parent.<name>`` and returns nothing; the parameters
that it creates are the module's own. ``A (r, d)``, ``B (m, r)``, scaling 1.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from torch import Tensor, nn

from .accumulate import AccumulatedLinearModule

Attach = Callable[[nn.Module, str, Tensor, Tensor, bool], None]


def attach_ours(parent: nn.Module, name: str, A: Tensor, B: Tensor, train_a: bool) -> None:
    """Make the layer a ``LoraNullLinear`` in place."""
    from lora_null.adapters.layer import attach_adapter

    attach_adapter(getattr(parent, name), A.clone(), B.clone(), train_a=train_a)


def share_projections(module: nn.Module) -> None:
    """Let our layers with frozen A's of one row space share a projection, as ``lora_null.initialize`` does."""
    import lora_null.adapters.sharing

    lora_null.adapters.sharing.share_projections(module)


def plain_adapter(x: Tensor, A: Tensor, B: Tensor) -> Tensor:
    """``(x A^T) B^T`` as one writes it first; in fp64 it is the truth of the questions."""
    return (x @ A.to(x.dtype).T) @ B.to(x.dtype).T


class PlainLinear(nn.Module):
    """``y = x W^T + (x A^T) B^T`` with :func:`plain_adapter`."""

    def __init__(self, base: nn.Linear, A: Tensor, B: Tensor, *, train_a: bool):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.lora_A = nn.Parameter(A, requires_grad=train_a)
        self.lora_B = nn.Parameter(B)

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (..., d)`` to ``(..., m)``."""
        return self.base(x) + plain_adapter(x, self.lora_A, self.lora_B)


def attach_plain(parent: nn.Module, name: str, A: Tensor, B: Tensor, train_a: bool) -> None:
    """Wrap the layer in :class:`PlainLinear`."""
    setattr(parent, name, PlainLinear(getattr(parent, name), A.clone(), B.clone(), train_a=train_a))


def attach_accumulated(parent: nn.Module, name: str, A: Tensor, B: Tensor, train_a: bool) -> None:
    """Wrap the layer on the accumulate path."""
    setattr(parent, name, AccumulatedLinearModule(getattr(parent, name), A.clone(), B.clone(), train_a=train_a))


def peft_layer(base: nn.Linear, A: Tensor, B: Tensor, train_a: bool) -> nn.Module:
    """Return PEFT's own LoRA layer around ``base``, with the given factors in their dtype."""
    from peft import LoraConfig, get_peft_model

    holder: Any = nn.Module()
    holder.proj = base
    r = A.shape[0]
    config = LoraConfig(r=r, lora_alpha=r, target_modules=["proj"], lora_dropout=0.0)
    get_peft_model(holder, config, autocast_adapter_dtype=False)
    layer = holder.proj
    layer.lora_A["default"].weight = nn.Parameter(A.clone(), requires_grad=train_a)
    layer.lora_B["default"].weight = nn.Parameter(B.clone())
    return layer


def attach_peft(parent: nn.Module, name: str, A: Tensor, B: Tensor, train_a: bool) -> None:
    """Wrap the layer in PEFT's LoRA layer."""
    setattr(parent, name, peft_layer(getattr(parent, name), A, B, train_a))


def attach_peft_fused(parent: nn.Module, name: str, A: Tensor, B: Tensor, train_a: bool) -> None:
    """Wrap the layer in PEFT's LoRA layer and let our kernels compute it."""
    import lora_null.peft

    attach_peft(parent, name, A, B, train_a)
    lora_null.peft.use_fused_kernels(parent)


class _Foreign(nn.Module):
    """A PEFT layer computed by another package's function for a single projection."""

    def __init__(self, layer: nn.Module, apply: Callable):
        super().__init__()
        self.layer = layer
        self.function = apply

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (..., d)`` to ``(..., m)``; these functions want three dimensions."""
        flat = x if x.dim() == 3 else x.reshape(1, -1, x.shape[-1])
        y = self.function(SimpleNamespace(o_proj=self.layer), flat)
        return y.reshape(*x.shape[:-1], y.shape[-1])


def attach_unsloth(parent: nn.Module, name: str, A: Tensor, B: Tensor, train_a: bool) -> None:
    """Compute the PEFT layer with unsloth's function for one projection."""
    from unsloth.kernels.fast_lora import apply_lora_o

    setattr(parent, name, _Foreign(peft_layer(getattr(parent, name), A, B, train_a), apply_lora_o))


def attach_axolotl(parent: nn.Module, name: str, A: Tensor, B: Tensor, train_a: bool) -> None:
    """Compute the PEFT layer with axolotl's function for one projection."""
    from axolotl.kernels.lora import apply_lora_o

    setattr(parent, name, _Foreign(peft_layer(getattr(parent, name), A, B, train_a), apply_lora_o))

"""PEFT's LoRA layers with a fused forward, patched in place and reversibly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from peft.tuners import lora
from torch import Tensor, nn

from .. import ops
from ..models.arguments import takes
from ..system.environment import fall_back
from ..system.log import logger, warn_once


class FusedLoraLinear(lora.Linear):
    """PEFT's LoRA layer with its forward through :func:`lora_null.ops.lora_linear`.

    Whatever the fused operation does not cover goes through PEFT's own forward, with one log line per reason.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Map ``x (..., d)`` to ``(..., m)``, as PEFT does."""
        # Of several adapters, this layer may hold one.
        held = self.lora_A
        names = [name for name in self.active_adapters if name in held]
        found = _operands(self, names, x, args, kwargs)
        if isinstance(found, str):
            if found:
                fall_back("A LoRA layer", found, "PEFT's own forward")
            return super().forward(x, *args, **kwargs)
        weight, lora_A, lora_B, bias = found
        (name,) = names
        scaling, module = self.scaling[name], self.lora_dropout[name]
        dropout = module.p if isinstance(module, nn.Dropout) and self.training else 0.0
        return ops.lora_linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, dropout=dropout)

    def _get_name(self) -> str:
        """Return the name that PEFT's reports, such as ``get_layer_status``, show: it is PEFT's layer as before."""
        return lora.Linear.__name__


@dataclass(frozen=True)
class FusedKernels:
    """What :func:`use_fused_kernels` did.

    Attributes:
        patched: Number of layers that use the fused forward now.
        skipped: Reason to number of layers, for the LoRA layers that were left alone.
    """

    layers: tuple[FusedLoraLinear, ...]
    skipped: dict[str, int]

    @property
    def patched(self) -> int:
        """Number of layers that use the fused forward."""
        return len(self.layers)

    def undo(self) -> None:
        """Give every patched layer its own class back."""
        for layer in self.layers:
            if type(layer) is FusedLoraLinear:
                layer.__class__ = lora.Linear  # type: ignore[assignment]


@takes(on_meta=True, peft_model=nn.Module)
def use_fused_kernels(peft_model: nn.Module) -> FusedKernels:
    """Let the LoRA layers of ``peft_model`` compute base and adapter in one operation, in place and reversibly.

    Parameters, hooks and state-dict names are untouched. Only layers that are exactly ``peft``'s ``lora.Linear``
    on exactly ``torch.nn.Linear`` change; the count and the reasons for the rest are logged and returned.
    """
    patched: list[FusedLoraLinear] = []
    skipped: dict[str, int] = {}
    for module in peft_model.modules():
        if not isinstance(module, lora.LoraLayer):
            continue
        if isinstance(module, FusedLoraLinear):
            patched.append(module)
            continue
        # Not the innermost: a mixed model may have an adapter of another kind in between.
        base = module.base_layer
        if type(module) is lora.Linear and type(base) is nn.Linear:
            module.__class__ = FusedLoraLinear
            patched.append(module)
        else:
            reason = f"{type(module).__name__} on {type(base).__name__}"
            skipped[reason] = skipped.get(reason, 0) + 1
    logger.info("lora_null: fused forward in %d LoRA layers; left alone: %s", len(patched), skipped or "none")
    if not patched:
        warn_once("no-fused-layer", f"use_fused_kernels patched no layer; found: {skipped or 'no LoRA layer'}.")
    return FusedKernels(tuple(patched), skipped)


def _operands(layer: lora.Linear, names: list[str], x: Tensor, args: tuple, kwargs: dict) -> str | tuple[Any, ...]:
    """Return W, A, B and the bias, or say why the fused operation cannot take this call.

    That is ``""`` for states in which PEFT skips the adapters. Nothing is looked up twice: torch takes longer to find a
    module or a parameter than to check it.
    """
    if layer.disable_adapters or layer.merged or not names:
        return ""
    if len(names) > 1:
        return "several active adapters"
    if args or any(value is not None for value in kwargs.values()):
        return f"extra forward arguments {sorted(kwargs)}"
    (name,) = names
    if name in layer.lora_variant:
        return f"the variant {type(layer.lora_variant[name]).__name__}"
    base, lora_A, lora_B = inner = (layer.get_base_layer(), layer.lora_A[name], layer.lora_B[name])
    if lora_B.bias is not None or layer.fan_in_fan_out:
        return "lora_bias or fan_in_fan_out"
    weights: tuple[Any, ...] = (base.weight, lora_A.weight, lora_B.weight)
    if any(weight.ndim != 2 for weight in weights):
        return "flattened (FSDP1) parameters"
    if any(map(_hooked, inner)):
        return "hooks on a layer inside it, which the fused operation does not call"
    if x.device != weights[0].device:
        return "an offloaded base weight"
    return *weights, base.bias


def _hooked(module: nn.Module) -> bool:
    hooks = module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks
    return any(hooks) or "forward" in module.__dict__

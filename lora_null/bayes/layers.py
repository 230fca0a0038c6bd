"""The LoRA layers of a model, ours and PEFT's, seen the same way."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..adapters.layer import LoraNullLinear
from ..models.wrappers import unwrapped

FACTORS = ("lora_A", "lora_B")


@dataclass(frozen=True)
class AdaptedLayer:
    """One linear layer with ``y = base(x) + s (x A^T) B^T``.

    Attributes:
        module: The layer itself; hooks go here.
        lora_A: The module that holds ``A (r, d)`` as its ``weight``.
        lora_B: The module that holds ``B (m, r)``.
        scaling: ``s``.
        initial_B: ``B0 (m, r)`` where the base is shifted by the start, else ``None``: what training moved B from.
        initial_A: ``A0 (r, d)``, likewise.
    """

    module: nn.Module
    lora_A: nn.Module
    lora_B: nn.Module
    scaling: float
    initial_A: Tensor | None = None
    initial_B: Tensor | None = None

    def factor(self, name: str) -> Tensor:
        """Return the weight of ``"lora_A"`` or ``"lora_B"``."""
        return getattr(self, name).weight

    def initial(self, name: str) -> Tensor | None:
        """Return where training moved that factor from; ``None`` stands for zero."""
        return self.initial_A if name == "lora_A" else self.initial_B


def adapted_layers(model: nn.Module, *, random: bool = False) -> dict[str, AdaptedLayer]:
    """Return the layers with an active adapter by their name in the base model, in the model's own order.

    Args:
        model: Wrapped or not, a PeftModel or a patched one.
        random: Allow factors that are made random for training.

    Raises:
        ValueError: There is none, or one of them is merged, disabled, sharded, has several active adapters, or computes
            something else than ``s (x A^T) B^T``.
    """
    base: Any = unwrapped(model)
    # Half a second to import, and no model holds such layers where nobody has.
    lora: Any = sys.modules.get("peft.tuners.lora")
    if lora is not None and hasattr(base, "get_base_model"):
        base = base.get_base_model()
    layers = {}
    for name, module in base.named_modules():
        if isinstance(module, LoraNullLinear):
            layers[name] = _ours(name, module)
        elif lora is not None and isinstance(module, lora.LoraLayer):
            layers[name] = _of_peft(name, module)
    if not layers:
        raise ValueError(
            f"{type(base).__name__} carries no LoRA adapter. Expected a model from lora_null.initialize, "
            "lora_null.load_adapter or peft.get_peft_model, with its adapter not merged."
        )
    for name, layer in layers.items():
        if not random and any(parametrize.is_parametrized(part) for part in (layer.lora_A, layer.lora_B)):
            raise ValueError(
                f"The factors of {name} are parametrised; expected plain parameters. If lora_null.bayes made them "
                "random, end their training with lora_null.bayes.collect; otherwise call "
                "torch.nn.utils.parametrize.remove_parametrizations."
            )
        if layer.factor("lora_A").ndim != 2 or hasattr(layer.factor("lora_A"), "full_tensor"):
            raise ValueError(f"The factors of {name} are sharded; expected whole matrices. Load the adapter unsharded.")
    return layers


def norms_of(layers: Mapping[str, AdaptedLayer], keys: Iterable[str]) -> dict[str, float]:
    """Return the norms of the factors named by ``keys``."""
    found = {}
    for key in keys:
        name, _, factor = key.rpartition(".")
        found[key] = float(layers[name].factor(factor).detach().norm())
    return found


def factors_of(which: str) -> tuple[str, ...]:
    """Return the factors that ``"a"``, ``"b"`` or ``"ab"`` names; ValueError for anything else."""
    if which not in ("a", "b", "ab"):
        raise ValueError(f'which={which!r}; expected "a", "b" or "ab": the factors that are random.')
    return tuple(f"lora_{letter.upper()}" for letter in which)


def _ours(name: str, module: LoraNullLinear) -> AdaptedLayer:
    if not module.adapter_enabled:
        raise ValueError(f"The adapter of {name} is disabled; leave disable_adapters() first.")
    A, B = (None if part is None else part.weight for part in (module.initial_A, module.initial_B))
    return AdaptedLayer(module, module.lora_A, module.lora_B, module.scaling, A, B)


def _of_peft(name: str, module: Any) -> AdaptedLayer:
    active = [key for key in module.active_adapters if key in module.lora_A]
    odd = {key for key in module.active_adapters if key in getattr(module, "lora_embedding_A", ())}
    if module.merged or module.disable_adapters or len(active) != 1 or odd:
        found = "merged" if module.merged else "disabled" if module.disable_adapters else f"{sorted({*active, *odd})}"
        raise ValueError(
            f"The active adapters of {name} ({type(module).__name__}) are {found}; expected one, on a linear layer. "
            "Unmerge or enable it, choose one with set_adapter, or train without embeddings among target_modules."
        )
    key = active[0]
    if hasattr(module, "parameter_name"):
        raise ValueError(
            f"{name} adapts the parameter {module.parameter_name} of several matrices, such as experts; expected plain "
            "LoRA on linear layers. Leave it out of target_parameters."
        )
    if key in module.lora_variant or not isinstance(module.lora_A[key], nn.Linear):
        kind = module.lora_variant[key] if key in module.lora_variant else module.lora_A[key]
        raise ValueError(
            f"{name} computes its adapter by {type(kind).__name__}; expected plain LoRA on a linear layer, whose "
            "output is linear in both factors."
        )
    return AdaptedLayer(module, module.lora_A[key], module.lora_B[key], float(module.scaling[key]))

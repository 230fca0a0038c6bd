"""A callback for ``transformers.Trainer``, and whatever is made of it, that keeps A frozen."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ..adapters.basis import BasisFactor
from ..adapters.layer import adapter_layers
from ..peft.layers import freeze_lora_A, lora_layers
from ..peft.shifted import initial_of


class KeepFrozen(TrainerCallback):
    """Freeze ``lora_A`` where a training program has loaded an adapter as trainable.

    ``PeftModel.from_pretrained(..., is_trainable=True)`` does not know that A was frozen, and programs that call it for
    their user (LLaMA-Factory, axolotl, TRL's scripts) would train A. Passed in ``callbacks=[KeepFrozen()]``, this
    freezes A before the optimizer is made, so that the optimizer never holds it, and again when training begins, after
    a checkpoint has been loaded. A model from :func:`lora_null.initialize` knows its mode and is left as it is.

    Args:
        adapter_name: Of the adapter in a ``PeftModel``.

    Raises:
        ValueError: From the trainer: the model has no LoRA layer of that name, or its adapter was started with
            ``freeze_a=False``, which trains A.
    """

    def __init__(self, adapter_name: str = "default") -> None:
        self.adapter_name = adapter_name

    def on_init_end(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Freeze A before the trainer makes its optimizer."""
        self._freeze(model)

    def on_train_begin(self, args: Any, state: Any, control: Any, model: Any = None, **kwargs: Any) -> None:
        """Freeze A again: what was loaded in between may have made it trainable."""
        self._freeze(model)

    def _freeze(self, model: Any) -> None:
        if model is None or adapter_layers(model):
            return
        for name, layer in lora_layers(model, self.adapter_name).items():
            within = isinstance(layer.lora_A[self.adapter_name], BasisFactor)
            if within or initial_of(layer, self.adapter_name):
                how = "train='b_in_basis'" if within else "freeze_a=False, on a shifted base"
                raise ValueError(
                    f"{name} was initialised with {how}, where A is trained; KeepFrozen "
                    "would freeze it. Leave the callback out, or start again with freeze_a=True."
                )
        freeze_lora_A(model, self.adapter_name)

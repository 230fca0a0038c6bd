"""A plugin for axolotl: its LoRA adapters start in the null space, and A stays frozen where it was trained frozen.

In the configuration of a run::

    plugins:
      - lora_null.integrations.axolotl.LoraNullPlugin
    adapter: lora
    lora_null_covariances: cov.safetensors

The module imports without axolotl too; the plugin is then of no use, and its class can still be read and tested.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..adapters.state import read_state
from ..covariances.covariances import Covariances
from ..peft import initialize_lora_null_weights, use_fused_kernels
from ..peft.load import go_on
from ..system.log import logger
from .callback import KeepFrozen

try:
    from axolotl.integrations.base import BasePlugin
    from pydantic import BaseModel, Field
except ImportError:
    BasePlugin = object
else:

    class LoraNullArgs(BaseModel):
        """The keys that the plugin adds to axolotl's configuration."""

        lora_null_covariances: str | None = Field(None, description="File from lora-null calibrate on base_model.")
        lora_null_train: str = Field("b_in_basis", description="What learns: b_in_basis, b or ab.")
        lora_null_energy: float | None = Field(None, description="Share of the activations' energy to protect.")
        lora_null_task: str | None = Field(None, description="Covariances of the task, which choose among directions.")
        lora_null_freeze_a: bool | None = Field(None, description="Short for lora_null_train: b, and for ab.")
        lora_null_verify_base: bool = Field(True, description="Refuse covariances of other weights.")
        lora_null_fused: bool = Field(True, description="Compute base and adapter in one operation.")


# They compute the adapted layers without calling them, and axolotl switches them on by itself where they are not set.
KERNELS = ("lora_mlp_kernel", "lora_qkv_kernel", "lora_o_kernel", "lora_embedding_kernel")


class LoraNullPlugin(BasePlugin):
    """Start axolotl's LoRA or QLoRA adapters with LoRA-Null, and go on with saved ones in their own mode."""

    def get_input_args(self) -> str:
        """Name the class of the keys that this plugin reads."""
        return f"{__name__}.LoraNullArgs"

    def register(self, cfg: Any) -> None:
        """Switch axolotl's own LoRA kernels off, before its configuration is checked."""
        wanted = [key for key in KERNELS if cfg.get(key)]
        if wanted:
            logger.warning("lora_null: axolotl's %s are switched off: they go around the adapted layers.", wanted)
        for key in KERNELS:
            cfg[key] = False

    def post_lora_load(self, cfg: Any, model: Any) -> None:
        """Give fresh adapters their start; freeze A of a loaded one that was trained so.

        Raises:
            ValueError: The run has no LoRA adapter, or no covariances where they are needed.
        """
        if cfg.get("adapter") not in ("lora", "qlora"):
            raise ValueError(
                f"axolotl's adapter is {cfg.get('adapter')!r}; expected lora or qlora. LoRA-Null starts LoRA adapters: "
                "set it, or take the plugin out."
            )
        covariances, task = (
            Covariances.load(cfg[key]) if cfg.get(key) else None for key in ("lora_null_covariances", "lora_null_task")
        )
        verify_base = cfg.get("lora_null_verify_base") is not False
        if cfg.get("lora_model_dir"):
            state = read_state(Path(cfg["lora_model_dir"]))
            if state is not None:
                go_on(model, state, covariances=covariances, verify_base=verify_base)
        elif covariances is None:
            raise ValueError(
                "lora_null_covariances is not set; expected a file of covariances of base_model. Make it with: "
                "lora-null calibrate MODEL --data text.jsonl --output cov.safetensors"
            )
        else:
            # axolotl fills in the default of `train`: the short form, where it is given, is the one that is meant.
            freeze_a = cfg.get("lora_null_freeze_a")
            train = None if freeze_a is not None else cfg.get("lora_null_train")
            energy = cfg.get("lora_null_energy")
            initialize_lora_null_weights(
                model, covariances, freeze_a=freeze_a, train=train, energy=energy, task=task, verify_base=verify_base
            )
        if cfg.get("lora_null_fused") is not False:
            use_fused_kernels(model)

    def add_callbacks_post_trainer(self, cfg: Any, trainer: Any) -> list:
        """Keep A frozen through what the trainer loads, where it is frozen now."""
        frozen = [not p.requires_grad for name, p in trainer.model.named_parameters() if ".lora_A." in name]
        return [KeepFrozen()] if frozen and all(frozen) else []

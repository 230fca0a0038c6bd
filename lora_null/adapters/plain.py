"""Which of PEFT's configurations describe a plain LoRA adapter."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

# Settings of PEFT under which an adapter is more than B A on some linear layers.
_SPECIAL = (
    "use_dora",
    "lora_bias",
    "target_parameters",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "kasa_config",
)
# Which biases PEFT trains beside the factors.
BIASES = ("none", "all", "lora_only")
_SHIFTING = ("pissa", "olora", "corda", "loftq", "lora_ga")


def shifting_start(init_lora_weights: Any) -> str | None:
    """Return the start that a configuration names if PEFT itself changes the base weights for it."""
    start = str(init_lora_weights).lower()
    return start if start.startswith(_SHIFTING) else None


def require_plain(path: Path, config: Mapping[str, Any]) -> None:
    """Refuse a configuration, read from ``path``, under which an adapter is not ``B A`` on the pre-trained weights."""
    r, alpha = config.get("r"), config.get("lora_alpha")
    if config.get("peft_type") != "LORA" or not isinstance(r, int) or r < 1 or not isinstance(alpha, int | float):
        raise ValueError(
            f"{path} describes a {config.get('peft_type')!r} adapter with r={r!r}, "
            f"lora_alpha={alpha!r}; expected a LoRA adapter. Load it with PEFT."
        )
    special = [key for key in _SPECIAL if config.get(key)]
    if special or config.get("bias", "none") not in BIASES:
        raise ValueError(f"{path} sets {special or ['bias']}; expected plain LoRA. Load it with PEFT.")
    if start := shifting_start(config.get("init_lora_weights")):
        raise ValueError(
            f"{path} has init_lora_weights={start!r}: the adapter belongs to a base that PEFT shifted "
            "when training began; expected one for the pre-trained base. Convert it with PEFT: "
            "save_pretrained(..., path_initial_model_for_weight_conversion=...)."
        )

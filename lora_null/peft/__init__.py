"""LoRA-Null for models that PEFT has prepared: initialisation, saving and the fused forward.

The usual order is ``get_peft_model``, :func:`initialize_lora_null_weights`, :func:`use_fused_kernels`, any trainer,
:func:`save_adapter`. Everything stays an ordinary ``PeftModel`` with ordinary ``lora.Linear`` layers.
"""

from .fused import FusedKernels, FusedLoraLinear, use_fused_kernels
from .initialize import initialize_lora_null_weights
from .layers import freeze_lora_A, lora_layers
from .load import load_trainable
from .save import save_adapter

__all__ = [
    "FusedKernels",
    "FusedLoraLinear",
    "freeze_lora_A",
    "initialize_lora_null_weights",
    "load_trainable",
    "lora_layers",
    "save_adapter",
    "use_fused_kernels",
]

"""What the commands read: a model with its tokenizer, and calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch


def choose_device(device: str = "auto") -> str:
    """Return ``device``, where ``"auto"`` means a CUDA device if there is one.

    Raises:
        ValueError: There is no such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] == "meta":
        raise ValueError("device is 'meta', which holds no data; expected auto, cpu, cuda or cuda:N.")
    try:
        # Also what a torch without CUDA, or a machine with fewer devices, answers; each in another exception.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device is {device!r}, which cannot be used here ({reason}); expected auto, cpu, cuda or cuda:N."
        ) from None
    return device


def load_model(model: str, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Load a causal language model for inference, and its tokenizer with a padding token.

    Args:
        model: A folder or a Hugging Face model id.
        dtype: Name of a torch dtype; ``"auto"`` means the checkpoint's own.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...

    Raises:
        ValueError: No such model, dtype or device; or the model is a checkpoint of a run with adapters, which
            transformers would load without them.
    """
    from transformers import AutoModelForCausalLM

    chosen, device = parse_dtype(dtype) or "auto", choose_device(device)
    tokenizer = load_tokenizer(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=chosen)
    if getattr(loaded.config, "lora_null", None):
        raise ValueError(
            f"{model} is a checkpoint of a model patched by lora_null: loaded as a model it would lack its adapters, "
            "and its base may be shifted. Expected the pre-trained model; turn the checkpoint into an adapter with "
            "lora-null export."
        )
    return loaded.to(device).eval(), tokenizer


def load_tokenizer(model: str) -> Any:
    """Load a tokenizer that pads with its end token where it has no padding token: none is ever added."""
    from transformers import AutoTokenizer

    # transformers would ask the hub for a folder that does not exist, and report a network error.
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        if not Path(model).expanduser().is_dir():
            raise FileNotFoundError(f"{model} is not a folder; expected a model folder or a Hugging Face model id.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype called ``name``, in long or short form; None for None and ``"auto"``."""
    if name in (None, "auto"):
        return None
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    dtype = getattr(torch, short.get(name, name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}; expected float32, bfloat16 or float16 (fp32, bf16, fp16), or auto.")
    return dtype

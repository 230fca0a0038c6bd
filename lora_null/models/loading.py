"""What the commands read: a model with its tokenizer, and calibration text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from .settings import Loading

# Beside the tokenizer's, in models that read images or sound.
PROCESSORS = ("preprocessor_config.json", "processor_config.json", "video_preprocessor_config.json")


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


def load_model(model: str, loading: Loading | None = None) -> tuple[Any, Any]:
    """Load a language model for inference, of any class that has a head, and its tokenizer with a padding token.

    Args:
        model: A folder or a Hugging Face model id.
        loading: How.

    Raises:
        OSError: No such model, or none whose weights are safetensors.
        ValueError: No such dtype or device; the model is a checkpoint of a run with adapters, which
            transformers would load without them.
    """
    tokenizer = load_tokenizer(model, loading)
    return load_weights(model, loading), tokenizer


def load_weights(model: str, loading: Loading | None = None) -> Any:
    """Load the model of :func:`load_model` without its tokenizer, which a tuned model's folder need not hold."""
    loading = loading or Loading()
    dtype, device = parse_dtype(loading.dtype) or "auto", choose_device(loading.device)
    config = _config_of(model, loading)
    # Quantised weights lie on their device from the start; many libraries refuse to move them.
    quantised = getattr(config, "quantization_config", None) is not None
    device_map = loading.device_map or (device if quantised else None)
    placed = {} if device_map is None else {"device_map": device_map}
    try:
        loaded: Any = _class_for(config).from_pretrained(
            model, dtype=dtype, use_safetensors=True, **placed, **loading.source
        )
    except OSError as error:
        if "model.safetensors" not in str(error):
            raise
        raise OSError(
            f"{model} holds no weights as safetensors; expected model.safetensors, whole or in shards. Pickled ones "
            "(.bin) are never opened here: load the model where you trust it, and save_pretrained writes safetensors."
        ) from error
    return (loaded if placed else loaded.to(device)).eval()


def empty_model(model: str, loading: Loading, stored: torch.dtype, *, buffers: bool) -> Any:
    """Make the model of :func:`load_weights` with its parameters on the device meta, without values.

    Args:
        model: A folder or a Hugging Face model id.
        loading: How; ``"auto"`` as dtype is that of the configuration.
        stored: The dtype where the configuration names none.
        buffers: Buffers, such as the frequencies of rotary embeddings, have their values; else they are on meta too.

    Raises:
        ValueError: The model is quantised, or some of its weights have another dtype than the rest.
    """
    from accelerate import init_empty_weights

    config = _config_of(model, loading)
    if getattr(config, "quantization_config", None) is not None:
        raise ValueError(
            f"{model} is quantised, and its weights mean nothing without the library that loads them; expected a model "
            "in floating point. Use lora_null.calibrate and lora_null.initialize on the model in memory."
        )
    dtype = parse_dtype(loading.dtype) or getattr(config, "dtype", None) or stored
    kind = _class_for(config)
    make = getattr(kind, "_from_config", None) or kind.from_config
    with init_empty_weights(include_buffers=not buffers):
        made = make(config, dtype=dtype)
    wider = made._get_dtype_plan(dtype) if hasattr(made, "_get_dtype_plan") else None
    if wider:
        raise ValueError(
            f"transformers keeps {', '.join(sorted(wider))} of {type(made).__name__} in another dtype than {dtype}; "
            "expected one for all, to be read one layer at a time. Pass dtype float32, or use lora_null.calibrate and "
            "lora_null.initialize on the model in memory."
        )
    return made.eval()


def _config_of(model: str, loading: Loading) -> Any:
    """Return the model's configuration; ValueError for a checkpoint with adapters of ours."""
    from transformers import AutoConfig

    config: Any = AutoConfig.from_pretrained(model, **loading.source)
    if getattr(config, "lora_null", None):
        raise ValueError(
            f"{model} is a checkpoint of a model patched by lora_null: loaded as a model it would lack its adapters, "
            "and its base may be shifted. Expected the pre-trained model; turn the checkpoint into an adapter with "
            "lora-null export."
        )
    return config


def _class_for(config: Any) -> Any:
    """Return the class that a model was saved as, where it has a head: names of modules depend on it.

    A vision-language or an encoder-decoder model is no causal one, and as one it would lose a part or fail.
    """
    import transformers

    remote = getattr(config, "auto_map", None) or {}
    for name in ("AutoModelForCausalLM", *(key for key in remote if key.startswith("AutoModelFor"))):
        if name in remote:
            return getattr(transformers, name)
    for name in getattr(config, "architectures", None) or ():
        if "For" in str(name) or str(name).endswith("LMHeadModel"):
            found = getattr(transformers, str(name), None)
            if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
                return found
    return transformers.AutoModelForCausalLM


def load_tokenizer(model: str, loading: Loading | None = None) -> Any:
    """Load a tokenizer that pads with its end token where it has no padding token: none is ever added.

    Raises:
        OSError: There is none, or no such model.
    """
    from transformers import AutoTokenizer

    # transformers would ask the hub for a folder that does not exist, and report a network error.
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        if not Path(model).expanduser().is_dir():
            raise FileNotFoundError(f"{model} is not a folder; expected a model folder or a Hugging Face model id.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, **(loading or Loading()).source)
    except (OSError, ValueError) as error:
        if not Path(model).is_dir() or any(Path(model).glob("*token*")):
            raise
        raise FileNotFoundError(
            f"{model} holds no tokenizer; expected its files, such as tokenizer.json, beside those of the model. Was "
            "only the model saved? tokenizer.save_pretrained writes them there."
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def processor_files(model: str, loading: Loading | None = None) -> dict[str, Path]:
    """Return by name the files of a model that say how its images and sounds are prepared; text needs none."""
    from transformers.utils import cached_file

    revision = (loading or Loading()).revision
    options: dict[str, Any] = {"_raise_exceptions_for_missing_entries": False}
    found = {name: cached_file(model, name, revision=revision, **options) for name in PROCESSORS}
    return {name: Path(path) for name, path in found.items() if path is not None}


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype called ``name``, in long or short form; None for None and ``"auto"``."""
    if name in (None, "auto"):
        return None
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    dtype = getattr(torch, short.get(name, name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}; expected float32, bfloat16 or float16 (fp32, bf16, fp16), or auto.")
    return dtype

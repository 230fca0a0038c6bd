"""A tuned model from a folder: the base with an adapter of any kind, or a whole model beside it."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

from ..adapters.load import load_adapter
from ..adapters.names import PEFT_CONFIG
from ..adapters.plain import require_plain
from ..models.loading import load_model, load_weights
from ..models.settings import Loading
from ..system.files import read_json

# What PEFT says when an adapter's tensors find no layer, and goes on.
_UNFIT = "Found missing adapter keys"


def load_tuned(
    model: str, path: Path, loading: Loading | None = None, *, verify_base: bool = True
) -> tuple[Any, Any | None, Any]:
    """Load what :func:`lora_null.evaluate` compares.

    Args:
        model: Folder or Hugging Face id of the pre-trained model.
        path: An adapter folder, ours or PEFT's of any kind, or a checkpoint of a merged or fully tuned model.
        loading: How the models are loaded.
        verify_base: As for :func:`lora_null.load_adapter`.

    Returns:
        ``(tuned, base, tokenizer)``; ``base`` is None where ``tuned`` without its adapter is the pre-trained model.

    Raises:
        FileNotFoundError: ``path`` holds neither an adapter nor a model.
        ValueError: The adapter is damaged or belongs to another model.
    """
    if not (path / PEFT_CONFIG).exists():
        if not (path / "config.json").exists():
            raise FileNotFoundError(
                f"{path} has neither {PEFT_CONFIG} nor config.json; expected an adapter folder, or the checkpoint of a "
                "merged or fully tuned model."
            )
        base, tokenizer = load_model(model, loading)
        return load_weights(str(path), loading), base, tokenizer
    base, tokenizer = load_model(model, loading)
    config = read_json(path / PEFT_CONFIG)
    try:
        require_plain(path / PEFT_CONFIG, config)
    except ValueError as error:
        if "Load it with PEFT" not in str(error):
            raise
        return _with_peft(base, path), None, tokenizer
    return load_adapter(base, path, verify_base=verify_base), None, tokenizer


def _with_peft(base: Any, path: Path) -> Any:
    from peft import PeftModel

    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=_UNFIT)
        try:
            return PeftModel.from_pretrained(base, str(path)).eval()
        except (KeyError, RuntimeError, TypeError, UserWarning, ValueError) as error:
            reason = " ".join(str(error).split())
            raise ValueError(
                f"PEFT cannot put the adapter {path} on this {type(base).__name__}: {reason:.200}. Expected an adapter "
                "of this model; load the one that it was trained on."
            ) from error

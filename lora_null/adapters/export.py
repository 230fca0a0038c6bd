"""From a training checkpoint to what others read: a plain LoRA adapter. No SVD is taken."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch

from ..models.shards import WHOLE, is_checkpoint
from .checkpoint import of_checkpoint
from .files import PEFT_CONFIG, Adapter
from .names import published_name


def export_adapter(
    checkpoint: str | os.PathLike,
    output: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    lora_alpha: float | None = None,
    base_model_name_or_path: str | None = None,
    overwrite: bool = False,
) -> int:
    """Write a checkpoint's adapter as plain LoRA on the untouched base, with ``lora_alpha == r`` and one rank.

    Args:
        checkpoint: An adapter folder in PEFT's format, or the folder that a trainer saved of a model patched by
            :func:`lora_null.initialize` (``model.safetensors``, in one file or in shards).
        output: The adapter folder to write; it appears whole or not at all.
        dtype: Of the tensors on disk; the default is fp32. Where A was trained, the factors are stacked so that
            rounding them costs no more than their own precision.
        lora_alpha: Of the run, for a trainer's checkpoint; the default is what its ``config.json`` states under
            ``lora_null``, and ``r`` with a warning where it states nothing.
        base_model_name_or_path: Written for the reader's information; the default is what the checkpoint says,
            without the leading folders of an absolute path.
        overwrite: Replace an existing adapter folder.

    Returns:
        The rank on disk.

    Raises:
        FileNotFoundError: ``checkpoint`` is neither kind of folder.
        ValueError: A file is damaged, of a newer format, or holds no adapter.
        FileExistsError: ``output`` exists and must not be replaced.
    """
    folder = Path(checkpoint)
    if (folder / PEFT_CONFIG).exists():
        adapter = Adapter.read(folder)
        if lora_alpha is not None:
            raise ValueError(
                f"{folder} states its lora_alpha itself; leave lora_alpha out, it is only for a "
                "trainer's checkpoint of a patched model."
            )
    elif is_checkpoint(folder):
        adapter = of_checkpoint(folder, lora_alpha)
    else:
        raise FileNotFoundError(
            f"{folder} holds neither {PEFT_CONFIG} nor {WHOLE}; expected an adapter folder, or the folder that a "
            "trainer saved of a model patched by lora_null.initialize."
        )
    base_model = base_model_name_or_path or published_name(adapter.base_model)
    return replace(adapter, base_model=base_model).write(Path(output), dtype=dtype, overwrite=overwrite)

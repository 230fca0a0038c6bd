"""Merge adapters into the weights, and write the merged model."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..models.arguments import takes
from ..models.loading import PROCESSORS
from ..models.refusals import DIVERGED, require_finite
from ..models.shards import INDEX
from ..models.targets import survey
from ..models.wrappers import unwrapped
from ..models.zero_points import ZeroPoints, zero_points
from ..system.files import replaced_folder
from ..system.log import logger
from .delta import require_shift, shift_base
from .layer import LoraNullLinear, detach_adapter, require_layers
from .state import set_state

# Of an adapter's length, what rounding zero points may take before it is said.
_MUCH = 0.1


@takes(model=nn.Module)
def merge(model: nn.Module) -> nn.Module:
    """Fold every adapter into its weight, computed in fp32 and rounded once, and restore the plain layers.

    Sharded weights (FSDP2, tensor parallel) are merged shard by shard; all processes have to call this.

    Into a quantised weight goes an adapter that was trained with ``group_pooling`` of its group size, or a multiple:
    ``zeros - s (B A) / scales`` in float64, rounded once to the type of the zero points, and the integer codes stay as
    they are (QA-LoRA, arXiv 2309.14717). That needs zero points in floating point.

    Returns:
        The same model, with nothing of this package left on it.

    Raises:
        ValueError: A weight cannot take the adapter; nothing is changed then.
    """
    wrapper, model = model, unwrapped(model)
    layers = require_layers(model)
    linears = survey(model).linears
    zeros: dict[str, tuple[ZeroPoints, Tensor]] = {}
    lost: dict[str, float] = {}
    for name, layer in layers.items():
        factors = layer.lora_A.weight, layer.lora_B.weight
        require_finite(f"The adapter of {name}", *factors, f", so nothing was merged. {DIVERGED}")
        points = zero_points(name, layer)
        if points is not None:
            exact = _with_adapter(name, layer, points)
            zeros[name] = points, exact.to(points.values.dtype)
            change = (exact - points.values.double()).norm()
            lost[name] = float((zeros[name][1].double() - exact).norm() / change) if change else 0.0
            continue
        linears[name].require_writable("Merging")
        require_shift(name, layer, layer.lora_A.weight, layer.lora_B.weight, layer.scaling)
    for name, layer in layers.items():
        if name in zeros:
            points, values = zeros[name]
            points.write(values)
        else:
            # The shifted base holds W - s B0 A0, so in both modes the trained factors are what is missing.
            shift_base(layer, layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), layer.scaling)
        detach_adapter(layer)
    set_state(model, None)
    worst = max(lost, key=lost.__getitem__, default=None)
    if worst is not None and lost[worst] > _MUCH:
        logger.warning(
            "Rounding the zero points to %s changes the adapter of %s by %.0f %% of its length, and half of all by "
            "%.0f %% or more. Load the base in float32, whose zero points hold more.",
            zeros[worst][0].values.dtype,
            worst,
            100 * lost[worst],
            100 * sorted(lost.values())[len(lost) // 2],
        )
    return wrapper


@torch.no_grad()
def _with_adapter(name: str, layer: LoraNullLinear, points: ZeroPoints) -> Tensor:
    """Return, in float64, the zero points under which a quantised layer computes what it does adapted."""
    A, B = layer.lora_A.weight.double(), layer.lora_B.weight.double()
    groups = A.unflatten(1, (-1, points.group_size))
    first = groups[..., 0]
    rounding = 8 * torch.finfo(layer.lora_A.weight.dtype).eps * float(A.abs().max())
    if not bool(((groups - first.unsqueeze(-1)).abs() <= rounding).all()):
        raise ValueError(
            f"The adapter of {name} reads the inputs of a group of {points.group_size} differently, and one zero point "
            "serves them all, so that it cannot be merged into the quantised weight. Train with LoraNullConfig("
            f"group_pooling={points.group_size}), keep the adapter beside the base, or merge it into the model in "
            "floating point."
        )
    exact = points.shifted(layer.scaling * (B @ first))
    dtype = points.values.dtype
    if not bool(torch.isfinite(exact.to(dtype)).all()):
        raise ValueError(
            f"The zero points of {name} would hold NaN or Inf in {dtype}, so nothing was merged. {DIVERGED}"
        )
    return exact


# What a merged checkpoint may hold and be replaced, besides the files that its tokenizer has today: what versions of
# transformers have written, and what they would read along with the new files. Anything else is the user's.
_MERGED_FILES = (
    "config.json",
    "generation_config.json",
    "model*.safetensors",
    INDEX,
    "tokenizer*.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.*",
    *PROCESSORS,
)


def check_merge_target(
    path: Path, *, overwrite: bool, inputs: Iterable[str | os.PathLike] = (), tokenizer: Any = None
) -> None:
    """Refuse a folder that must not be replaced by a merged model: one with other files, or one of the ``inputs``.

    Args:
        path: The folder to write; a missing or an empty one is free.
        overwrite: Allow replacing a model folder, which deletes what it holds: config, weights, tokenizer.
        inputs: What the merge reads.
        tokenizer: The one that will be saved; the files that it writes are its own, whatever their names.

    Raises:
        ValueError: ``path`` is one of the ``inputs``, links followed.
        FileExistsError: ``path`` exists, and ``overwrite`` is not set or it holds more than a merged model.
    """
    for source in map(Path, inputs):
        if source.exists() and source.resolve() == path.resolve():
            raise ValueError(f"{path} is the folder {source} that the merge reads. Choose another output folder.")
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists already. Choose another folder, or pass --overwrite to replace it.")
    if not (path / "config.json").exists():
        raise FileExistsError(f"{path} is not a model folder (no config.json); it is not overwritten.")
    with tempfile.TemporaryDirectory() as scratch:
        if tokenizer is not None:
            tokenizer.save_pretrained(scratch)
        known = (*_MERGED_FILES, *os.listdir(scratch))
    foreign = sorted(
        entry.name
        for entry in path.iterdir()
        if not entry.is_file() or not any(fnmatchcase(entry.name, pattern) for pattern in known)
    )
    if foreign:
        raise FileExistsError(
            f"{path} holds {foreign[:3]}{' and more' if len(foreign) > 3 else ''}, which are no files of a merged "
            "model and which overwriting would delete. Move them away, or choose another folder."
        )


def save_merged(
    model: Any,
    tokenizer: Any,
    output: str | os.PathLike,
    *,
    beside: Mapping[str, Path] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model folder that appears whole or not at all.

    Args:
        model: Merged.
        tokenizer: Of the model.
        output: The folder to write.
        beside: Files of the base model that go along, by name.
        overwrite: Replace a model folder.

    Raises:
        FileExistsError: ``output`` exists, and ``overwrite`` is not set or it holds more than a merged model.
    """
    path = Path(output)
    with replaced_folder(path, partial(check_merge_target, path, overwrite=overwrite, tokenizer=tokenizer)) as new:
        # How it read the tensors of a quantised checkpoint, transformers 5.23 cannot undo, and need not.
        own = {} if getattr(model, "hf_quantizer", None) is None else {"save_original_format": False}
        model.save_pretrained(new, **own)
        tokenizer.save_pretrained(new)
        for name, source in (beside or {}).items():
            shutil.copyfile(source, new / name)

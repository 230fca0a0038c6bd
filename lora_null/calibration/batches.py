"""The forms that calibration data may take, brought to one: keyword arguments of the model and a token mask."""

from __future__ import annotations

import hashlib
import inspect
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..covariances.covariances import check_weight
from ..system.tensors import bytes_of
from .masks import IGNORED_LABEL, MaskRule, Masks

# Key of a batch: how often its tokens count.
WEIGHT = "text_weight"


@dataclass(frozen=True)
class Batch:
    """One forward pass.

    Attributes:
        inputs: Keyword arguments of the model.
        masks: Which tokens count.
        shape: ``(B, L)``, or ``None`` where the model does not read token ids.
        tokens: How many tokens count.
        weight: How often each of them does.
    """

    inputs: dict[str, Any]
    masks: Masks
    shape: tuple[int, ...] | None
    tokens: int
    weight: float = 1.0

    @property
    def positions(self) -> int:
        """``B L``, padding included; the tokens that count where the model does not read token ids."""
        return self.shape[0] * self.shape[1] if self.shape else self.tokens


class BatchReader:
    """Turns whatever a user iterates over into :class:`Batch` objects.

    Args:
        model: Its ``forward`` says which arguments exist.
        mask_rule: See :class:`~lora_null.calibration.masks.MaskRule`.
        needs_head: The output head is calibrated too, so that it has to run on every token.
    """

    def __init__(self, model: nn.Module, mask_rule: str, needs_head: bool = False):
        self.rule = MaskRule(model, mask_rule)
        parameters = inspect.signature(model.forward).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        self.parameters = [n for n, p in parameters.items() if p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
        # wrappers take (*args, **kwargs) and pass them on
        self.takes_anything = not self.parameters and inspect.Parameter.VAR_KEYWORD in kinds
        if self.takes_anything:
            self.parameters = ["input_ids", "attention_mask"]
        config = getattr(model, "config", None)
        self.is_hf = hasattr(config, "to_dict")
        self.vocabulary, self.placeholders = _vocabulary(model)
        self.extra: dict[str, Any] = {}
        # in the order in which they were met
        self.weights: dict[float, None] = {}
        if self.is_hf and "use_cache" in self.parameters:
            self.extra["use_cache"] = False
        if "logits_to_keep" in self.parameters and not needs_head:
            self.extra["logits_to_keep"] = 1

    def read(self, item: Any, index: int) -> Batch:
        """Convert one item of the user's data; ``index`` names it in errors."""
        weight = 1.0
        if isinstance(item, Mapping) and WEIGHT in item:
            item = dict(item)
            check_weight(weight := item.pop(WEIGHT))
        self.weights[weight] = None
        inputs = self._inputs(item, index)
        self.check_ids(inputs, index)
        masks = self.rule.read(inputs, index)
        ids = inputs.get("input_ids", inputs.get("inputs_embeds"))
        shape = tuple(ids.shape[:2]) if isinstance(ids, Tensor) and ids.dim() > 1 else None
        if self.is_hf and not self.rule.two_sided:
            # The loss is not wanted, and would need the logits of every token; but a decoder may read its labels.
            inputs.pop("labels", None)
        if masks.main is not None:
            tokens = int(masks.main.sum())
        elif shape is not None:
            tokens = shape[0] * shape[1]
        else:
            first = next((v for v in inputs.values() if isinstance(v, Tensor)), None)
            tokens = 0 if first is None else first.numel() // (first.shape[-1] if first.is_floating_point() else 1)
        tokens += 0 if masks.target is None else int(masks.target.sum())
        return Batch({**inputs, **self.extra}, masks, shape, tokens, weight)

    def check_ids(self, inputs: Mapping[str, Any], index: int) -> None:
        """Raise ValueError for ids that the embedding lacks: on a GPU their lookup would end the process's CUDA use."""
        ids = inputs.get("input_ids")
        if self.vocabulary is None or not isinstance(ids, Tensor) or ids.is_meta or not ids.numel():
            return
        if ids.is_floating_point():
            raise TypeError(
                f"Batch {index} has input_ids of {ids.dtype}; expected whole numbers, token ids (B, L). Are they "
                "embeddings? Those go in as inputs_embeds."
            )
        outside = (ids < 0) | (ids >= self.vocabulary)
        if not bool(outside.any()):
            return
        found = sorted(set(ids[outside].tolist()) - self.placeholders)
        if found:
            raise ValueError(
                f"Batch {index} has the token ids {str(found[:5])[1:-1]}{', ...' if len(found) > 5 else ''}; expected "
                f"0 to {self.vocabulary - 1}, the rows of the model's embedding. Was the tokenizer another model's, "
                f"were labels (with {IGNORED_LABEL}) given as input_ids, or was a token added (for padding)? Then call "
                "model.resize_token_embeddings first, or pad with a known token."
            )

    def _inputs(self, item: Any, index: int) -> dict[str, Any]:
        if isinstance(item, Mapping):
            inputs = {str(key): _tensor(value) for key, value in item.items()}
            if self.is_hf and not self.takes_anything:
                # Columns that the model does not read (texts, ids of documents) are dropped, as the Trainer does.
                inputs = {key: value for key, value in inputs.items() if key in self.parameters or key == "labels"}
        elif isinstance(item, list | tuple) and item and all(isinstance(value, Tensor) for value in item):
            inputs = dict(zip(self.parameters, item, strict=False))
        else:
            value = _tensor(item)
            if not isinstance(value, Tensor):
                raise TypeError(
                    f"Batch {index} is a {type(item).__name__}; expected token ids as a tensor (B, L), a mapping with "
                    "input_ids, or a tuple of tensors in the order of the model's arguments. Texts have to be "
                    'tokenized first: tokenizer(texts, return_tensors="pt", padding=True).'
                )
            inputs = {self.parameters[0]: value}
        for key in ("input_ids", *self.parameters[:1]):
            if isinstance(inputs.get(key), Tensor) and inputs[key].dim() == 0:
                raise TypeError(
                    f"Batch {index} is the single number {inputs[key].item()}; expected token ids (B, L) or (L,). A "
                    "list is a list of batches: for one text of ids pass [ids], or a tensor of shape (1, L)."
                )
        for key in ("input_ids", "attention_mask", "labels"):
            if isinstance(inputs.get(key), Tensor) and inputs[key].dim() == 1:
                inputs[key] = inputs[key][None]
        if not any(isinstance(value, Tensor) for value in inputs.values()):
            raise TypeError(
                f"Batch {index} holds no tensor that {sorted(self.parameters)} name; expected input_ids (B, L)."
            )
        return inputs


def _vocabulary(model: nn.Module) -> tuple[int | None, set[int]]:
    """Return how many ids the input embedding has, and ids beyond it that the model replaces: images, audio, video."""
    try:
        size = model.get_input_embeddings().num_embeddings  # type: ignore[operator, union-attr]
    except (AttributeError, NotImplementedError):
        return None, set()
    config = getattr(getattr(model, "config", None), "__dict__", {})
    named = {value for key, value in config.items() if re.match("(image|video|audio).*_token_(id|index)$", key)}
    return size, {value for value in named if isinstance(value, int)}


def _tensor(value: Any) -> Any:
    if isinstance(value, Tensor) or value is None or isinstance(value, str | bool):
        return value
    try:
        return torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError):
        return value


def iterate(batches: Any, chunk_tokens: int) -> Iterable[Any]:
    """Return an iterable of batches; one big tensor or mapping is cut into row chunks of about ``chunk_tokens``."""
    if isinstance(batches, Mapping) and "input_ids" not in batches:
        return [batches]
    if isinstance(batches, Tensor | Mapping):
        return _chunks(batches, chunk_tokens)
    if isinstance(batches, str | bytes) or not isinstance(batches, Iterable):
        raise TypeError(
            f"batches is a {type(batches).__name__}; expected token ids (B, L), a mapping with input_ids, a list or "
            "DataLoader or iterator of these, or a function without arguments that runs the model."
        )
    return batches


def length_of(batches: Iterable[Any]) -> int | None:
    """Return the number of batches, or ``None`` if nobody knows it."""
    try:
        return len(batches)  # type: ignore[arg-type]
    except TypeError:  # also a DataLoader's, whose dataset has no length
        return None


def _chunks(batches: Tensor | Mapping, chunk_tokens: int) -> Sequence[Any]:
    ids = _tensor(batches if isinstance(batches, Tensor) else batches["input_ids"])
    if not isinstance(ids, Tensor) or ids.dim() < 2:
        return [batches]
    rows = max(1, chunk_tokens // max(1, ids.shape[1]))
    starts = range(0, ids.shape[0], rows)
    if isinstance(batches, Tensor):
        return [batches[i : i + rows] for i in starts]
    whole = {key: value for key, value in batches.items() if key == WEIGHT}
    return [{**{k: v[i : i + rows] for k, v in batches.items() if k not in whole}, **whole} for i in starts]


def first_tokens(inputs: Mapping[str, Any], tokens: int = 16) -> dict[str, Any]:
    """Cut a batch of token ids down to its first row and ``tokens`` columns, to observe the model cheaply."""
    tensors = [value for value in inputs.values() if isinstance(value, Tensor)]
    if any(value.dim() != 2 or value.is_floating_point() for value in tensors):
        return dict(inputs)
    return {key: value[:1, :tokens] if isinstance(value, Tensor) else value for key, value in inputs.items()}


def to_device(value: Any, device: torch.device | None) -> Any:
    """Move tensors, and tensors in lists, tuples and mappings, to ``device``; ``None`` leaves them."""
    if device is None:
        return value
    if isinstance(value, Tensor):
        return value.to(device, non_blocking=True)
    if isinstance(value, list | tuple) and type(value) in (list, tuple):
        return type(value)(to_device(item, device) for item in value)
    if isinstance(value, dict):
        return {key: to_device(item, device) for key, item in value.items()}
    return value


class DataFingerprint:
    """A running hash of the batches read so far: keys, dtypes, shapes and bytes of their tensors."""

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=16)

    def add(self, batch: Batch) -> None:
        """Take one batch into account."""
        if batch.weight != 1:
            self._hash.update(f"weight={batch.weight!r};".encode())
        masks = {"mask": batch.masks.main, "target_mask": batch.masks.target}
        tensors = {**batch.inputs, **{name: mask for name, mask in masks.items() if mask is not None}}
        for key in sorted(tensors):
            value = tensors[key]
            if isinstance(value, Tensor):
                value = value.cpu()
                self._hash.update(f"{key}:{value.dtype}:{tuple(value.shape)};".encode())
                self._hash.update(bytes_of(value))
            else:
                self._hash.update(f"{key}={value!r};".encode())

    def __str__(self) -> str:
        return self._hash.hexdigest()

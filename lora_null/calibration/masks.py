"""Which tokens of a batch count, read from the arguments of the model's call."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..models.parts import is_encoder_decoder

MASK_RULES = ("attention", "labels", "none")
# Label that loss functions leave out; Hugging Face collators put it on prompt and padding tokens.
IGNORED_LABEL = -100


@dataclass(frozen=True)
class Masks:
    """Which tokens count: ``(B, L)`` bool on the CPU, True where one does; ``None``: all of them.

    Attributes:
        main: Of the sequence that the model reads; of its encoder's, where it has a decoder besides.
        target: Of the decoder's sequence in an encoder-decoder model.
    """

    main: Tensor | None = None
    target: Tensor | None = None


class MaskRule:
    """Reads the masks of one call.

    Args:
        model: The model that is called.
        rule: ``"attention"``: tokens with ``attention_mask == 0`` do not count. ``"labels"``: nor do tokens with
            ``labels == -100``. ``"none"``: all tokens count. The labels of an encoder-decoder model are its decoder's,
            and stand in for a ``decoder_attention_mask`` that is not given.
    """

    def __init__(self, model: nn.Module, rule: str):
        self.rule = rule
        self.two_sided = is_encoder_decoder(model)
        head: Any = getattr(model, "get_output_embeddings", None)
        # a classifier's labels are no tokens
        self.labels_are_tokens = head is not None and head() is not None

    def read(self, inputs: Mapping[str, Any], index: int) -> Masks:
        """Return the masks of the call number ``index`` with these arguments.

        Raises:
            ValueError: A mask is not ``(B, L)``, or the labels that the rule needs are missing.
        """
        if self.rule == "none":
            return Masks()
        past = inputs.get("cache", inputs.get("past_key_values"))
        attention = _given("attention_mask", inputs, index)
        if not self.two_sided:
            own = _newest(attention, _length(inputs, ""), past)
            return Masks(_padded(own, self._labelled(inputs, index) if self.rule == "labels" else None))
        target = _newest(_given("decoder_attention_mask", inputs, index), _length(inputs, "decoder_"), past)
        stands_in = target is None and self.labels_are_tokens and isinstance(inputs.get("labels"), Tensor)
        labelled = None
        if self.rule == "labels" or stands_in:
            labelled = self._labelled(inputs, index)
        elif target is None and _length(inputs, "decoder_") is None:
            # a decoder that is given nothing reads what the encoder reads, shifted by one (BART)
            target = attention
        return Masks(_padded(attention), _padded(target, labelled))

    def _labelled(self, inputs: Mapping[str, Any], index: int) -> Tensor:
        labels = inputs.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(
                f'mask="labels" leaves out tokens with labels == {IGNORED_LABEL}, but batch {index} has no labels '
                f'(it has {sorted(inputs)}). Add them, or use mask="attention".'
            )
        return labels.cpu() != IGNORED_LABEL


def _given(name: str, inputs: Mapping[str, Any], index: int) -> Tensor | None:
    mask = inputs.get(name)
    if mask is None:
        return None
    if not isinstance(mask, Tensor) or mask.dim() != 2:
        # generate with a static cache makes masks of four dimensions by itself, in a dict for some models
        form = tuple(mask.shape) if isinstance(mask, Tensor) else f"a {type(mask).__name__}"
        raise ValueError(
            f"The {name} of batch {index} is {form}; expected (B, L) with 0 on "
            'padding. Pass mask="none" if every token counts, or masks as the tokenizer makes them.'
        )
    return mask.cpu() != 0


def _length(inputs: Mapping[str, Any], prefix: str) -> int | None:
    """Return ``L`` of the tokens that this call reads."""
    for name in ("input_ids", "inputs_embeds"):
        if isinstance(inputs.get(prefix + name), Tensor):
            return inputs[prefix + name].shape[1]
    return None


def _newest(mask: Tensor | None, length: int | None, past: Any) -> Tensor | None:
    """Cut a mask that covers the tokens in the cache, too, down to those of this call, its last columns."""
    if mask is None or length is None or not hasattr(past, "get_seq_length"):
        return mask
    cached = int(past.get_seq_length())
    return mask[:, cached:] if mask.shape[1] == cached + length else mask


def _padded(*masks: Tensor | None) -> Tensor | None:
    """Return where all masks are True; ``None`` if that is everywhere."""
    given = [mask for mask in masks if mask is not None]
    counts = torch.stack(given).all(0) if given else None
    return None if counts is None or bool(counts.all()) else counts

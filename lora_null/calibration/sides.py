"""Which mask belongs to the input of a layer: known from where the layer stands and what its part was called with.

Encoder and decoder read different sequences, images and sounds are no tokens, and a decoder's cross-attention reads
what the encoder made. Sizes may agree by chance; they are compared at the end, and never tell sides apart.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from ..models.parts import is_encoder_decoder, text_modules
from ..models.targets import output_head_names
from .accumulator import Selection
from .masks import Masks

MAIN, TARGET, OTHER = "main", "target", "other"
# Arguments by which a decoder, its layers and their attention are given what another part of the model has made.
_MEMORIES = ("encoder_hidden_states", "key_value_states", "cross_attention_states")
# Masks of images and sounds whose True is known to mean that something is there.
_PRESENT = ("attention_mask", "patch_attention_mask", "pixel_attention_mask", "pixel_mask")


class Sides:
    """Follows the calls of a model's parts, and chooses the mask for each input.

    Args:
        model: The model.
        names: Of the target layers.
        masked: Off, all tokens count everywhere.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], masked: bool):
        self.masked, self.two_sided = masked, is_encoder_decoder(model)
        self._encoder: Any = model.get_encoder() if self.two_sided else None  # type: ignore[operator]
        self._side = _sides(model, self._encoder)
        names = list(names)
        self._towers = _towers(model, self._side, names)
        self._readers = [
            (module, inspect.signature(module.forward))
            for name, module in model.named_modules()
            if (self.two_sided or self._towers) and self._side[name] in (MAIN, TARGET) and _reads_memory(module)
        ]
        # Experts are named after a parameter of theirs, and a number.
        experts = [name for name in names if name not in self._side]
        self._side |= {name: self._side[name.rsplit(".", 2)[0]] for name in experts}
        self.end()

    def begin(self, batch: int, masks: Masks) -> None:
        """Start a call of the model."""
        self._batch, self._running = batch, True
        self._selections = {MAIN: Selection(masks.main), TARGET: Selection(masks.target)}
        self._memories: dict[int, StorageWeakRef] = {}
        self._padded, self._tower_mask = "", Selection(None)

    def end(self) -> None:
        """End it."""
        self.begin(-1, Masks())
        self._running = False

    def selection(self, name: str, x: Tensor) -> Selection:
        """Return which rows of ``x (..., d)``, the input of the layer ``name``, count.

        Raises:
            ValueError: The rows are not those of the mask that belongs to them, or nobody knows which they are.
        """
        if not self.masked:
            return self._selections[MAIN]
        if not self._running:
            raise ValueError(
                f"{name} ran outside of a call of the model, so that nobody knows which of its inputs are padding. "
                'Call the model itself, or pass mask="none" if every token counts.'
            )
        side, memory = self._side[name], self._memories.get(x.untyped_storage()._cdata)
        if side != OTHER and memory is not None and not memory.expired():
            side = MAIN if self.two_sided else OTHER
        if side == OTHER:
            return self._of_tower(name, x)
        selection = self._selections[side]
        if _fits(selection.mask, x):
            return selection
        assert selection.mask is not None
        raise ValueError(
            f"Batch {self._batch} has padding, mask {tuple(selection.mask.shape)}, but the input of {name} is "
            f"{tuple(x.shape)}: its rows cannot be told apart into tokens and padding. Give batches without padding "
            '(one text each, or packed), pass mask="none" if padding may count, or leave the layer out of '
            "target_modules."
        )

    def _of_tower(self, name: str, x: Tensor) -> Selection:
        """Choose among the rows of an image or a sound: all of them, unless a part was told of padding."""
        if not self._padded or (self._tower_mask.mask is not None and _fits(self._tower_mask.mask, x)):
            return self._tower_mask
        raise ValueError(
            f"Batch {self._batch} has padded images or sounds ({self._padded}), but the input of {name} is "
            f"{tuple(x.shape)}: its rows cannot be told apart into data and padding. Give images of one size, pass "
            'mask="none" if padding may count, or leave the layer out of target_modules.'
        )

    @contextmanager
    def following(self) -> Iterator[None]:
        """Follow the calls of the model's parts for the length of the block."""
        handles = []
        try:
            if self.masked:
                for module, signature in self._readers:
                    note = partial(self._note_memories, signature)
                    handles.append(module.register_forward_pre_hook(note, with_kwargs=True))
                for tower in self._towers:
                    enter = partial(self._enter_tower, inspect.signature(tower.forward))
                    handles.append(tower.register_forward_pre_hook(enter, with_kwargs=True))
                if self._encoder is not None:
                    handles.append(self._encoder.register_forward_hook(self._note_output))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _note_memories(self, signature: inspect.Signature, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        given = _arguments(signature, args, kwargs)
        for name in _MEMORIES:
            self._remember(given.get(name))

    def _note_output(self, _module: nn.Module, _args: tuple, output: Any) -> None:
        self._remember(output if isinstance(output, Tensor) else output[0])

    def _remember(self, value: Any) -> None:
        if isinstance(value, Tensor):
            reference = StorageWeakRef(value.untyped_storage())
            self._memories[reference.cdata] = reference

    def _enter_tower(self, signature: inspect.Signature, _module: nn.Module, args: tuple, kwargs: dict) -> None:
        self._tower_mask = Selection(None)
        for name, value in _arguments(signature, args, kwargs).items():
            if "mask" not in name or not isinstance(value, Tensor) or not value.numel():
                continue
            if bool((value != value.flatten()[0]).any()):
                self._padded = f"{name} {tuple(value.shape)}"
                if name in _PRESENT and bool(((value == 0) | (value == 1)).all()):
                    self._tower_mask = Selection(value.flatten(1).cpu() != 0)


def _sides(model: nn.Module, encoder: nn.Module | None) -> dict[str, str]:
    """Return the side of every module by name."""
    main = TARGET if encoder is not None else MAIN
    inside_encoder = set() if encoder is None else {id(module) for module in encoder.modules()}
    text = text_modules(model)
    heads = output_head_names(model)
    sides = {}
    for name, module in model.named_modules():
        if id(module) in inside_encoder:
            sides[name] = MAIN
        else:
            sides[name] = main if text is None or id(module) in text or name in heads else OTHER
    return sides


def _towers(model: nn.Module, sides: Mapping[str, str], names: Iterable[str]) -> list[nn.Module]:
    """Return the outermost modules beside the text that hold target layers and nothing of the text."""
    targets, modules = tuple(names), dict(model.named_modules())
    holders = {name.rpartition(".")[0] for name, side in sides.items() if side != OTHER}
    for holder in list(holders):
        parts = holder.split(".")
        holders.update(".".join(parts[:length]) for length in range(len(parts)))
    return [
        module
        for name, module in modules.items()
        if sides[name] == OTHER
        and name not in holders
        and name.rpartition(".")[0] in holders
        and any(target == name or target.startswith(f"{name}.") for target in targets)
    ]


def _reads_memory(module: nn.Module) -> bool:
    try:
        parameters = inspect.signature(module.forward).parameters
    except (TypeError, ValueError):  # compiled code has no signature
        return False
    return any(name in parameters for name in _MEMORIES)


def _arguments(signature: inspect.Signature, args: tuple, kwargs: dict) -> dict[str, Any]:
    return dict(signature.bind_partial(*args, **kwargs).arguments)


def _fits(mask: Tensor | None, x: Tensor) -> bool:
    """Tell whether the rows of ``x (..., d)`` are the entries of ``mask``, in order."""
    if mask is None or (x.dim() == 2 and x.shape[0] == mask.numel()):
        return True
    # an axis of one, for heads that share an input, leaves the rows in order
    return [n for n in x.shape[:-1] if n != 1] == [n for n in mask.shape if n != 1]

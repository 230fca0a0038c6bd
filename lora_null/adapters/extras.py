"""What an adapter's file holds besides the factors: modules that trained whole, and biases of adapted layers."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..models.identity import tensor_key
from ..models.weights import gathered
from ..models.wrappers import plain_name
from ..system.tensors import PLAIN_TENSORS
from .layer import adapter_layers
from .names import PREFIX

_OURS = re.compile(r"(^|\.)(lora_A|lora_B|initial_A|initial_B)\.")


@dataclass(frozen=True)
class Extras:
    """Trained values that are no factors, as PEFT's format holds them.

    Attributes:
        tensors: Name in the model's state dict to values.
        modules_to_save: Ends of module names: a module that one of them selects is in ``tensors`` whole.
        bias: PEFT's name for which biases are there: ``"none"`` or those of the adapted layers, ``"lora_only"``.
        others: Name on disk to what only PEFT's own layers hold, such as adapters on embeddings.
        settings: Of PEFT's configuration, under which it reads those.
    """

    tensors: Mapping[str, Tensor] = field(default_factory=dict)
    modules_to_save: Sequence[str] = ()
    bias: str = "none"
    others: Mapping[str, Tensor] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)


def key_of(name: str, adapted: Iterable[str]) -> str:
    """Return what PEFT calls a tensor of the model on disk, where its LoRA layers hold the adapted ones."""
    module, _, part = name.rpartition(".")
    return PREFIX + (f"{module}.base_layer.{part}" if module in adapted else name)


def name_of(key: str) -> str:
    """Return the name in the model of a tensor on disk."""
    return key.removeprefix(PREFIX).replace(".base_layer.", ".")


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers outside the adapters by their names; tied ones under all of theirs."""
    found: dict[str, Tensor] = {}
    for prefix, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            path = plain_name(f"{prefix}.{name}".lstrip("."))
            if tensor is not None and name not in module._non_persistent_buffers_set and not _OURS.search(path):
                found[path] = tensor
    return found


def keys_of(model: nn.Module) -> dict[str, str]:
    """Hash the values outside the adapters, so that :func:`extras_of` sees what is trained later.

    What is quantised, sharded or elsewhere is left out; of an adapted layer's weight a sample is enough.
    """
    weights = {f"{plain_name(name)}.weight" for name in adapter_layers(model)}
    keys: dict[int, str] = {}
    found = {}
    for name, tensor in tensors_of(model).items():
        if _comparable(tensor):
            if id(tensor) not in keys:
                keys[id(tensor)] = _keys(tensor) if name not in weights else tensor_key(tensor, sampled=True)
            found[name] = keys[id(tensor)]
    return found


def _keys(tensor: Tensor) -> str:
    """Hash a tensor in its own dtype, and as what it may be converted to before it is saved."""
    narrower = (torch.bfloat16, torch.float16) if tensor.element_size() > 2 else ()
    return "|".join(tensor_key(tensor.detach().to(dtype)) for dtype in (tensor.dtype, *narrower))


def selected(names: Iterable[str], wishes: Iterable[str]) -> set[str]:
    """Return the modules that PEFT takes for ``modules_to_save``, those that end so, of the modules of tensors."""
    modules = {name.rsplit(".", i)[0] for name in names for i in range(1, name.count(".") + 1)}
    endings = tuple(wishes)
    return {name for name in modules if (PREFIX + name).endswith(endings)}


def inside(name: str, modules: Iterable[str]) -> bool:
    """Tell whether a module or tensor is one of ``modules`` or lies in one."""
    return any(f"{name}.".startswith(f"{module}.") for module in modules)


def require_modules(model: nn.Module, wishes: Iterable[str], adapted: Iterable[str], source: str) -> set[str]:
    """Return the modules that train whole; ValueError for names that select none, or none that can."""
    tensors = tensors_of(model)
    chosen: set[str] = set()
    for wish in wishes:
        found = selected(tensors, [wish])
        if not found:
            raise ValueError(
                f"{source} names {wish!r}, in which no module with weights of this {type(model).__name__} ends."
            )
        chosen |= found
    for name in chosen:
        others = [other for other in chosen if other.startswith(f"{name}.")]
        if others:
            raise ValueError(f"{source} selects {name} and {others[0]} inside it; expected the outer one alone.")
        layers = [layer for layer in adapted if inside(layer, [name]) or inside(name, [layer])]
        if layers:
            raise ValueError(
                f"{source} selects {name}, but {layers[0]} gets an adapter; expected one or the other. Name modules "
                "without adapters inside, or leave such layers out through exclude_modules."
            )
    for name, tensor in tensors.items():
        if isinstance(tensor, nn.Parameter) and inside(name, chosen) and not _comparable(tensor):
            raise ValueError(
                f"{source} selects {name}, which is quantised, offloaded or sharded ({type(tensor).__name__}, "
                f"{tensor.dtype}); expected floating point weights in memory."
            )
    return chosen


def changed_since(model: nn.Module, before: Mapping[str, str]) -> set[str]:
    """Return the tensors outside the adapters that have other values than those that :func:`keys_of` has hashed."""
    return {name for name, tensor in tensors_of(model).items() if differs(tensor, before.get(name))}


@torch.no_grad()
def extras_of(model: nn.Module, before: Mapping[str, str], modules_to_save: Iterable[str]) -> Extras:
    """Collect what was trained besides the factors: what requires gradients or differs from ``before``.

    Raises:
        ValueError: PEFT's format has no place for it.
    """
    layers = {plain_name(name): layer for name, layer in adapter_layers(model).items()}
    adapted = set(layers)
    tensors = tensors_of(model)
    changed = changed_since(model, before)
    if shifted := [name for name, layer in layers.items() if layer.shifted and f"{name}.weight" in changed]:
        raise ValueError(
            f"The weight of {shifted[0]} is another than the one that was shifted when the adapters were attached "
            "(train='ab'): a state dict of a run that started from other factors was loaded, or it was trained or "
            "changed by hand. Expected the base that the adapter began on. To go on from another run, use "
            "lora_null.load_adapter(base_model, checkpoint, is_trainable=True)."
        )
    changed |= {name for name, tensor in tensors.items() if tensor.requires_grad}
    # What was put into the model later is in no base either.
    changed |= {
        name
        for name, tensor in tensors.items()
        if before
        and name not in before
        and name.rpartition(".")[0] not in adapted
        and isinstance(tensor, nn.Parameter)
        and _comparable(tensor)
    }
    chosen, extras = choose(tensors, changed, adapted, modules_to_save)
    return replace(extras, tensors={name: gathered(tensors[name]).detach() for name in chosen})


def choose(
    names: Iterable[str], changed: Iterable[str], adapted: Iterable[str], modules_to_save: Iterable[str]
) -> tuple[list[str], Extras]:
    """Find the place in PEFT's format for what has changed.

    Args:
        names: Of all tensors of the model outside the adapters.
        changed: Those that a file must hold.
        adapted: Modules that have adapters.
        modules_to_save: Ends of the names of modules that a file holds in any case.

    Returns:
        The tensors that the file holds, and the rest of what it says of them.

    Raises:
        ValueError: There is no place.
    """
    names, wishes, layers = list(names), list(modules_to_save), set(adapted)
    known = selected(names, wishes)
    owners, biases = set(known), False
    for name in changed:
        owner, _, part = name.rpartition(".")
        if owner in layers and part == "bias":
            biases = True
        elif owner in layers or not owner or any(inside(layer, [owner]) for layer in layers):
            raise ValueError(
                f"{name} requires a gradient or has changed since the adapters were attached, and an adapter's file "
                "has no place for it: it belongs to an adapted layer, or to a module with adapters inside. Expected it "
                "frozen at its pre-trained value. Freeze or restore it, or merge the adapters and save the whole model."
            )
        else:
            owners.add(owner)
    outer = {name for name in owners if not inside(name, owners - {name})}
    if known - outer:
        wishes, known = [], set()
    for name in sorted(outer - known):
        # PEFT's whole name where the model's own would select other modules too.
        wishes.append(name if selected(names, [name]) <= outer else PREFIX + name)
    saved = selected(names, wishes)
    chosen = [
        name
        for name in names
        if inside(name, saved) or (biases and name.endswith(".bias") and name.rpartition(".")[0] in layers)
    ]
    return chosen, Extras({}, wishes, "lora_only" if biases else "none")


def _comparable(tensor: Any) -> bool:
    plain = type(tensor) in PLAIN_TENSORS and tensor.layout is torch.strided and tensor.is_floating_point()
    return plain and not tensor.is_meta and tensor.numel() > 0


def differs(tensor: Tensor, before: str | None) -> bool:
    """Tell whether a tensor has other values than those of ``before``, converted or not; not where it was flattened."""
    if before is None or not _comparable(tensor):
        return False
    sampled, known = before.startswith("sample"), {_kind(key): key for key in before.split("|")}
    now = tensor_key(tensor, sampled=sampled)
    kind, first = _kind(now), next(iter(known))
    own = getattr(torch, first, None)
    if kind not in known and isinstance(own, torch.dtype) and tensor.element_size() >= own.itemsize:
        # Wider than it was: back in its own dtype it has the same bits.
        now, kind = tensor_key(tensor.to(own), sampled=sampled), first
    then = known.get(kind)
    return then is not None and now != then and now.count(",") == then.count(",")


def _kind(key: str) -> str:
    return key.removeprefix("sample ").split(":")[0]


def place_extras(model: nn.Module, extras: Extras, adapted: Iterable[str], source: str) -> dict[str, Tensor]:
    """Match the extras of a file with the model and check them; nothing is changed.

    Returns:
        Name to values in the dtype and on the device of the model.

    Raises:
        ValueError: They do not fit the model, or would change what is not in the file.
    """
    tensors = tensors_of(model)
    # PEFT itself writes both of its names for a classifier's head, and passes over the one that the model lacks.
    known = [wish for wish in extras.modules_to_save if selected(tensors, [wish])]
    wanted = require_modules(model, known, adapted, f"{source}: modules_to_save")
    missing = [name for name in tensors if inside(name, wanted) and name not in extras.tensors]
    if missing:
        raise ValueError(
            f"{source} lacks {missing[0]}, which its modules_to_save promise. It is damaged or incomplete."
        )
    placed: dict[str, Tensor] = {}
    by_storage: dict[int, str] = {}
    for name, values in extras.tensors.items():
        own = tensors.get(name)
        if own is None or own.shape != values.shape or not (_comparable(own) or not own.is_floating_point()):
            found = "nothing of that name" if own is None else f"{type(own).__name__} {own.dtype} {tuple(own.shape)}"
            raise ValueError(
                f"{source} holds {name} of shape {tuple(values.shape)}, but this {type(model).__name__} has {found}. "
                "The adapter belongs to another model, or its vocabulary was resized: call "
                "model.resize_token_embeddings(...) before loading."
            )
        placed[name] = values.to(own.device, own.dtype)
        if own.is_floating_point() and not bool(torch.isfinite(placed[name]).all()):
            raise ValueError(f"{source}: {name} holds NaN or Inf in {own.dtype}; load the model in another dtype.")
        if own.data_ptr() in by_storage and not torch.equal(placed[name], placed[by_storage[own.data_ptr()]]):
            raise ValueError(
                f"{source} holds different values for {name} and {by_storage[own.data_ptr()]}, which are one weight in "
                "this model (tied). Load the model with tie_word_embeddings=False."
            )
        by_storage[own.data_ptr()] = name
    for name, tensor in tensors.items():
        if name not in placed and tensor.numel() and tensor.data_ptr() in by_storage:
            raise ValueError(
                f"{source} holds {by_storage[tensor.data_ptr()]} but not {name}, which is the same weight in this "
                "model (tied) and would change along. Load the model with tie_word_embeddings=False."
            )
    return placed


def is_trained(name: str, extras: Extras, model: nn.Module) -> bool:
    """Tell whether training goes on with a tensor of the file."""
    return (name.endswith(".bias") and extras.bias != "none") or inside(
        name, selected(tensors_of(model), extras.modules_to_save)
    )

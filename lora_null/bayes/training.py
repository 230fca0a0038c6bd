"""Posteriors that are trained: random factors put into a model's LoRA layers, and taken out as a :class:`Posterior`.

A random factor is a parametrisation (``torch.nn.utils.parametrize``) of the module that holds the ordinary one. While a
layer in training mode runs, its ``weight`` is a sample; everywhere else, so for whatever saves, merges or exports, it
is the mean. The layers, ours and PEFT's, fused or not, know nothing of it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..models.arguments import takes
from .flipout import Flipout
from .inducing import Inducing
from .layers import FACTORS, AdaptedLayer, adapted_layers, factors_of, norms_of
from .noise import Noise
from .posterior import Posterior

RandomFactor = Inducing | Flipout


@takes(model=nn.Module)
def inducing(
    model: nn.Module, *, which: str | None = None, size: int = 9, prior_std: float = 0.1, hidden: int = 16
) -> list[nn.Parameter]:
    """Make trained factors random through inducing matrices: Bayesian-LoRA (arXiv 2601.21003), before training.

    A factor is its start, kept, plus a deviation that ``size x size`` random numbers determine but for a small rest;
    the mean starts at the start. Train as ever with :func:`added_loss`, then :func:`collect`.

    Args:
        model: With a LoRA adapter, ours in both modes or PEFT's, before its optimizer is made.
        which: ``"a"``, ``"b"`` or ``"ab"``; the default is what is trained.
        size: Rows and columns of the inducing matrix.
        prior_std: Of an entry, times the square root of the factor's columns.
        hidden: Units of the flow.

    Returns:
        The new parameters, which are also the model's: for an optimizer that gives them a rate of their own.

    Raises:
        ValueError: There is no adapter, a factor is not trained, already random or made of coefficients, or a number is
            not positive. Nothing is changed then.
    """
    if size < 1 or hidden < 1 or not prior_std > 0:
        raise ValueError(f"size={size}, hidden={hidden}, prior_std={prior_std}; expected positive numbers.")

    def make(layer: AdaptedLayer, name: str) -> Inducing:
        rows, columns = layer.factor(name).shape
        return Inducing((rows, columns), inducing=size, prior_std=prior_std / columns**0.5, hidden=hidden)

    return _attach(model, which, make)


@takes(model=nn.Module)
def blob(model: nn.Module, *, which: str | None = None, prior_std: float = 0.2) -> list[nn.Parameter]:
    """Give the entries of trained factors independent Gaussian noise by flipout: BLoB (arXiv 2406.11675).

    The mean is the ordinary factor, trained as ever; the standard deviations are learned beside it. The prior is
    centred at zero, or where training began on a shifted base.

    Args:
        model: As for :func:`inducing`.
        which: ``"a"``, ``"b"`` or ``"ab"``; the default is A, or B where A is frozen.
        prior_std: Of an entry.

    Returns:
        The new parameters, which are also the model's.

    Raises:
        ValueError: As for :func:`inducing`.
    """
    if not prior_std > 0:
        raise ValueError(f"prior_std={prior_std}; expected a positive number.")

    def make(layer: AdaptedLayer, name: str) -> Flipout:
        return Flipout(layer.factor(name), layer.initial(name), prior_std)

    return _attach(model, which, make, ("lora_A",))


@takes(model=nn.Module)
def collect(model: nn.Module) -> Posterior:
    """End the training of a posterior: its mean becomes the ordinary adapter, in place, and the noise is returned.

    From then on the model is as if plain LoRA had been trained: save, merge and export it as ever.

    Raises:
        ValueError: The model has no random factors.
    """
    layers = adapted_layers(model, random=True)
    found = {(name, factor): part for name, factor, part in random_factors(layers)}
    if not found:
        raise ValueError(
            f"{type(model).__name__} has no random factor; expected a model after lora_null.bayes.inducing or "
            "lora_null.bayes.blob, and to be collected once."
        )
    with torch.no_grad():
        kl = float(sum(part.kl(original(layers[name], factor)) for (name, factor), part in found.items()))
    noise: dict[str, Noise] = {}
    for (name, factor), part in found.items():
        for handle in part.handles:
            handle.remove()
        _remove(getattr(layers[name], factor))
        noise[f"{name}.{factor}"] = part.noise()
    method = "inducing" if isinstance(next(iter(found.values())), Inducing) else "blob"
    return Posterior(noise, norms_of(adapted_layers(model), noise), method, {"kl": kl})


def random_factors(layers: dict[str, AdaptedLayer]) -> Iterator[tuple[str, str, RandomFactor]]:
    """Yield layer, factor name and what is random there."""
    for name, layer in layers.items():
        for factor in FACTORS:
            part = _random(getattr(layer, factor))
            if part is not None:
                yield name, factor, part


def original(layer: AdaptedLayer, factor: str) -> Tensor:
    """Return the parameter that a random factor is made of."""
    return getattr(layer, factor).parametrizations.weight.original


def _attach(
    model: nn.Module,
    which: str | None,
    make: Callable[[AdaptedLayer, str], RandomFactor],
    preferred: Sequence[str] = FACTORS,
) -> list[nn.Parameter]:
    layers = adapted_layers(model)
    chosen: list[tuple[AdaptedLayer, str]] = []
    for name, layer in layers.items():
        trained = [factor for factor in FACTORS if _is_trained(layer, factor)]
        wanted = factors_of(which) if which else [f for f in trained if f in preferred] or trained
        missing = [factor for factor in wanted if factor not in trained]
        if missing or not wanted:
            raise ValueError(
                f"{(missing or FACTORS)[0]} of {name} is frozen, or made of coefficients; expected a trained "
                f"parameter. Choose what is random with which, here among {trained}."
            )
        chosen += [(layer, factor) for factor in wanted]
    made = [make(layer, factor).to(layer.factor(factor).device) for layer, factor in chosen]
    hooked: set[int] = set()
    for (layer, factor), part in zip(chosen, made, strict=True):
        holder = getattr(layer, factor)
        if isinstance(part, Inducing):
            holder.weight.requires_grad_(False)
        part.train(holder.training)
        part.handles = [
            holder.register_state_dict_post_hook(_with_mean),
            holder.register_load_state_dict_pre_hook(_without_mean),
        ]
        parametrize.register_parametrization(holder, "weight", part)
        if id(layer.module) not in hooked:
            hooked.add(id(layer.module))
            part.handles += [
                layer.module.register_forward_pre_hook(_begin),
                layer.module.register_forward_hook(_flip),
                layer.module.register_forward_hook(_end, always_call=True),
            ]
    return [parameter for part in made for parameter in part.parameters()]


@torch.no_grad()
def _remove(holder: Any) -> None:
    """Leave the mean in the ordinary parameter, as the object and in the memory that it was."""
    mean, weight = holder.weight, holder.parametrizations.weight.original
    # torch's remove_parametrizations changes the class, which a copy of the model shares
    holder.__class__ = parametrize.type_before_parametrizations(holder)
    del holder.parametrizations
    weight.copy_(mean)
    holder.register_parameter("weight", weight.requires_grad_(True))


def _is_trained(layer: AdaptedLayer, factor: str) -> bool:
    weight = layer.factor(factor)
    return isinstance(weight, nn.Parameter) and weight.requires_grad


def _random(holder: nn.Module) -> RandomFactor | None:
    if not parametrize.is_parametrized(holder, "weight"):
        return None
    parts: Any = holder.parametrizations.weight  # type: ignore[union-attr]
    return parts[0] if isinstance(parts[0], Inducing | Flipout) else None


def _holders(module: Any) -> Iterator[tuple[Any, Any, float]]:
    """Yield the active pairs of factors of one layer, with their scaling; none where the adapter is switched off."""
    if hasattr(module, "adapter_enabled"):
        if module.adapter_enabled:
            yield module.lora_A, module.lora_B, module.scaling
    elif not (module.disable_adapters or module.merged):
        for name in module.active_adapters:
            if name in module.lora_A:
                yield module.lora_A[name], module.lora_B[name], module.scaling[name]


# No hook holds a module, so that copies of a model have hooks of their own.
def _begin(module: nn.Module, args: Any) -> None:
    for *holders, _ in _holders(module):
        for holder in holders:
            part = _random(holder)
            if part is not None and part.training:
                part.start_forward(holder.parametrizations.weight.original)


def _flip(module: nn.Module, args: Any, y: Tensor) -> Tensor:
    for lora_A, lora_B, scaling in _holders(module):
        of_A, of_B = _random(lora_A), _random(lora_B)
        x, change = args[0], None
        low = None
        if isinstance(of_A, Flipout) and of_A.drawn is not None:
            low = of_A.flipped(x.to(of_A.rho.dtype))
            change = nn.functional.linear(low, lora_B.weight)
        if isinstance(of_B, Flipout) and of_B.drawn is not None:
            projected = nn.functional.linear(x.to(of_B.rho.dtype), lora_A.weight)
            added = of_B.flipped(projected if low is None else projected + low)
            change = added if change is None else change + added
        if change is not None:
            y = y + (scaling * change).to(y.dtype)
    return y


def _end(module: nn.Module, args: Any, y: Any) -> None:
    for *holders, _ in _holders(module):
        for holder in holders:
            part = _random(holder)
            if part is not None:
                part.end_forward()


def _with_mean(module: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Write the mean as ``weight`` too: what reads factors out of a checkpoint needs nothing else."""
    # a clone: safetensors refuses tensors that share memory, as the mean and the parameter may
    state_dict[prefix + "weight"] = module.weight.detach().clone()


def _without_mean(module: Any, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    state_dict.pop(prefix + "weight", None)

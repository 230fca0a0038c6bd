"""Which linear layers a model has, which of them receive an adapter, and the only place that decides it."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import torch
from torch import Tensor, nn

from ..config import ALL_LINEAR, LoraNullConfig
from ..system.log import logger, warn_once
from .experts import matrices_of
from .layout import is_linear
from .parts import text_modules
from .refusals import Target

# Heads of classifiers, under the names that PEFT knows.
CLASSIFIERS = ("score", "classifier")


@dataclass(frozen=True)
class Survey:
    """What one walk over a model's modules has found.

    Attributes:
        model: The model.
        linears: Every linear layer, ``Conv1D``, subclasses and quantised layers of other kinds too, by name and in
            the model's own order; PEFT's factors aside, which are linear layers too: only what they adapt counts.
        heads: Names of the modules of the output head.
        stacks: Matrices stacked into one parameter, as transformers 5 keeps a layer's experts: name to size.
    """

    model: nn.Module
    linears: dict[str, Target]
    heads: set[str]
    stacks: dict[str, int]

    @cached_property
    def experts(self) -> dict[str, Target]:
        """The matrices of all experts that are fused in a known way, by name of the parameter and number."""
        found = {}
        for stack in self.stacks:
            owner, _, parameter = stack.rpartition(".")
            for matrix in matrices_of(self.model.get_submodule(owner), parameter):
                name = f"{stack}.{matrix.expert}"
                found[name] = Target(name, cast(nn.Linear, matrix))
        return found

    @property
    def matrices(self) -> dict[str, Target]:
        """All that calibration can sum the inputs of: the linear layers, and the experts."""
        return {**self.linears, **self.experts} if self.stacks else self.linears

    def select(self, config: LoraNullConfig | None = None) -> dict[str, Target]:
        """Select linear layers as PEFT does, by name.

        Args:
            config: Its ``target_modules`` select: ``"all-linear"``, a regular expression that must match the whole
                name, or names: a module is selected when its name equals one or ends in ``.`` and one of them. Of
                these, ``exclude_modules``, ``layers_to_transform`` and ``modules_to_save`` leave out. The experts of a
                parameter are added that ``target_parameters`` names, or whose name ends in ``.`` and one of them.

        Returns:
            Name to layer, in the model's own order. What was wished for but is no linear layer of its own, such as
            experts fused into one parameter, is named in a warning, and so are layers on which PEFT cannot load an
            adapter; ``"all-linear"`` leaves those out.

        Raises:
            ValueError: The model has no linear layer, a wish matches none, or none is left.
        """
        config = config or LoraNullConfig()
        experts = self._experts_wished(config.target_parameters or ())
        targets = self._wished(config.target_modules, experts) if config.target_modules else {}
        wishes = config.target_modules
        if config.layers_to_transform and wishes == ALL_LINEAR:
            wishes = sorted({name.rsplit(".", 1)[-1] for name in targets})
        kept = targets
        for option in (
            {"exclude_modules": _listed(config.exclude_modules)},
            {"modules_to_save": _listed(config.modules_to_save)},
            {
                "layers_to_transform": _listed(config.layers_to_transform),
                "layers_pattern": _listed(config.layers_pattern),
            },
        ):
            if not any(option.values()):
                continue
            left = _allowed(kept, wishes, option)
            if len(left) == len(kept) and "exclude_modules" in option:
                logger.warning("exclude_modules names %s, which excludes no layer.", config.exclude_modules)
            if not left:
                raise ValueError(
                    f"{option} leaves none of the {len(kept)} layers that target_modules selects, for instance "
                    f"{next(iter(kept))}; expected some to remain. Do the names or numbers fit the model?"
                )
            kept = left
        return {**kept, **experts}

    def _beside_text(self) -> set[str]:
        """Return, and name in a warning, the layers of towers that a language model reads images and sounds with."""
        text, getter = text_modules(self.model), getattr(self.model, "get_output_embeddings", None)
        # Without a head the model is no language model, and images may be what it is about.
        if text is None or getter is None or getter() is None:
            return set()
        found = {name for name, target in self.linears.items() if id(target.linear) not in text} - self.heads
        if found:
            parts = sorted({".".join(name.split(".")[:2]) for name in found})
            message = (
                f"all-linear leaves out {len(found)} layers of {type(self.model).__name__} that read images or sounds: "
                f"{', '.join(parts)}. To adapt them, name them in target_modules; to leave them out in PEFT too, "
                "in exclude_modules."
            )
            warn_once(message, message)
        return found

    def _experts_wished(self, target_parameters: Sequence[str]) -> dict[str, Target]:
        """Return the matrices of the parameters that are named."""
        chosen: set[str] = set()
        for wish in target_parameters:
            found = {stack for stack in self.stacks if stack == wish or stack.endswith("." + wish)}
            known = {name.rpartition(".")[0] for name in self.experts}
            if not found or not found <= known:
                kind = "is fused in a way that is not known here" if found else "is no parameter that holds experts"
                raise ValueError(
                    f"target_parameters names {wish!r}, which {kind}. This {type(self.model).__name__} has, in a known "
                    f"way (gate_up_proj or up_proj, and down_proj): {_starred(sorted(known)) or 'none'}. Leave it out."
                )
            chosen |= found
        return {name: target for name, target in self.experts.items() if name.rpartition(".")[0] in chosen}

    def _wished(self, target_modules: str | Sequence[str], experts: Iterable[str]) -> dict[str, Target]:
        """Return the layers that ``target_modules`` selects, beside the ``experts`` that are chosen already."""
        model, linears, heads = self.model, self.linears, self.heads
        chosen = {name.rpartition(".")[0] for name in experts}
        stacks = {name: size for name, size in self.stacks.items() if name not in chosen}
        if not set(linears) - heads:
            raise ValueError(
                f"{type(model).__name__} has no linear layer to adapt (found {len(linears)}, output heads aside). "
                "Expected a model built of torch.nn.Linear or GPT-2's Conv1D: layers of other kinds (experts fused "
                "into one parameter, layers replaced by another library) cannot be adapted."
            )
        if target_modules == ALL_LINEAR:
            _warn_of_stacks(model, stacks)
            lost = _lost_by_peft(model, [name for name in linears if name not in heads], "get no adapter")
            beside = self._beside_text()
            return {name: module for name, module in linears.items() if name not in heads | lost | beside}
        if isinstance(target_modules, str):
            try:
                pattern = re.compile(target_modules)
            except re.error as error:
                raise ValueError(
                    f"target_modules={target_modules!r} is not a regular expression ({error}). For name suffixes "
                    "pass a list."
                ) from None
            wishes: dict[str, Callable[[str], object]] = {target_modules: pattern.fullmatch}
        else:
            wishes = {
                wish: lambda name, wish=wish: name == wish or name.endswith("." + wish)  # type: ignore[misc]
                for wish in target_modules
            }
        matched = {wish: {name for name in linears if selects(name)} for wish, selects in wishes.items()}
        wished = {name: size for name, size in stacks.items() if any(selects(name) for selects in wishes.values())}
        missing = [wish for wish, found in matched.items() if not found]
        if missing:
            endings = sorted({name.rsplit(".", 1)[-1] for name in linears})
            fused = (
                f" ({_starred(wished)}: matrices fused into one parameter, which target_parameters names)"
                if wished
                else ""
            )
            raise ValueError(
                f"target_modules names {missing}, which match no linear layer of {type(model).__name__}{fused}. Its "
                f"linear layers end in {endings}; use a list of these, a regular expression over whole names, or "
                '"all-linear".'
            )
        _warn_of_stacks(model, wished)
        names = set().union(*matched.values())
        _lost_by_peft(model, names, "get one because target_modules names them")
        return {name: module for name, module in linears.items() if name in names}


def survey(model: nn.Module) -> Survey:
    """Walk over the modules of ``model`` once, and note what is asked of its layers later."""
    head_modules = _head_modules(model)
    linears: dict[str, nn.Linear] = {}
    heads: set[str] = {"lm_head"}
    stacks: dict[str, int] = {}
    factors: tuple[str, ...] = ()
    holders: Counter[int] = Counter()
    everything: list[nn.Parameter] = []
    for name, module in model.named_modules():
        parameters = {key: parameter for key, parameter in module._parameters.items() if parameter is not None}
        holders.update(map(id, parameters.values()))
        everything.extend(parameters.values())
        if hasattr(module, "base_layer"):
            factors += (f"{name}.lora_",)
        if is_linear(module) and not name.startswith(factors):
            linears[name] = cast(nn.Linear, module)
        if id(module) in head_modules:
            heads.add(name)
        if not isinstance(module, nn.modules.conv._ConvNd):
            for key, parameter in parameters.items():
                if parameter.dim() > 2 and min(parameter.shape) > 1:
                    stacks[f"{name}.{key}".lstrip(".")] = parameter.numel()
    stated = getattr(getattr(model, "config", None), "lora_null", None)
    shifts = isinstance(stated, dict) and stated.get("config", {}).get("train") == "ab"
    if shifts and not any(hasattr(module, "lora_A") for module in model.modules()):
        message = (
            f"The configuration of this {type(model).__name__} says that it was saved with adapters of lora_null and "
            "train='ab'. Here they are missing, and its base weights may be shifted. Load the pre-trained model, and "
            "turn the checkpoint into an adapter with lora-null export."
        )
        warn_once(message, message)
    # Tied embeddings, above all.
    shared = _overlapping(everything) | {key for key, count in holders.items() if count > 1}
    tied = {name for name, linear in linears.items() if id(linear._parameters.get("weight")) in shared}
    targets = {name: Target(name, linear, name in tied) for name, linear in linears.items()}
    return Survey(model, targets, heads, stacks)


def _overlapping(parameters: Iterable[nn.Parameter]) -> set[int]:
    """Return the ids of parameters of their own that lie in the same memory."""
    spans = set()
    for parameter in parameters:
        if type(parameter) is nn.Parameter and type(parameter.data) is Tensor and parameter.layout is torch.strided:
            extent = sum((size - 1) * stride for size, stride in zip(parameter.shape, parameter.stride(), strict=True))
            if parameter.numel() and not parameter.is_meta:
                start = parameter.data_ptr()
                end = start + (extent + 1) * parameter.element_size()
                spans.add((str(parameter.device), start, end, id(parameter)))
    shared: set[int] = set()
    device, reach, holder = "", 0, 0
    for place, start, end, key in sorted(spans):
        if place == device and start < reach:
            shared |= {holder, key}
        if place != device or end > reach:
            device, reach, holder = place, end, key
    return shared


def target_linears(model: nn.Module, config: LoraNullConfig | None = None) -> dict[str, nn.Linear]:
    """Return the layers of :meth:`Survey.select` as modules."""
    return {name: target.linear for name, target in survey(model).select(config).items()}


def output_head_names(model: nn.Module) -> set[str]:
    """Return the module names of the output head, which stays without an adapter: ``lm_head`` in LLaMA."""
    return survey(model).heads


def _listed(value: Any) -> Any:
    # PEFT knows lists and sets where we keep tuples.
    return list(value) if isinstance(value, tuple) else value


def _allowed(targets: Mapping[str, Target], wishes: Any, option: Mapping[str, Any]) -> dict[str, Target]:
    """Return the layers that PEFT would still select with ``option`` in its configuration."""
    from peft import LoraConfig
    from peft.tuners.tuners_utils import check_target_module_exists

    # Chosen already where the wish is a text: any will do, and PEFT takes no numbers beside one.
    config = LoraConfig(target_modules=".*" if isinstance(wishes, str) else list(wishes), **option)
    return {name: target for name, target in targets.items() if check_target_module_exists(config, name)}


def _head_modules(model: nn.Module) -> set[int]:
    """Return the ids of the modules in the output head.

    In a transformers model without one it is the head of a classifier, under the names that PEFT knows.
    """
    getter: Any = getattr(model, "get_output_embeddings", None)
    heads = [getter()] if getter is not None else []
    if heads == [None]:
        heads = [getattr(model, name, None) for name in CLASSIFIERS]
    return {id(module) for head in heads if isinstance(head, nn.Module) for module in head.modules()}


def _lost_by_peft(model: nn.Module, names: Iterable[str], fate: str) -> set[str]:
    """Return, and name in a warning, the layers on which PEFT cannot load the adapter that it finds in a file.

    CUDA kernels of Mamba models read the weight of ``out_proj`` past the layer, so that PEFT refuses it. Where
    transformers 5 has fused a model's experts, PEFT takes ``gate_proj``, ``up_proj`` and ``down_proj`` of its other
    layers for experts in checkpoints of older versions, and drops them.
    """
    if not hasattr(getattr(model, "config", None), "model_type"):
        return set()
    from peft import LoraConfig
    from peft.tuners import tuners_utils

    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers as convert
    except ImportError:
        return set()
    lost = set()
    for ending in {name.rsplit(".", 1)[-1] for name in names}:
        config = LoraConfig(target_modules=[ending])
        try:
            convert(config, model, None)
            getattr(tuners_utils, "_check_lora_target_modules_mamba", lambda *_: None)(config, model, ending)
        except ValueError:
            lost.add(ending)
        else:
            lost |= {ending} - set(config.target_modules or ())
    found = {name for name in names if name.rsplit(".", 1)[-1] in lost}
    if found:
        message = (
            f"PEFT cannot load adapters on these layers of {type(model).__name__}: {_starred(sorted(found))}. They "
            f"{fate}."
        )
        warn_once(message, message)
    return found


def _starred(names: Iterable[str]) -> str:
    """Name parameters with a star for their numbers: the layers of a model differ by these only."""
    return ", ".join(dict.fromkeys(re.sub(r"\b\d+\b", "*", name) for name in names))


def _warn_of_stacks(model: nn.Module, sizes: Mapping[str, int]) -> None:
    if not sizes:
        return
    share = sum(sizes.values()) / sum(parameter.numel() for parameter in model.parameters())
    message = (
        f"{type(model).__name__} keeps matrices, such as the experts of a layer, fused into one parameter each: "
        f"{_starred(sizes)} ({len(sizes)} parameters, {share:.0%} of all weights). They are no torch.nn.Linear and get "
        "no covariance and no adapter; only the linear layers do. If the experts must learn, name them in "
        "target_parameters, here and in PEFT's LoraConfig, and use lora_null.peft.initialize_lora_null_weights."
    )
    warn_once(message, message)

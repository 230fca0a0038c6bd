"""Save a patched model's adapters. On disk they are plain PEFT LoRA adapters on the untouched base model."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import LoraNullConfig
from ..models.arguments import PATH, takes
from ..models.layout import is_transposed
from ..models.weights import is_distributed
from ..models.wrappers import plain_name, unwrapped
from ..system.distributed import in_first_process
from ..system.log import logger
from .extras import Extras, extras_of
from .files import Adapter
from .layer import LoraNullLinear, LowRankFactor, require_layers
from .names import published_name, short_names
from .state import AdapterState, get_state


@takes(model=nn.Module, path=PATH)
def save_adapter(
    model: nn.Module,
    path: str | os.PathLike,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
    base_model_name_or_path: str | None = None,
) -> None:
    """Write the adapters of ``model`` as a PEFT adapter folder that needs nothing of this package to be used.

    The rank is uniform and the scaling is folded into ``lora_B``, so that ``lora_alpha == r`` and every reader
    (PEFT, vLLM, SGLang) applies the factor 1. With A frozen the rank on disk is ``r``. With A trained it is
    ``2 r``, relative to the untouched base. A second file, ``lora_null.json``, lets
    :func:`load_adapter` go on training; other readers ignore it.

    With several processes, one of them has to call this. Where the factors are sharded (FSDP2, tensor parallel,
    ZeRO-3) all have to: they are gathered, the first process writes, and the others wait for it.

    Args:
        model: A model patched by :func:`lora_null.initialize` or :func:`lora_null.load_adapter`, also inside DDP,
            torch.compile or another module, or sharded by ``fully_shard`` or DeepSpeed.
        path: The folder to make; it may exist and be empty. The adapter appears in it whole or not at all.
        dtype: Of the tensors on disk; the default keeps fp32.
        overwrite: Replace an existing adapter folder; its ``README.md`` is kept. A folder with other files in it is
            always refused.
        base_model_name_or_path: Written for the reader's information; the default is the model's own name,
            without the leading folders of an absolute path.

    Raises:
        ValueError: The model carries no adapter, or one that holds NaN or Inf, in memory or in ``dtype``.
        FileExistsError: ``path`` exists and must not be replaced.
    """
    whole, model = model, unwrapped(model)
    own = {id(parameter) for parameter in model.parameters()}
    outside = [name for name, p in whole.named_parameters() if p.requires_grad and id(p) not in own]
    if outside:
        logger.warning(
            "%d parameters outside the adapted model train, for instance %s; its adapter does not hold them. Save them "
            "apart.",
            len(outside),
            outside[0],
        )
    adapter = of_model(model, base_model_name_or_path)
    save_from(model, adapter, path, dtype=dtype, overwrite=overwrite)


def of_model(model: nn.Module, base_model_name_or_path: str | None = None) -> Adapter:
    """Return the adapter that a patched model, unwrapped, carries, for the untouched base; sharded factors gathered."""
    layers = require_layers(model)
    if not all(layer.adapter_enabled for layer in layers.values()):
        raise ValueError(
            "The adapters are disabled, and modules_to_save hold the values that they had before training; expected "
            "them enabled. Save outside of disable_adapters()."
        )
    factors = {plain_name(name): layer.low_rank_delta() for name, layer in layers.items()}
    first = next(iter(layers.values()))
    state = get_state(model) or AdapterState(LoraNullConfig(r=first.r, lora_alpha=first.scaling * first.r))
    extras = extras_of(model, state.before, state.config.modules_to_save or ())
    config = replace(_as_found(state, layers, factors), modules_to_save=extras.modules_to_save)
    state = replace(state, config=config, stacked=state.stacked or first.shifted)
    return described(model, factors, state, extras, base_model_name_or_path)


def described(
    model: nn.Module,
    factors: Mapping[str, tuple[Tensor, Tensor]],
    state: AdapterState,
    extras: Extras,
    base_model_name_or_path: str | None = None,
) -> Adapter:
    """Return the adapter of these factors on ``model``: layers and model by the names that readers know."""
    # Readers match endings against all modules: a convolution of the same ending must not get an adapter there.
    modules = {plain_name(name): module for name, module in model.named_modules()}
    if all(is_transposed(modules[name]) for name in factors):
        # PEFT finds out by itself, with a warning for every layer.
        extras = replace(extras, settings={**extras.settings, "fan_in_fan_out": True})
    own_name = getattr(getattr(model, "config", None), "_name_or_path", None) or None
    return Adapter(
        factors,
        short_names(modules, factors),
        base_model_name_or_path or published_name(own_name),
        _task_type(model),
        state,
        extras=extras,
    )


def _as_found(
    state: AdapterState, layers: Mapping[str, LoraNullLinear], factors: Mapping[str, tuple[Tensor, Tensor]]
) -> LoraNullConfig:
    """Return the configuration with what was changed on the layers by hand: ranks, scaling, dropout, a free A."""
    config = state.config
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in zip(factors, layers.values(), strict=True):
        # Stacked factors that were loaded as they are have twice the rank of the run; sharded ones show theirs when
        # they are gathered.
        r = config.rank_of(name) if state.stacked else len(factors[name][0]) // (2 if layer.shifted else 1)
        if r != config.rank_of(name):
            ranks[re.escape(name)] = r
        if ranks.get(re.escape(name)) or layer.scaling != config.scaling_of(name):
            alphas[re.escape(name)] = layer.scaling * (r**0.5 if config.use_rslora else r)
    dropouts = {layer.lora_dropout for layer in layers.values()}
    if len(dropouts) > 1:
        raise ValueError(
            f"The adapters have different lora_dropout, {sorted(dropouts)}; expected one for all, which an adapter's "
            "file can hold. Set layer.lora_dropout alike."
        )
    trained_A = any(
        layer.lora_A.weight.requires_grad for layer in layers.values() if isinstance(layer.lora_A, LowRankFactor)
    )
    return replace(
        config,
        lora_dropout=dropouts.pop(),
        train="ab" if config.train == "b" and trained_A else config.train,
        freeze_a=None,
        rank_pattern={**ranks, **(config.rank_pattern or {})},
        alpha_pattern={**alphas, **(config.alpha_pattern or {})},
    )


def save_from(
    model: nn.Module, adapter: Adapter, path: str | os.PathLike, *, dtype: torch.dtype | None, overwrite: bool
) -> None:
    """Write the adapter of ``model``; where processes hold it together, the first of them does, and all wait."""
    write = partial(adapter.write, Path(path), dtype=dtype, overwrite=overwrite)
    if is_distributed(model):
        in_first_process(write)
    else:
        write()


def _task_type(model: nn.Module) -> str | None:
    """Return PEFT's name for the kind of model; without one, PEFT takes any and adds nothing to it."""
    decoder = hasattr(model, "prepare_inputs_for_generation") and not getattr(model.config, "is_encoder_decoder", False)
    return "CAUSAL_LM" if decoder else None

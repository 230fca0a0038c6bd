"""Rank, scaling and dropout of an adapter in PEFT's layers, as a LoraNullConfig says them and the other way round."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import LoraNullConfig
from .layers import holds_linear, lora_modules, scaled_layers


def with_recipe(config: LoraNullConfig, peft_config: Any) -> LoraNullConfig:
    """Return ``config`` with ranks, scaling and dropout of PEFT's; ValueError for values that are none."""
    return replace(
        config,
        r=peft_config.r,
        lora_alpha=peft_config.lora_alpha,
        rank_pattern=peft_config.rank_pattern or None,
        alpha_pattern=peft_config.alpha_pattern or None,
        use_rslora=peft_config.use_rslora,
        lora_dropout=float(peft_config.lora_dropout),
    )


def recipe_of(peft_model: Any, adapter_name: str, config: LoraNullConfig) -> LoraNullConfig:
    """Return ``config`` with what the adapter's layers have now: what was changed on them by hand included."""
    config = with_recipe(config, peft_model.peft_config[adapter_name])
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for name, layer in scaled_layers(peft_model, adapter_name).items():
        key, r, scaling = "^" + re.escape(name), _rank_of(layer, adapter_name), float(layer.scaling[adapter_name])
        if r != config.rank_of(name):
            ranks[key] = r
        if key in ranks or scaling != config.scaling_of(name):
            alphas[key] = scaling * (r**0.5 if config.use_rslora else r)
    # Whole names come first, as the first that fits is taken.
    return replace(
        config,
        rank_pattern={**ranks, **(config.rank_pattern or {})},
        alpha_pattern={**alphas, **(config.alpha_pattern or {})},
    )


def _rank_of(layer: Any, adapter_name: str) -> int:
    """Return the rank of the factors, which PEFT's hot-swapping changes and layer and configuration do not say."""
    if holds_linear(layer, adapter_name) and layer.lora_A[adapter_name].weight.dim() == 2:
        return len(layer.lora_A[adapter_name].weight)
    return layer.r[adapter_name]


def restore(peft_model: Any, adapter_name: str, config: LoraNullConfig) -> None:
    """Give an adapter that was loaded the scaling and dropout of its run; what it computes stays the same.

    In a file that :func:`save_adapter` has written the scaling is part of ``lora_B``, where a step would mean another.
    """
    peft_config, alphas = peft_model.peft_config[adapter_name], {}
    for name, layer in scaled_layers(peft_model, adapter_name).items():
        found, scaling = float(layer.scaling[adapter_name]), config.scaling_of(name)
        if found != scaling:
            scale_B(layer, adapter_name, found / scaling)
            layer.scaling[adapter_name] = scaling
            r = layer.r[adapter_name]
            layer.lora_alpha[adapter_name] = scaling * (r**0.5 if peft_config.use_rslora else r)
            alphas["^" + re.escape(name)] = layer.lora_alpha[adapter_name]
    if alphas:
        # The layers that are not named keep what the file says of them.
        peft_config.alpha_pattern = {**alphas, **(peft_config.alpha_pattern or {})}
    peft_config.lora_dropout = config.lora_dropout
    for _, layer in lora_modules(peft_model):
        if adapter_name in layer.lora_dropout:
            dropout = nn.Dropout(config.lora_dropout) if config.lora_dropout else nn.Identity()
            layer.lora_dropout[adapter_name] = dropout.train(layer.training)


@torch.no_grad()
def scale_B(layer: Any, adapter_name: str, factor: float) -> None:
    """Multiply ``lora_B`` of one layer, its bias too."""
    if factor == 1:
        return
    lora_B = layer.lora_B[adapter_name]
    for parameter in lora_B.parameters():
        parameter.mul_(factor)

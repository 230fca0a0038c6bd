"""LoRA-Null for models that PEFT has prepared: initialisation, saving and the fused forward.

The usual order is ``get_peft_model``, :func:`initialize_lora_null_weights`, :func:`use_fused_kernels`, any trainer,
:func:`save_adapter`. Everything stays an ordinary ``PeftModel`` with ordinary ``lora.Linear`` layers.
"""

from __future__ import annotations

import os
from collections.abc import Set
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.tuners import lora
from torch import Tensor, nn
from tqdm.auto import tqdm

from ._adapter_files import OWN_CONFIG, read_json
from ._logging import warn_once
from ._peft_fused import FusedKernels, FusedLoraLinear, use_fused_kernels
from ._peft_saving import INITIAL, record_adapter
from ._quantised import allow_gradients
from ._weights import (
    fingerprint,
    is_distributed,
    plain_name,
    refuse_sharded,
    require_writable,
    shared_weights,
    unwrapped,
)
from .adapter import published_name, short_names, write_adapter
from .config import LoraNullConfig
from .covariances import Covariances
from .distributed import announcing_failure, in_first_process
from .initialization import AdapterState, check_rank, check_width, factors_of, get_state, set_state, shift_base, solve
from .layers import stack_delta
from .solver import NullSpace

__all__ = [
    "FusedKernels",
    "FusedLoraLinear",
    "freeze_lora_A",
    "initialize_lora_null_weights",
    "load_trainable",
    "lora_layers",
    "save_adapter",
    "use_fused_kernels",
]


def initialize_lora_null_weights(
    peft_model: PeftModel,
    covariances: Covariances,
    *,
    freeze_a: bool = True,
    adapter_name: str = "default",
    method: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> PeftModel:
    """Overwrite the LoRA weights of ``peft_model`` with a LoRA-Null start.

    With ``freeze_a`` the base is untouched, ``lora_A`` is the null-space factor and stays frozen through
    ``set_adapter`` and ``disable_adapter``, and ``lora_B`` is zero: an exact no-op, on a quantised base too.
    Otherwise the base weights are shifted in place: ``disable_adapter`` and further adapters then see the shifted
    base. What is saved fits the untouched base in both modes, by :func:`save_adapter` as by PEFT's
    ``save_pretrained`` and so in a trainer's checkpoints, which resume on a model that was initialised alike.

    Args:
        peft_model: From ``get_peft_model`` with a ``LoraConfig``; ranks may differ between layers.
        covariances: From :func:`lora_null.calibrate` on the base model.
        freeze_a: Train ``lora_B`` only.
        adapter_name: Which adapter to overwrite.
        method: Passed to :func:`lora_null.null_space`.
        seed: Seed of the solver.
        progress: Show a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no plain LoRA layer of that name, or the covariances do not fit it. Nothing is
            changed then.
    """
    layers = lora_layers(peft_model, adapter_name)
    sources = {name: _covariance_name(name, covariances) for name in layers}
    ranks: dict[str, int] = {}
    shared = shared_weights(peft_model)
    with announcing_failure():
        refuse_sharded({name: layer.get_base_layer() for name, layer in layers.items()}, "initialize_lora_null_weights")
        for name, layer in layers.items():
            _check_layer(name, layer, adapter_name, covariances.size(sources[name]), freeze_a, shared)
    for name, layer in layers.items():
        key = covariances.group_of(sources[name])
        ranks[key] = max(ranks.get(key, 0), layer.r[adapter_name])
    spaces: dict[str, NullSpace] = {}
    energies: dict[str, float] = {}
    for r in sorted(set(ranks.values())):
        keys = [key for key, rank in ranks.items() if rank == r]
        solved = solve(covariances, keys, r, method=method, seed=seed, progress=progress)
        spaces.update(solved[0])
        energies.update(solved[1])
    base = fingerprint({name: layer.get_base_layer() for name, layer in layers.items()})
    start = {}
    for name, layer in tqdm(layers.items(), "factorise", unit="layer", disable=not progress):
        # Eigenvalues ascend, so a smaller rank takes the leading columns.
        basis = spaces[covariances.group_of(sources[name])].basis[:, : layer.r[adapter_name]]
        start[name] = factors_of(name, layer.get_base_layer(), basis)
    # The model changes from here on, and nothing below can fail on the user's input.
    for name, layer in layers.items():
        _initialize_layer(layer, *start.pop(name), adapter_name, freeze_a)
    if not freeze_a:
        warn_once(
            "shifted-peft-base",
            "The base weights were shifted by the initial adapters: disable_adapter() and other adapters on this model "
            "now see the shifted base. save_pretrained and lora_null.peft.save_adapter write this adapter for the "
            "untouched base.",
        )
    peft_config = _lora_config(peft_model, adapter_name)
    config = LoraNullConfig(r=peft_config.r, lora_alpha=peft_config.lora_alpha, freeze_a=freeze_a, seed=seed)
    _remember(peft_model, adapter_name, AdapterState(config, base, energies))
    return peft_model


def freeze_lora_A(peft_model: PeftModel, adapter_name: str = "default") -> int:
    """Freeze ``lora_A`` so that PEFT's own switches keep it frozen; return the number of layers.

    Needed after ``PeftModel.from_pretrained(..., is_trainable=True)``, which does not know that A was frozen.
    """
    layers = lora_layers(peft_model, adapter_name)
    for layer in layers.values():
        _freeze(layer, adapter_name)
    return len(layers)


def load_trainable(base_model: nn.Module, path: str | os.PathLike, adapter_name: str = "default") -> PeftModel:
    """``PeftModel.from_pretrained(..., is_trainable=True)`` that keeps A frozen where it was trained frozen."""
    peft_model = PeftModel.from_pretrained(base_model, str(path), adapter_name=adapter_name, is_trainable=True)
    if (Path(path) / OWN_CONFIG).exists():
        own = read_json(Path(path) / OWN_CONFIG)
        config = LoraNullConfig.from_dict(own["config"])
        if config.freeze_a:
            freeze_lora_A(peft_model, adapter_name)
        # On disk the adapter is relative to the untouched base, whatever it was trained on.
        config = replace(config, r=_lora_config(peft_model, adapter_name).r)
        state = AdapterState(config, own.get("base_fingerprint"), own.get("energies", {}))
        _remember(peft_model, adapter_name, state)
    return peft_model


def save_adapter(
    peft_model: PeftModel,
    path: str | os.PathLike,
    *,
    adapter_name: str = "default",
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write the adapter as plain LoRA on the untouched base; see :func:`lora_null.save_adapter`.

    With a frozen A this is what ``save_pretrained`` writes, with uniform rank and the scaling folded in. With a
    trained A it is the rank-``2 r`` form, which does not cancel in low precision as PEFT's conversion does.
    """
    peft_model = unwrapped(peft_model)
    layers = lora_layers(peft_model, adapter_name)
    factors = {
        plain_name(name): stack_delta(
            layer.lora_A[adapter_name].weight,
            layer.lora_B[adapter_name].weight,
            layer.scaling[adapter_name],
            getattr(layer, INITIAL, {}).get(adapter_name),
        )
        for name, layer in layers.items()
    }
    peft_config = _lora_config(peft_model, adapter_name)
    if peft_config.modules_to_save or peft_config.bias != "none":
        raise ValueError(
            f"The adapter also trained modules_to_save={peft_config.modules_to_save!r}, bias={peft_config.bias!r}, "
            "which a plain LoRA adapter cannot hold. With A frozen, use the model's own save_pretrained; otherwise "
            "train without them."
        )
    state = get_state(peft_model) or AdapterState(
        LoraNullConfig(r=peft_config.r, lora_alpha=peft_config.lora_alpha, freeze_a=False)
    )
    base = peft_config.base_model_name_or_path
    write = partial(
        write_adapter,
        Path(path),
        factors,
        target_modules=short_names(_base_names(peft_model), factors),
        base_model_name_or_path=published_name(base),
        task_type=peft_config.task_type,
        own=state.to_dict(stacked=any(INITIAL in layer.__dict__ for layer in layers.values())),
        dtype=dtype,
        overwrite=overwrite,
    )
    in_first_process(write) if is_distributed(peft_model) else write()


def lora_layers(peft_model: nn.Module, adapter_name: str = "default") -> dict[str, Any]:
    """Return the layers that hold the adapter, by their name in the base model."""
    model = peft_model.get_base_model() if isinstance(peft_model, PeftModel) else peft_model
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, lora.LoraLayer) and adapter_name in module.lora_A
    }
    if not layers:
        raise ValueError(
            f"{type(peft_model).__name__} has no LoRA layer with an adapter named {adapter_name!r}. Expected a model "
            "from peft.get_peft_model(model, LoraConfig(...)); for a plain model use lora_null.initialize."
        )
    return layers


def _remember(peft_model: PeftModel, adapter_name: str, state: AdapterState) -> None:
    set_state(peft_model, state)
    record_adapter(peft_model, adapter_name, state, lora_layers(peft_model, adapter_name))


def _lora_config(peft_model: PeftModel, adapter_name: str) -> Any:
    return peft_model.peft_config[adapter_name]


def _base_names(peft_model: PeftModel) -> set[str]:
    """Return the names that modules have in the base model without its adapters."""
    names = {plain_name(name) for name, _ in peft_model.get_base_model().named_modules()}
    return {name for name in names if not any(part in name.split(".") for part in ("lora_A", "lora_B", "base_layer"))}


def _covariance_name(name: str, covariances: Covariances) -> str:
    for candidate in (name, f"{name}.base_layer", f"base_model.model.{name}.base_layer", f"base_model.model.{name}"):
        if candidate in covariances:
            return candidate
    raise ValueError(
        f"The covariances hold no entry for {name}, which has an adapter. They were collected for another model or "
        "for fewer target_modules; run lora_null.calibrate on the base model."
    )


def _check_layer(name: str, layer: Any, adapter_name: str, size: int, freeze_a: bool, shared: Set[int]) -> None:
    base = layer.get_base_layer()
    if not isinstance(base, nn.Linear) or not hasattr(layer.lora_A[adapter_name], "weight"):
        raise ValueError(
            f"{name} is {type(layer).__name__} on {type(base).__name__}; expected LoRA on a linear layer. Leave it out "
            "of the LoraConfig's target_modules."
        )
    if layer.merged or getattr(layer, INITIAL, {}):
        state = "has its adapter merged" if layer.merged else "was initialised with freeze_a=False before"
        raise ValueError(
            f"{name} {state}, so that its base weight is not the pre-trained one. Unmerge it (unmerge_adapter()), or "
            "start from a freshly loaded model."
        )
    if adapter_name in getattr(layer, "lora_variant", {}):
        raise ValueError(f"{name} uses {type(layer.lora_variant[adapter_name]).__name__}; expected plain LoRA.")
    check_width(name, base, size)
    check_rank(name, base, layer.r[adapter_name])
    if not freeze_a:
        require_writable(name, base, "freeze_a=False", shared)


@torch.no_grad()
def _initialize_layer(layer: Any, initial_A: Tensor, initial_B: Tensor, adapter_name: str, freeze_a: bool) -> None:
    base = layer.get_base_layer()
    allow_gradients([base])
    layer.lora_A[adapter_name].weight.copy_(initial_A)
    if freeze_a:
        layer.lora_B[adapter_name].weight.zero_()
        _freeze(layer, adapter_name)
        return
    layer.lora_B[adapter_name].weight.copy_(initial_B)
    # The values as stored: a bf16 adapter rounds, and the shift must undo exactly what it adds.
    stored_A, stored_B = (part[adapter_name].weight.detach().clone() for part in (layer.lora_A, layer.lora_B))
    shift_base(base, stored_A, stored_B, -layer.scaling[adapter_name])
    setattr(layer, INITIAL, {**getattr(layer, INITIAL, {}), adapter_name: (stored_A, stored_B)})


def _freeze(layer: Any, adapter_name: str) -> None:
    # set_adapter() and the end of disable_adapter() undo requires_grad_(False) alone; names listed here stay frozen.
    frozen = dict(layer.frozen_peft_weight_names)
    frozen[adapter_name] = tuple(dict.fromkeys((*frozen.get(adapter_name, ()), "lora_A")))
    layer.frozen_peft_weight_names = frozen
    layer.lora_A[adapter_name].weight.requires_grad_(False)

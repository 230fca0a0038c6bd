"""Overwrite the weights of PEFT's LoRA layers with a LoRA-Null start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from ..adapters.basis import FreeDirections
from ..adapters.delta import require_shift
from ..adapters.layer import refuse_adapted
from ..adapters.plain import shifting_start
from ..adapters.start import start_factors
from ..adapters.state import AdapterState
from ..config import LoraNullConfig
from ..covariances.covariances import Covariances
from ..models.arguments import takes
from ..models.quantised import allow_gradients
from ..models.refusals import Target, require_finite
from ..models.targets import survey
from ..models.zero_points import with_group_size
from ..system.distributed import announcing_failure
from ..system.log import logger
from . import experts
from .basis import BasisLinear
from .layers import base_of, freeze, lora_layers, lora_modules
from .recipe import recipe_of
from .record import remember
from .shifted import shift, shift_of

Model = TypeVar("Model", bound=nn.Module)
# As calibrated on the plain model, on the one inside PEFT's, or on the whole.
ALIASES = ("{}", "{}.base_layer", "base_model.model.{}.base_layer", "base_model.model.{}")


@takes(peft_model=nn.Module, covariances=Covariances)
def initialize_lora_null_weights(
    peft_model: Model,
    covariances: Covariances,
    *,
    freeze_a: bool | None = None,
    train: str | None = None,
    energy: float | None = None,
    task: Covariances | None = None,
    basis_dtype: str = "float32",
    group_pooling: int | str | None = None,
    adapter_name: str = "default",
    method: str = "auto",
    seed: int = 0,
    verify_base: bool = True,
    progress: bool = True,
) -> Model:
    """Overwrite the LoRA weights of ``peft_model`` with a LoRA-Null start.

    With ``train="b_in_basis"``, the default, the base is untouched, ``lora_A`` is a layer whose ``weight`` is made of
    coefficients and learns within the free directions, and ``lora_B`` is zero: an exact no-op, on a quantised base too.
    So it is with ``"b"``, where ``lora_A`` is the null-space factor and stays frozen through ``set_adapter`` and
    ``disable_adapter``. With ``"ab"`` the base is shifted in place, for this adapter alone: without it, and with
    others, layers give what they would on the untouched base. What is saved fits the untouched base in all modes, by
    :func:`save_adapter` as by the model's own ``save_pretrained`` and so in a trainer's checkpoints, which resume on a
    model that was initialised alike.

    Experts that are fused into parameters, which the ``LoraConfig`` names in ``target_parameters``, begin likewise in
    the modes that leave the base untouched, where calibration was given the same ``target_parameters``. What the
    ``LoraConfig`` adds besides is left as PEFT starts it: ``lora_bias``, adapters on embeddings and on other
    parameters, ``trainable_token_indices``, ``modules_to_save``.

    Args:
        peft_model: From ``get_peft_model`` with a ``LoraConfig``, or a model of transformers after ``add_adapter``, or
            any after ``inject_adapter_in_model``; ranks and scaling may differ between layers.
        covariances: From :func:`lora_null.calibrate` on the base model.
        freeze_a: Short for ``train="b"``, and for ``"ab"``; see :class:`lora_null.LoraNullConfig`, as for the next.
        train: What learns.
        energy: Share of the energy to protect.
        task: As for :func:`lora_null.initialize`.
        basis_dtype: Of the free directions in memory.
        group_pooling: Number of inputs that are read as their mean.
        adapter_name: Which adapter to overwrite.
        method: Passed to :func:`lora_null.null_space`.
        seed: Seed of the solver.
        verify_base: Refuse covariances of other weights, as :func:`lora_null.initialize` does.
        progress: Show a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: The model has no plain LoRA layer of that name, its base weights are not the pre-trained ones, or
            the covariances do not fit it. Nothing is changed then.
    """
    options = LoraNullConfig(
        freeze_a=freeze_a,
        train=train,
        energy=energy,
        basis_dtype=basis_dtype,
        group_pooling=group_pooling,
        seed=seed,
    )
    layers = lora_layers(peft_model, adapter_name)
    linears, of_experts = linears_of(peft_model), experts.calibrated(peft_model, adapter_name, covariances)
    with announcing_failure():
        _check_base(peft_model, linears)
        for name, layer in layers.items():
            _check_layer(name, layer, linears.get(name), adapter_name)
        experts.check(of_experts, linears, adapter_name, options)
        config = recipe_of(peft_model, adapter_name, replace(options, target_parameters=tuple(of_experts)))
        config = with_group_size(config, {name: linears[name] for name in layers})
    ranks = {name: layer.r[adapter_name] for name, layer in layers.items()}
    ranks |= {name: of_experts[owner].r[adapter_name] for name, owner in experts.names_of(of_experts).items()}
    start = start_factors(
        linears,
        ranks,
        covariances,
        config,
        task=task,
        aliases=ALIASES,
        method=method,
        verify_base=verify_base,
        progress=progress,
    )
    with announcing_failure():
        for name, layer in layers.items():
            start.factors[name] = _as_stored(name, layer, *start.factors[name], adapter_name, config.train)
        stacked = {name: experts.take_start(name, layer, start, adapter_name) for name, layer in of_experts.items()}
    # The model changes from here on, and nothing below can fail on the user's input.
    for name, layer in layers.items():
        _put(layer, *start.factors.pop(name), adapter_name, config.train, start.directions.get(name))
    for name, layer in of_experts.items():
        free = experts.directions_of_experts(name, layer, start.directions)
        experts.put(layer, stacked.pop(name), adapter_name, free)
    if tied := [name for name in layers if linears[name].tied]:
        logger.warning(
            "%s shares its weight with another module. Saved adapters are right; merged by PEFT (merge_adapter, "
            "merge_and_unload), the update would change both. Leave it out through target_modules if you merge.",
            tied[0],
        )
    remember(peft_model, adapter_name, AdapterState(config, start.base_fingerprint, start.energies, free=start.free))
    return peft_model


def linears_of(peft_model: nn.Module) -> dict[str, Target]:
    """Return the linear layers, and experts, by their names in the base model without its adapters."""
    linears = survey(base_of(peft_model)).matrices
    plain = {name: ".".join(part for part in name.split(".") if part != "base_layer") for name in linears}
    return {plain[name]: replace(target, name=plain[name]) for name, target in linears.items()}


def _check_base(peft_model: Any, linears: Mapping[str, Target]) -> None:
    """Refuse a model whose base weights something has moved already."""
    refuse_adapted(linears)
    for adapter, config in peft_model.peft_config.items():
        if start := shifting_start(getattr(config, "init_lora_weights", None)):
            raise ValueError(
                f"The adapter {adapter!r} began with init_lora_weights={start!r}, by which PEFT has moved the base "
                "weights away from the pre-trained ones. Load the model again, and leave init_lora_weights out of the "
                "LoraConfig: the start is overwritten here anyway."
            )
    for name, layer in lora_modules(peft_model):
        if layer.merged or shift_of(layer) is not None:
            state = "has its adapter merged" if layer.merged else "was initialised with freeze_a=False before"
            raise ValueError(
                f"{name} {state}, so that its base weight is not the pre-trained one. Unmerge it "
                "(unmerge_adapter()), or start from a freshly loaded model."
            )


def _check_layer(name: str, layer: Any, target: Target | None, adapter_name: str) -> None:
    if target is None or not hasattr(layer.lora_A[adapter_name], "weight"):
        raise ValueError(
            f"{name} is {type(layer).__name__} on {type(layer.get_base_layer()).__name__}; expected LoRA on a linear "
            "layer. Leave it out of the LoraConfig's target_modules."
        )
    target.require_whole("initialize_lora_null_weights")
    target.require_plain("An adapter")
    rows = len(layer.lora_A[adapter_name].weight)
    if rows != layer.r[adapter_name]:
        raise ValueError(
            f"The adapter {adapter_name!r} of {name} has r={layer.r[adapter_name]}, but its factors have {rows} rows: "
            "expected as many. prepare_model_for_compiled_hotswap pads them; initialise before it."
        )
    if adapter_name in getattr(layer, "lora_variant", {}):
        raise ValueError(f"{name} uses {type(layer.lora_variant[adapter_name]).__name__}; expected plain LoRA.")


@torch.no_grad()
def _as_stored(
    name: str, layer: Any, initial_A: Tensor, initial_B: Tensor, adapter_name: str, train: str | None
) -> tuple[Tensor, Tensor]:
    """Return the factors as the layer holds them; ValueError where they, or the shift, exceed the range of a dtype."""
    parts = layer.lora_A[adapter_name].weight, layer.lora_B[adapter_name].weight
    # A bf16 adapter rounds, and the shift must undo exactly what the adapter adds.
    stored_A, stored_B = (new.to(own.device, own.dtype) for new, own in zip((initial_A, initial_B), parts, strict=True))
    advice = f" in {stored_A.dtype}, so nothing was changed. Keep the adapters in fp32 (autocast_adapter_dtype=True)."
    require_finite(f"The start of {name}", stored_A, stored_B, advice)
    if train == "ab":
        require_shift(name, layer.get_base_layer(), stored_A, stored_B, -float(layer.scaling[adapter_name]))
    return stored_A, stored_B


@torch.no_grad()
def _put(
    layer: Any, A: Tensor, B: Tensor, adapter_name: str, train: str | None, directions: FreeDirections | None
) -> None:
    allow_gradients([layer.get_base_layer()])
    if directions is not None:
        layer.lora_A[adapter_name] = BasisLinear(A, directions)
    elif isinstance(layer.lora_A[adapter_name], BasisLinear):
        layer.lora_A[adapter_name] = nn.Linear(A.shape[1], A.shape[0], bias=False, device=A.device, dtype=A.dtype)
    if directions is None:
        layer.lora_A[adapter_name].weight.copy_(A)
    if train != "ab":
        layer.lora_B[adapter_name].weight.zero_()
        if train == "b":
            freeze(layer, adapter_name)
        return
    layer.lora_B[adapter_name].weight.copy_(B)
    shift(layer, adapter_name, A, B)

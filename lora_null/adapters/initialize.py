"""Start LoRA-Null adapters in the null spaces of a model's activations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from ..config import ALL_LINEAR, LoraNullConfig
from ..covariances.covariances import Covariances
from ..models.arguments import takes
from ..models.quantised import warn_of_trainer
from ..models.refusals import Target, require_floating
from ..models.targets import CLASSIFIERS, Survey, survey
from ..models.wrappers import uncompiled
from ..models.zero_points import with_group_size
from ..system.distributed import announcing_failure
from ..system.log import logger
from .basis import BasisFactor
from .delta import require_shift
from .extras import inside, keys_of, require_modules, tensors_of
from .layer import LoraNullLinear, attach_adapter, refuse_adapted, require_adaptable
from .sharing import share_projections
from .start import Start, start_factors
from .state import AdapterState, set_state


@takes(model=nn.Module, covariances=Covariances, config=LoraNullConfig)
# Tensors made in inference mode could never be trained.
@torch.inference_mode(False)
def initialize(
    model: nn.Module,
    covariances: Covariances,
    config: LoraNullConfig | None = None,
    *,
    task: Covariances | None = None,
    method: str = "auto",
    adapter_dtype: torch.dtype = torch.float32,
    verify_base: bool = True,
    progress: bool = True,
) -> nn.Module:
    """Patch the linear modules of ``model`` in place with adapters in their null spaces.

    For each layer with weight ``W (m, d)`` and the basis ``U (d, r)`` of the ``r`` least used input directions,
    ``B0 A0`` is the thin factorisation of ``W U U^T``. With ``train="b"`` and ``"b_in_basis"`` the base is untouched,
    ``A`` starts at ``A0``, frozen or learning within the free directions, and ``B`` at zero: the model's outputs are
    bit-identical to the base model's. With ``"ab"`` both factors start at ``(A0, B0)`` on the base ``W - s B0 A0``, and
    outputs agree to rounding of the base's dtype.

    Everything but the adapters and ``config.modules_to_save`` stops requiring gradients. Nothing is changed when an
    error is raised.

    Under ``torch.distributed`` all processes have to call this, before the model is sharded; they divide the
    eigenproblems, and each attaches the same adapters.

    Args:
        model: The pre-trained model, with its weights on any device, offloaded or (frozen A) quantised;
            compiled or not.
        covariances: From :func:`lora_null.calibrate` on the same model.
        config: Rank, scaling, mode and layers; the default is ``LoraNullConfig()``. With ``"all-linear"``, layers that
            calibration never called get no adapter.
        task: From :func:`lora_null.calibrate` on the same model and the task's own text. ``U`` is then what the task
            uses most: among the directions beyond ``config.energy``, or, without one, weighed against their energy.
        method: Passed to :func:`lora_null.null_space`.
        adapter_dtype: Of the trained factors. fp32 factors on a bf16 base are PEFT's default and train best.
        verify_base: Refuse covariances of other weights than the model's. The sum of several texts' may be of several
            models, this one among them; see :meth:`lora_null.Covariances.__add__`.
        progress: Show a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: The covariances do not cover or do not fit the model or are of other weights, the rank is too
            large, or the model carries adapters already or is sharded already; ``config.energy`` leaves fewer
            directions free than a layer's rank, or none that the task uses.
    """
    require_floating(adapter_dtype, "adapter_dtype")
    wrapper, model, config = model, uncompiled(model), config or LoraNullConfig()
    if config.target_parameters:
        raise ValueError(
            f"target_parameters is {config.target_parameters!r}, but initialize puts adapters on linear layers; "
            "expected None here. Experts get theirs in PEFT's format: peft.get_peft_model with the same "
            "target_parameters, and lora_null.peft.initialize_lora_null_weights."
        )
    layers = survey(model)
    targets = _called(layers.select(config), covariances, config)
    with announcing_failure():
        config = with_group_size(config, targets)
        _check(layers, targets)
        trained = require_modules(model, config.modules_to_save or (), targets, "modules_to_save")
    start = start_factors(
        layers.matrices,
        {name: config.rank_of(name) for name in targets},
        covariances,
        config,
        task=task,
        method=method,
        dtype=adapter_dtype,
        verify_base=verify_base,
        progress=progress,
    )
    if config.train == "ab":
        for name, target in targets.items():
            require_shift(name, target.linear, *start.factors[name], -config.scaling_of(name))
    # The model changes from here on, and nothing below can fail on the user's input.
    model.requires_grad_(False)
    for name, target in targets.items():
        _attach(name, target.linear, start, config)
    share_projections(model)
    if config.train == "ab":
        logger.warning(
            "The base weights were shifted by the initial adapters (freeze_a=False): save_pretrained() would store the "
            "shifted base. Use lora_null.save_adapter, or lora_null.merge first."
        )
    for name, tensor in tensors_of(model).items():
        if isinstance(tensor, nn.Parameter) and inside(name, trained):
            tensor.requires_grad_(True)
    _say_frozen(layers, trained)
    warn_of_trainer(model)
    state = AdapterState(config, start.base_fingerprint, start.energies, free=start.free)
    originals = {name: tensor.detach().clone() for name, tensor in tensors_of(model).items() if inside(name, trained)}
    set_state(model, replace(state, before=keys_of(model), originals=originals))
    return wrapper


def _attach(name: str, linear: nn.Linear, start: Start, config: LoraNullConfig) -> LoraNullLinear:
    lora_A, lora_B = start.factors.pop(name)
    options: dict[str, Any] = {"scaling": config.scaling_of(name), "lora_dropout": config.lora_dropout}
    if config.train == "ab":
        return attach_adapter(linear, lora_A, lora_B, train_a=True, initial=(lora_A.clone(), lora_B.clone()), **options)
    free = start.directions.get(name)
    return attach_adapter(
        linear, lora_A if free is None else BasisFactor(lora_A, free), torch.zeros_like(lora_B), **options
    )


def _called(targets: dict[str, Target], covariances: Covariances, config: LoraNullConfig) -> dict[str, Target]:
    """Leave out the layers that got no token in calibration, unless they were wished for by name."""
    if config.target_modules != ALL_LINEAR:
        return targets
    idle = set(json.loads(covariances.metadata.get("without_tokens", "[]"))) & set(targets)
    if idle:
        logger.warning(
            "%d layers that calibration never called get no adapter: %s.", len(idle), ", ".join(sorted(idle))
        )
    return {name: target for name, target in targets.items() if name not in idle}


def _say_frozen(layers: Survey, trained: set[str]) -> None:
    """Name a classifier's head that nothing trains: a new one has random weights."""
    heads = {name.split(".")[0] for name in layers.heads & set(layers.linears) if not inside(name, trained)}
    for head in sorted(heads & set(CLASSIFIERS)):
        logger.warning(
            "The head %s stays frozen as it is. If it is new, its weights are random: pass modules_to_save=[%r] to "
            "train and save it with the adapters.",
            head,
            head,
        )


def _check(layers: Survey, targets: Mapping[str, Target]) -> None:
    refuse_adapted(layers.linears)
    if any(hasattr(module, "base_layer") for module in layers.model.modules()):
        raise ValueError(
            "The model carries PEFT adapters. Use lora_null.peft.initialize_lora_null_weights, or start from the model "
            "without PEFT."
        )
    for target in targets.values():
        target.require_whole("initialize")
    require_adaptable(targets)

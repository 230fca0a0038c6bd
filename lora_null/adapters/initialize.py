"""Start LoRA-Null adapters in the null spaces of a model's activations."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import ALL_LINEAR, LoraNullConfig
from ..covariances.covariances import Covariances
from ..models.identity import fingerprint
from ..models.refusals import check_rank, check_width, refuse_sharded, require_writable
from ..models.targets import target_linears
from ..models.weights import shared_weights
from ..models.wrappers import uncompiled
from ..solver.factorize import factors_of
from ..solver.null_space import NullSpace
from ..solver.null_spaces import null_spaces
from ..system.distributed import announcing_failure, divide, gather
from ..system.log import logger
from .delta import shift_base
from .layer import LoraNullLinear, adapter_layers, attach_adapter, require_adaptable
from .sharing import share_projections
from .state import AdapterState, set_state


# Tensors made in inference mode could never be trained.
@torch.inference_mode(False)
def initialize(
    model: nn.Module,
    covariances: Covariances,
    config: LoraNullConfig | None = None,
    *,
    method: str = "auto",
    adapter_dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> nn.Module:
    """Patch the linear modules of ``model`` in place with adapters in their null spaces.

    For each layer with weight ``W (m, d)`` and the basis ``U (d, r)`` of the ``r`` least used input directions,
    ``B0 A0`` is the thin factorisation of ``W U U^T``. With ``config.freeze_a`` the base is untouched, ``A = A0``
    is frozen and ``B`` starts at zero: the model's outputs are bit-identical to the base model's. Otherwise both
    factors start at ``(A0, B0)`` on the base ``W - s B0 A0``, and outputs agree to rounding of the base's dtype.

    Everything but the adapters stops requiring gradients. Nothing is changed when an error is raised.

    Under ``torch.distributed`` all processes have to call this, before the model is sharded; they divide the
    eigenproblems, and each attaches the same adapters.

    Args:
        model: The pre-trained model, with its weights on any device, offloaded or (frozen A) quantised;
            compiled or not.
        covariances: From :func:`lora_null.calibrate` on the same model.
        config: Rank, scaling, mode and layers; the default is ``LoraNullConfig()``. With ``"all-linear"``, layers that
            calibration never called get no adapter.
        method: Passed to :func:`lora_null.null_space`.
        adapter_dtype: Of the trained factors. fp32 factors on a bf16 base are PEFT's default and train best.
        progress: Show a progress bar.

    Returns:
        The same model.

    Raises:
        ValueError: The covariances do not cover or do not fit the model, the rank is too large, or the model
            carries adapters already or is sharded already.
    """
    wrapper, model, config = model, uncompiled(model), config or LoraNullConfig()
    linears = _called(target_linears(model, config.target_modules), covariances, config)
    with announcing_failure():
        _check(model, linears, covariances, config)
    keys = dict.fromkeys(covariances.group_of(name) for name in linears)
    spaces, energies = solve(covariances, keys, config.r, method=method, seed=config.seed, progress=progress)
    base_fingerprint = fingerprint(linears)
    start = {}
    for name, linear in tqdm(linears.items(), "factorise", unit="layer", disable=not progress):
        start[name] = factors_of(name, linear, spaces[covariances.group_of(name)].basis, dtype=adapter_dtype)

    # The model changes from here on, and nothing below can fail on the user's input.
    model.requires_grad_(False)
    for name, linear in linears.items():
        _attach(linear, *start.pop(name), config)
    share_projections(model)
    if not config.freeze_a:
        logger.warning(
            "The base weights were shifted by the initial adapters (freeze_a=False): save_pretrained() would store the "
            "shifted base. Use lora_null.save_adapter, or lora_null.merge first."
        )
    set_state(model, AdapterState(config, base_fingerprint, energies))
    return wrapper


def solve(
    covariances: Covariances,
    keys: Iterable[str],
    r: int,
    *,
    method: str = "auto",
    seed: int = 0,
    progress: bool = True,
) -> tuple[dict[str, NullSpace], dict[str, float]]:
    """Solve for the null spaces of sharing groups; processes of a ``torch.distributed`` group divide the work.

    Args:
        covariances: Of the model.
        keys: Of the groups, each once.
        r: Number of directions wanted.
        method: Passed to :func:`lora_null.null_space`.
        seed: Seed of the solver.
        progress: Show a progress bar.

    Returns:
        By group key, the null spaces and their shares of the energy ``tr(U^T C U) / tr(C)``.
    """
    keys = list(keys)
    traces: dict[str, float] = {}

    def matrices() -> Iterator[tuple[str, Tensor]]:
        for key in mine:
            C = covariances[key]
            traces[key] = float(C.diagonal().sum(dtype=torch.float64))
            yield key, C

    with announcing_failure():
        mine = divide({key: covariances.size(key) ** 3 for key in keys})
        found = dict(null_spaces(matrices(), r, method=method, seed=seed, progress=progress))
    # Rounding can leave a singular matrix with a sum a little below zero.
    solved = gather({key: (space, max(space.energy, 0.0) / traces[key]) for key, space in found.items()})
    return {key: solved[key][0] for key in keys}, {key: solved[key][1] for key in keys}


def _attach(linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, config: LoraNullConfig) -> LoraNullLinear:
    options: dict[str, Any] = {"scaling": config.scaling, "lora_dropout": config.lora_dropout}
    if config.freeze_a:
        return attach_adapter(linear, lora_A, torch.zeros_like(lora_B), **options)
    shift_base(linear, lora_A, lora_B, -config.scaling)
    return attach_adapter(linear, lora_A, lora_B, train_a=True, initial=(lora_A.clone(), lora_B.clone()), **options)


def _called(linears: dict[str, nn.Linear], covariances: Covariances, config: LoraNullConfig) -> dict[str, nn.Linear]:
    """Leave out the layers that got no token in calibration, unless they were wished for by name."""
    if config.target_modules != ALL_LINEAR:
        return linears
    idle = set(json.loads(covariances.metadata.get("without_tokens", "[]"))) & set(linears)
    if idle:
        logger.warning(
            "%d layers that calibration never called get no adapter: %s.", len(idle), ", ".join(sorted(idle))
        )
    return {name: linear for name, linear in linears.items() if name not in idle}


def warn_of_other_weights(linears: Mapping[str, nn.Linear], covariances: Covariances) -> None:
    """Log a warning if the covariances were collected on weights other than those of ``linears``, by name."""
    known = covariances.metadata.get("base_fingerprint")
    members = {name for names in covariances.groups.values() for name in names}
    if not known or not members <= set(linears):
        return
    found = fingerprint({name: linear for name, linear in linears.items() if name in members})
    if found and found != known:
        logger.warning(
            "The covariances were collected on other weights than these: the shapes agree, the values do not. The null "
            "spaces of another model protect nothing here; run lora_null.calibrate on this one."
        )


def _check(
    model: nn.Module, linears: Mapping[str, nn.Linear], covariances: Covariances, config: LoraNullConfig
) -> None:
    if adapted := adapter_layers(model):
        raise ValueError(
            f"The model carries {len(adapted)} lora_null adapters already, for instance on {next(iter(adapted))}. "
            "Merge them first (lora_null.merge), or start from a freshly loaded model."
        )
    if any(name.endswith(".base_layer") for name in linears):
        raise ValueError(
            "The model carries PEFT adapters. Use lora_null.peft.initialize_lora_null_weights, or start from the model "
            "without PEFT."
        )
    warn_of_other_weights({n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}, covariances)
    missing = [name for name in linears if name not in covariances]
    if missing:
        raise ValueError(
            f"The covariances hold no entry for {len(missing)} of {len(linears)} target layers, for instance "
            f"{missing[0]}; they were collected for another model or for fewer target_modules, or no token "
            "reached these layers. Run lora_null.calibrate on this model with the same config."
        )
    refuse_sharded(linears, "initialize")
    require_adaptable(linears)
    shared = shared_weights(model)
    for name, linear in linears.items():
        check_width(name, linear, covariances.size(name))
        check_rank(name, linear, config.r)
        if not config.freeze_a:
            require_writable(name, linear, "freeze_a=False", shared)

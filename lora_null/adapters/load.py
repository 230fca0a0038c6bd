"""Load an adapter folder into a model."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from ..config import LoraNullConfig
from ..covariances.covariances import Covariances
from ..models.arguments import PATH, takes
from ..models.identity import fingerprint, require_same
from ..models.quantised import warn_of_trainer
from ..models.refusals import Target, require_finite, require_floating
from ..models.targets import survey
from ..models.weights import home_of
from ..models.wrappers import uncompiled
from ..solver.pooling import CONVENTIONS, ordinary
from .basis import BasisFactor, FreeDirections, factor_within
from .delta import require_shift, unstack
from .extras import is_trained, keys_of, place_extras, tensors_of
from .files import Adapter
from .layer import attach_adapter, refuse_adapted, require_adaptable
from .sharing import share_projections
from .start import directions_of
from .state import OWN_CONFIG, AdapterState, set_state


@takes(base_model=nn.Module, path=PATH)
# Tensors made in inference mode could never be trained.
@torch.inference_mode(False)
def load_adapter(
    base_model: nn.Module,
    path: str | os.PathLike,
    *,
    is_trainable: bool = False,
    covariances: Covariances | None = None,
    adapter_dtype: torch.dtype = torch.float32,
    verify_base: bool = True,
    pooling: str | None = None,
) -> nn.Module:
    """Attach a saved LoRA adapter, ours or any plain one in PEFT's format, to the untouched base model in place.

    Args:
        base_model: The pre-trained model that the adapter was trained on.
        path: An adapter folder.
        is_trainable: Go on training, in the mode that the adapter was trained in: with A frozen again, or on
            the base shifted as before. The default freezes everything.
        covariances: Of the run; needed to go on training where A learns within the free directions (``b_in_basis``),
            which are solved for again.
        adapter_dtype: Of the factors in memory.
        verify_base: Compare the base weights with the fingerprint saved with the adapter, and that of ``covariances``.
        pooling: For a QA-LoRA adapter whose ``lora_A`` is ``(r, d / L)`` and whose configuration does not say so: what
            it reads of each group of ``L`` inputs, ``"mean"``, ``"sum"``, or ``"peft"`` for the mean times ``d / L``.

    Returns:
        The same model. Nothing is changed when an error is raised.

    Raises:
        FileNotFoundError: ``path`` is not an adapter folder.
        ValueError: A file is damaged or foreign, or the adapter belongs to another model, or not to the
            covariances.
    """
    require_floating(adapter_dtype, "adapter_dtype")
    wrapper, base_model, folder = base_model, uncompiled(base_model), Path(path)
    adapter = Adapter.read(folder)
    factors, state = _whole(base_model, adapter.factors, pooling), adapter.state
    targets = _matching(base_model, factors, folder)
    for target in targets.values():
        target.require_whole("load_adapter")
    require_adaptable(targets)
    base = fingerprint({name: target.linear for name, target in targets.items()})
    if verify_base:
        require_base(base_model, folder, state, base)
    config = state.config if state else adapter.recipe
    assert config is not None
    stacked = state is not None and state.stacked
    shifted = stacked and is_trainable
    ranks = {name: _rank(name, *factors[name], config, stacked) for name in targets}
    if shifted:
        for name, target in targets.items():
            target.require_writable("Training A on")
            if ranks[name] * 2 > len(factors[name][0]):
                raise ValueError(
                    f"{folder / OWN_CONFIG} says that the adapter has the rank-2r form, but that of {name} has the odd "
                    f"rank {len(factors[name][0])}. The two files do not belong together; save the adapter again."
                )
    extras = adapter.extras
    placed = place_extras(base_model, extras, targets, str(folder))
    trained = {name for name in placed if is_trainable and is_trained(name, extras, base_model)}
    directions: dict[str, FreeDirections] = {}
    if is_trainable and config.train == "b_in_basis":
        known = require_covariances(folder, covariances)
        directions = directions_of(survey(base_model).linears, ranks, known, config, verify_base=verify_base)
    made: dict[str, tuple[Tensor | BasisFactor, Tensor, tuple[Tensor, Tensor] | None]] = {}
    for name, target in targets.items():
        home, r, wide = home_of(target.linear), ranks[name], torch.promote_types(adapter_dtype, torch.float32)
        lora_A, lora_B = (factor.to(home, wide) for factor in factors[name])
        # In a folder of ours the scaling is part of B. In memory it is that of the run, so that a step of B means the
        # same.
        scaling = config.scaling_of(name)
        lora_B = lora_B * adapter.scaling_of(name)
        initial: tuple[Tensor, Tensor] | None = None
        if shifted:
            halves = lora_A.to(adapter_dtype), lora_B.to(adapter_dtype)
            lora_A, change_B, initial_A, initial_B = unstack(*halves, scaling, r)
            # A copy, which does not keep the memory of both halves.
            lora_A, lora_B, initial = lora_A.clone(), change_B + initial_B, (initial_A, initial_B)
        else:
            rows = len(lora_A) if stacked else r
            lora_A, lora_B = lora_A[:rows].clone(), lora_B[:, :rows] / scaling
        lora_A, lora_B = lora_A.to(adapter_dtype), lora_B.to(adapter_dtype)
        advice = f" in {adapter_dtype}, so it was not loaded; expected a dtype of wider range, such as float32."
        require_finite(f"{folder}: the adapter of {name}", lora_A, lora_B, advice)
        if initial is not None:
            require_finite(f"{folder}: the start of {name}", *initial, advice)
            require_shift(name, target.linear, *initial, -scaling)
        made[name] = factor_within(name, lora_A, directions[name]) if directions else lora_A, lora_B, initial
    # The model changes from here on, and nothing below can fail on the user's input.
    base_model.requires_grad_(False)
    for name, target in targets.items():
        factor, lora_B, initial = made.pop(name)
        layer = attach_adapter(
            target.linear,
            factor,
            lora_B,
            scaling=config.scaling_of(name),
            train_a=shifted or (is_trainable and config.train == "ab"),
            lora_dropout=config.lora_dropout,
            initial=initial,
        )
        layer.lora_B.requires_grad_(is_trainable)
    share_projections(base_model)
    if is_trainable:
        warn_of_trainer(base_model)
    before, tensors = keys_of(base_model), tensors_of(base_model)
    originals = {name: tensors[name].detach().clone() for name in placed}
    with torch.no_grad():
        for name, values in placed.items():
            tensors[name].copy_(values)
    for name in trained:
        if isinstance(tensors[name], nn.Parameter):
            tensors[name].requires_grad_(True)
    began = (state.energies, state.free) if state else ({}, {})
    state = AdapterState(
        config, base, began[0], stacked and not shifted, free=began[1], before=before, originals=originals
    )
    set_state(base_model, state)
    return wrapper


def require_base(model: nn.Module, folder: Path, state: AdapterState | None, found: str | None) -> None:
    """Refuse a model whose weights, by their fingerprint ``found``, are others than those the adapter began on."""
    require_same(
        state.base_fingerprint if state else None,
        found,
        f"{folder} was trained on other weights than those of this {type(model).__name__}",
        "Load the base model that the adapter was trained on, unmerged and without other adapters, or pass "
        "verify_base=False (--no-verify-base) if the difference is intended: one base rounded to bfloat16 here and to "
        "float16 there, say.",
    )


def require_covariances(source: Path | str, covariances: Covariances | None) -> Covariances:
    """Refuse to go on without the covariances that say which directions are free."""
    if covariances is None:
        raise ValueError(
            f"{source} was trained within the free directions of covariances (train='b_in_basis'), and without these "
            "it is not known which they are. Pass covariances=Covariances.load(...), those of the run, or load it with "
            "is_trainable=False."
        )
    return covariances


def _rank(name: str, lora_A: Tensor, lora_B: Tensor, config: LoraNullConfig, stacked: bool) -> int:
    """Return the rank of one layer's factors, which padding may have made larger on disk, and stacking twice as large.

    That is what the configuration says, where all rows beyond it are zero; else what the factors have.
    """
    r, parts = config.rank_of(name), 2 if stacked else 1
    beyond = lora_A[parts * r :], lora_B[:, parts * r :]
    fits = parts * r <= len(lora_A) and not any(bool(part.any()) for part in beyond)
    return r if fits else -(-len(lora_A) // parts)


def _pooled(lora_A: Tensor, target: Target) -> str:
    """Return what an ``A`` of fewer inputs may also be."""
    may = lora_A.shape[1] < target.d and target.d % lora_A.shape[1] == 0
    return ", or reads pooled inputs (QA-LoRA): then pass pooling='mean' or 'sum'" if may else ""


def _whole(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], pooling: str | None
) -> Mapping[str, tuple[Tensor, Tensor]]:
    """Return the factors with an ``A`` of all inputs where it reads pooled ones."""
    if pooling is None:
        return factors
    if pooling not in CONVENTIONS:
        raise ValueError(f"pooling is {pooling!r}; expected one of {', '.join(CONVENTIONS)}, or None.")
    linears, whole = survey(model).linears, {}
    for name, (lora_A, lora_B) in factors.items():
        L, rest = divmod(linears[name].d, lora_A.shape[1]) if name in linears else (1, 0)
        whole[name] = (lora_A if rest or L == 1 else ordinary(lora_A.float(), L, pooling)), lora_B
    if all(whole[name][0] is lora_A for name, (lora_A, _) in factors.items()):
        raise ValueError(
            f"pooling is {pooling!r}, but no lora_A of the adapter reads a divisor of its layer's inputs. It is no "
            "QA-LoRA adapter of this model, or is read as one already; leave pooling out."
        )
    return whole


def _matching(model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path) -> dict[str, Target]:
    linears = survey(model).linears
    refuse_adapted(linears)
    for name, (lora_A, lora_B) in factors.items():
        target = linears.get(name)
        if target is None:
            now = name.replace("language_model.model.", "model.language_model.", 1)
            if now in linears:
                raise ValueError(
                    f"{folder} adapts {name}, which transformers calls {now} since 4.52; expected the present name. "
                    "Load it with peft.PeftModel.from_pretrained, which converts names, and save_pretrained it again."
                )
            module = dict(model.named_modules()).get(name)
            kind = "no module" if module is None else f"a {type(module).__name__}"
            if hasattr(module, "qzeros"):
                raise ValueError(
                    f"{folder} adapts {name}, which is {kind} in this {type(model).__name__}: its zero points are "
                    "integers packed into words, as GPTQ and AWQ have them, which take no fraction. Merge into "
                    "a base with zero points in floating point (HQQ, torchao), or load it with PEFT and keep it apart."
                )
            raise ValueError(
                f"{folder} adapts {name}, which is {kind} in this {type(model).__name__}; expected a linear layer. The "
                "adapter belongs to another model."
            )
        if (lora_B.shape[0], lora_A.shape[1]) != (target.m, target.d):
            raise ValueError(
                f"{folder} adapts {name} with d={lora_A.shape[1]}, m={lora_B.shape[0]}, but the layer has "
                f"d={target.d}, m={target.m}. The adapter belongs to another model{_pooled(lora_A, target)}."
            )
    return {name: target for name, target in linears.items() if name in factors}

"""Save, load and merge adapters. On disk they are plain PEFT LoRA adapters on the untouched base model."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from ._adapter_files import (
    OWN_CONFIG,
    PEFT_CONFIG,
    README,
    WEIGHTS,
    AdapterFiles,
    check_target,
    padded,
    read_adapter,
    replaced_folder,
    tensor_names,
    write_json,
)
from ._logging import logger
from ._weights import (
    fingerprint,
    home_of,
    is_distributed,
    plain_name,
    refuse_sharded,
    require_finite,
    require_writable,
    shared_weights,
    uncompiled,
    unwrapped,
)
from .config import LoraNullConfig
from .distributed import in_first_process
from .initialization import AdapterState, get_state, set_state, shift_base
from .layers import LoraNullLinear, adapter_layers, attach_adapter, detach_adapter, require_adaptable
from .projection_groups import share_projections

_DIVERGED = "The training run diverged; lower the learning rate and start again from an earlier checkpoint."


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
    model = unwrapped(model)
    layers = _require_layers(model)
    factors = {plain_name(name): layer.low_rank_delta() for name, layer in layers.items()}
    some = next(iter(layers.values()))
    adapted = {id(parameter) for layer in layers.values() for parameter in layer.parameters()}
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in adapted]
    if others:
        logger.warning(
            "%d parameters outside the adapters require gradients, for instance %s; what they learned is not in the "
            "adapter that is saved.",
            len(others),
            others[0],
        )
    state = get_state(model) or AdapterState(LoraNullConfig(r=some.r, lora_alpha=some.scaling * some.r))
    # Readers match endings against all modules: a convolution of the same ending must not get an adapter there.
    names = [plain_name(name) for name, _ in model.named_modules()]
    write = partial(
        write_adapter,
        Path(path),
        factors,
        target_modules=short_names(names, factors),
        base_model_name_or_path=base_model_name_or_path or published_name(_base_name(model)),
        task_type=_task_type(model),
        own=state.to_dict(stacked=some.shifted),
        dtype=dtype,
        overwrite=overwrite,
    )
    in_first_process(write) if is_distributed(model) else write()


def write_adapter(
    path: Path,
    factors: Mapping[str, tuple[Tensor, Tensor]],  # A (r, d), B (m, r), scaling folded in
    *,
    target_modules: Iterable[str],
    base_model_name_or_path: str | None,
    task_type: str | None,
    own: dict,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write factors and both configurations to the folder ``path``, atomically."""
    from peft import LoraConfig

    ranks = {lora_A.shape[0] for lora_A, _ in factors.values()}
    r = max(ranks)
    tensors = {}
    for name, (lora_A, lora_B) in factors.items():
        require_finite(f"The adapter of {name}", lora_A, lora_B, f", so it was not saved. {_DIVERGED}")
        for key, tensor in zip(tensor_names(name), padded(lora_A, lora_B, r), strict=True):
            tensors[key] = tensor.to("cpu", dtype or torch.float32).contiguous()
        stored_A, stored_B = (tensors[key] for key in tensor_names(name))
        advice = f" in {dtype}, so it was not saved. Its values are too large for that type; save in another."
        require_finite(f"The adapter of {name}", stored_A, stored_B, advice)
    config = LoraConfig(
        r=r,
        lora_alpha=r,
        target_modules=sorted(target_modules),
        lora_dropout=0.0,
        bias="none",
        init_lora_weights=True,
        task_type=task_type,
        base_model_name_or_path=base_model_name_or_path,
        inference_mode=True,
    ).to_dict()
    # PEFT keeps target_modules as a set.
    config = {key: sorted(value) if isinstance(value, set) else value for key, value in config.items()}
    with replaced_folder(path, partial(check_target, path, overwrite)) as work:
        if (path / README).exists():
            shutil.copy2(path / README, work / README)
        save_file(tensors, str(work / WEIGHTS), metadata={"format": "pt"})
        write_json(work / OWN_CONFIG, own)
        write_json(work / PEFT_CONFIG, config)


# Tensors made in inference mode could never be trained.
@torch.inference_mode(False)
def load_adapter(
    base_model: nn.Module,
    path: str | os.PathLike,
    *,
    is_trainable: bool = False,
    adapter_dtype: torch.dtype = torch.float32,
    verify_base: bool = True,
) -> nn.Module:
    """Attach a saved LoRA adapter, ours or any plain one in PEFT's format, to the untouched base model in place.

    Args:
        base_model: The pre-trained model that the adapter was trained on.
        path: An adapter folder.
        is_trainable: Go on training, in the mode that the adapter was trained in: with A frozen again, or on
            the base shifted as before. The default freezes everything.
        adapter_dtype: Of the factors in memory.
        verify_base: Compare the base weights with the fingerprint saved with the adapter.

    Returns:
        The same model. Nothing is changed when an error is raised.

    Raises:
        FileNotFoundError: ``path`` is not an adapter folder.
        ValueError: A file is damaged or foreign, or the adapter belongs to another model.
    """
    wrapper, base_model, folder = base_model, uncompiled(base_model), Path(path)
    files = read_adapter(folder)
    factors, own = files.factors, files.own
    linears = _matching_linears(base_model, factors, folder)
    refuse_sharded(linears, "load_adapter")
    require_adaptable(linears)
    base = fingerprint(linears)
    if verify_base and base and own.get("base_fingerprint") and base != own["base_fingerprint"]:
        raise ValueError(
            f"{folder} was trained on other weights than those of this {type(base_model).__name__}: the shapes agree, "
            "the values do not. Load the base model that the adapter was trained on "
            f"({files.config.get('base_model_name_or_path')!r}), unmerged and without other adapters, or pass "
            "verify_base=False if the difference is intended: a base that was rounded to float16, say."
        )
    config = _config_of(folder, files)
    shifted = bool(own.get("stacked")) and is_trainable
    if shifted:
        shared = shared_weights(base_model)
        for name, linear in linears.items():
            require_writable(name, linear, "Training A on", shared)
            if factors[name][0].shape[0] % 2:
                raise ValueError(
                    f"{folder / OWN_CONFIG} says that the adapter has the rank-2r form, but that of {name} has the odd "
                    f"rank {factors[name][0].shape[0]}. The two files do not belong together; save the adapter again."
                )
    else:
        # On disk the scaling is part of B. Training goes on with that of the run, so that a step of B means the same.
        r = files.config["r"]
        scaling = config.scaling if is_trainable else files.scaling
        config = replace(config, r=r, lora_alpha=scaling * r)
    base_model.requires_grad_(False)
    for name, linear in linears.items():
        home = home_of(linear)
        lora_A, lora_B = (factor.to(home, torch.float32) for factor in factors[name])
        if shifted:
            _resume_shifted(linear, lora_A.to(adapter_dtype), lora_B.to(adapter_dtype), config)
            continue
        attach_adapter(
            linear,
            lora_A.to(adapter_dtype),
            (lora_B * (files.scaling / config.scaling)).to(adapter_dtype),
            scaling=config.scaling,
            train_a=is_trainable and not config.freeze_a,
            lora_dropout=config.lora_dropout,
        )
        linear.lora_B.requires_grad_(is_trainable)
    share_projections(base_model)
    set_state(base_model, AdapterState(config, base, own.get("energies", {})))
    return wrapper


def merge(model: nn.Module) -> nn.Module:
    """Fold every adapter into its weight, computed in fp32 and rounded once, and restore the plain layers.

    Sharded weights (FSDP2, tensor parallel) are merged shard by shard; all processes have to call this.

    Returns:
        The same model, with nothing of this package left on it.
    """
    wrapper, model = model, unwrapped(model)
    layers = _require_layers(model)
    shared = shared_weights(model)
    for name, layer in layers.items():
        require_writable(name, layer, "Merging", shared)
        factors = layer.lora_A.weight, layer.lora_B.weight
        require_finite(f"The adapter of {name}", *factors, f", so nothing was merged. {_DIVERGED}")
    for layer in layers.values():
        # The shifted base holds W - s B0 A0, so in both modes the trained factors are what is missing.
        shift_base(layer, layer.lora_A.weight.detach(), layer.lora_B.weight.detach(), layer.scaling)
        detach_adapter(layer)
    set_state(model, None)
    return wrapper


def short_names(names: Iterable[str], chosen: Iterable[str]) -> list[str]:
    """Return last name components where they select exactly ``chosen`` among ``names``, else whole names."""
    chosen = set(chosen)
    endings = {name.rsplit(".", 1)[-1] for name in chosen}
    selected = {name for name in names if name.rsplit(".", 1)[-1] in endings}
    return sorted(endings if selected == chosen else chosen)


def published_name(name: str | None) -> str | None:
    """Return a model's name without the leading folders of an absolute path, which tell others about this machine."""
    return Path(name).name if name and os.path.isabs(name) else name


def _resume_shifted(linear: nn.Linear, lora_A: Tensor, lora_B: Tensor, config: LoraNullConfig) -> None:
    """Undo the stacking of ``low_rank_delta``: ``[A ; A - A0]`` and ``s [B - B0 | B0]``."""
    r = lora_A.shape[0] // 2
    trained_A, initial_A = lora_A[:r].clone(), lora_A[:r] - lora_A[r:]
    initial_B = lora_B[:, r:] / config.scaling
    trained_B = lora_B[:, :r] / config.scaling + initial_B
    shift_base(linear, initial_A, initial_B, -config.scaling)
    attach_adapter(
        linear,
        trained_A,
        trained_B,
        scaling=config.scaling,
        train_a=True,
        lora_dropout=config.lora_dropout,
        initial=(initial_A, initial_B),
    )


def _require_layers(model: nn.Module) -> dict[str, LoraNullLinear]:
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} carries no lora_null adapter. Expected a model returned by lora_null.initialize "
            "or lora_null.load_adapter; for a PeftModel use lora_null.peft."
        )
    return layers


def _task_type(model: nn.Module) -> str | None:
    """Return PEFT's name for the kind of model; without one, PEFT takes any and adds nothing to it."""
    decoder = hasattr(model, "prepare_inputs_for_generation") and not getattr(model.config, "is_encoder_decoder", False)
    return "CAUSAL_LM" if decoder else None


def _base_name(model: nn.Module) -> str | None:
    return getattr(getattr(model, "config", None), "_name_or_path", None) or None


def _config_of(folder: Path, files: AdapterFiles) -> LoraNullConfig:
    """Return the configuration that training goes on with."""
    if files.own.get("config"):
        try:
            return LoraNullConfig.from_dict(files.own["config"])
        except (AttributeError, TypeError, ValueError) as error:
            raise ValueError(
                f"{folder / OWN_CONFIG} is damaged ({error}); save the adapter again, or delete that file to load the "
                "adapter as one of another program."
            ) from None
    r = files.config["r"]
    dropout = files.config.get("lora_dropout", 0.0)
    return LoraNullConfig(r=r, lora_alpha=files.scaling * r, freeze_a=False, lora_dropout=dropout)


def _matching_linears(
    model: nn.Module, factors: Mapping[str, tuple[Tensor, Tensor]], folder: Path
) -> dict[str, nn.Linear]:
    if adapted := adapter_layers(model):
        raise ValueError(
            f"The model carries {len(adapted)} lora_null adapters already. Merge them first (lora_null.merge), or load "
            "the base model afresh."
        )
    modules = dict(model.named_modules())
    for name, (lora_A, lora_B) in factors.items():
        module = modules.get(name)
        if not isinstance(module, nn.Linear):
            found = "no module" if module is None else f"a {type(module).__name__}"
            raise ValueError(
                f"{folder} adapts {name}, "
                f"which is {found} in this {type(model).__name__}; expected a linear layer. The "
                "adapter belongs to another model."
            )
        if (lora_B.shape[0], lora_A.shape[1]) != (module.out_features, module.in_features):
            raise ValueError(
                f"{folder} adapts {name} with d={lora_A.shape[1]}, m={lora_B.shape[0]}, but the layer has "
                f"d={module.in_features}, m={module.out_features}. The adapter belongs to another model."
            )
    return {name: modules[name] for name in modules if name in factors}

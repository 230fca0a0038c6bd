"""What is remembered of adapters, by name, and the model's own ``save_pretrained``, which writes it."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils.hotswap import hotswap_adapter_from_state_dict
from torch import Tensor

from ..adapters.extras import keys_of
from ..adapters.names import PEFT_CONFIG, WEIGHTS, tensor_names
from ..adapters.state import OWN_CONFIG, AdapterState
from ..config import LoraNullConfig
from ..models.wrappers import STATE
from ..system.tensors import opened
from .basis import drop_coefficients, learn_alike, learns_within
from .complete import require_complete, samples_of
from .layers import holds_linear, lora_layers, lora_modules, scaled_layers
from .recipe import recipe_of, scale_B, with_recipe
from .shifted import (
    base_handed_out,
    called_by,
    counts_on_shift,
    initial_of,
    is_shifted,
    keep_apart,
    keep_configurations,
    require_unreading,
    start_beside,
)
from .untouched import for_untouched_base, note_scaling, other_start, require_own_shifts, take_apart

# On the model: adapter name to Record. On it and on layers: that what is read from and loaded into them is looked at.
_RECORDS, _WATCHED = "_lora_null_records", "_lora_null_watched"


@dataclass(frozen=True)
class Record:
    """What PEFT does not know of an adapter.

    Attributes:
        state: For ``lora_null.json``.
        before: Hashes of what the model held beside its adapters.
        weights: Some values of the base weights.
        config: PEFT's, by which an adapter is known: one that was deleted and made again under its name is another.
    """

    state: AdapterState
    before: Mapping[str, str]
    weights: Mapping[str, Tensor]
    config: Any


def remember(peft_model: Any, adapter_name: str, state: AdapterState) -> None:
    """Keep ``state`` of an adapter, and let the model's own ways to save and load it keep to it."""
    # Not in the configuration of the model, which PEFT's merge_and_unload hands on as it is.
    setattr(peft_model, STATE, state)
    record = Record(state, keys_of(peft_model), samples_of(peft_model), peft_model.peft_config[adapter_name])
    records = {**peft_model.__dict__.get(_RECORDS, {}), adapter_name: record}
    setattr(peft_model, _RECORDS, records)
    for layer in lora_layers(peft_model, adapter_name).values():
        if _WATCHED not in layer.__dict__:
            layer.register_state_dict_post_hook(note_scaling)
            layer.register_load_state_dict_pre_hook(take_apart)
            setattr(layer, _WATCHED, True)
    if _WATCHED not in peft_model.__dict__:
        peft_model.register_state_dict_post_hook(handed_out)
        peft_model.register_load_state_dict_pre_hook(require_own_shifts)
        setattr(peft_model, _WATCHED, True)
        if isinstance(peft_model, PeftModel):
            peft_model.get_base_model().register_state_dict_post_hook(base_handed_out)
    if isinstance(peft_model, PeftModel):
        if is_shifted(peft_model):
            keep_apart(peft_model)
            if not isinstance(peft_model.__dict__.get("create_or_update_model_card"), ModelCard):
                peft_model.create_or_update_model_card = ModelCard(peft_model)
        if not isinstance(peft_model.__dict__.get("add_adapter"), AddAdapter):
            peft_model.add_adapter = AddAdapter(peft_model)
    elif is_shifted(peft_model):
        keep_configurations(peft_model)
    # Without these a model has no way to save adapters: save_pretrained, if any, writes all its weights as they are.
    saves_adapters = isinstance(peft_model, PeftModel) or getattr(peft_model, "_hf_peft_config_loaded", False)
    if saves_adapters and not isinstance(peft_model.__dict__.get("save_pretrained"), SavePretrained):
        peft_model.save_pretrained = SavePretrained(peft_model)
    kind = LoadAdapter if isinstance(peft_model, PeftModel) else LoadBeside
    if saves_adapters and not isinstance(peft_model.__dict__.get("load_adapter"), kind):
        peft_model.load_adapter = kind(peft_model)


def handed_out(peft_model: Any, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
    """Let PEFT's ``get_peft_model_state_dict`` return an adapter for the untouched base, as files hold it.

    A hook for ``register_state_dict_post_hook``. All the function does with a model is to ask for its state dict, where
    the others who ask want the factors as they are; so it is known by its call.

    Raises:
        ValueError: It is asked for by a hot swap, which would put factors as they are, into a shifted base or free
            directions.
    """
    if (swap := called_by(hotswap_adapter_from_state_dict)) is not None:
        _require_plain(peft_model, swap.f_locals["adapter_name"])
    frame = called_by(get_peft_model_state_dict)
    if prefix or frame is None:
        return
    adapter_name = frame.f_locals["adapter_name"]
    if counts_on_shift(peft_model, adapter_name):
        for_untouched_base(peft_model, adapter_name, state_dict)
    drop_coefficients(state_dict, adapter_name)


def _require_plain(peft_model: Any, adapter_name: str) -> None:
    """Refuse to put factors of a file, as they are, where layers hold another form."""
    if counts_on_shift(peft_model, adapter_name) or learns_within(peft_model, adapter_name):
        raise ValueError(
            f"The factors of a file are to be put into the adapter {adapter_name!r} as they are, but its base is "
            "shifted (train='ab') or its A is made of coefficients (train='b_in_basis'). Give them another name: "
            "load_adapter(folder, 'another') and set_adapter('another'); to resume a run, make its model with "
            "peft.get_peft_model, whose load_adapter knows both forms."
        )


def recalled(peft_model: Any, adapter_name: str) -> AdapterState | None:
    """Return what is remembered of an adapter."""
    record = peft_model.__dict__.get(_RECORDS, {}).get(adapter_name)
    known = record is not None and record.config is peft_model.peft_config.get(adapter_name)
    return record.state if known else None


def held_before(peft_model: Any) -> tuple[dict[str, str], dict[str, Tensor]]:
    """Return hashes of what the model held beside its adapters when the first of them was started, and base weights.

    Those as the last start has left them: it may have shifted them.
    """
    before: dict[str, str] = {}
    weights: dict[str, Tensor] = {}
    for record in peft_model.__dict__.get(_RECORDS, {}).values():
        before = {**record.before, **before}
        weights = {**weights, **record.weights}
    return before, weights


class SavePretrained:
    """``save_pretrained`` of one model, of PEFT or of transformers, whose folders fit the untouched base model.

    Where the base is shifted, it hands the original the factors in the rank-``2 r`` form ``[A ; A - A0]``,
    ``s [B - B0 | B0]``, and the configuration that belongs to them, so that it does not matter in which order the two
    are written. Beside them it writes ``lora_null.json``.

    An attribute of the model, as other programs also replace this method. It is copied and pickled with the model.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.original = model, model.save_pretrained

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Write all that the original would.

        Raises:
            ValueError: Something was trained that is in no adapter's file. Nothing is written then.
        """
        # By the class: what another program has put in between may take anything.
        bound = inspect.signature(type(self.model).save_pretrained).bind(self.model, *args, **kwargs).arguments
        options = {**bound, **bound.get("kwargs", {})}
        for name in ("self", "kwargs"):
            options.pop(name, None)
        folders = self._folders(options)
        states = {name: recalled(self.model, name) for name in folders}
        if options.get("path_initial_model_for_weight_conversion") and any(states.values()):
            raise ValueError(
                "PEFT's conversion (path_initial_model_for_weight_conversion) is not needed here: save_pretrained "
                "writes an adapter for the untouched base by itself. Leave it out."
            )
        if not options.get("safe_serialization", True) and any(states.values()):
            raise ValueError(
                "safe_serialization is False, by which adapters are pickled; expected safetensors, which all readers "
                "know. Leave it out."
            )
        require_complete(self.model, *held_before(self.model), options.get("save_embedding_layers", "auto"))
        with ExitStack() as stack:
            shifted = [name for name in folders if counts_on_shift(self.model, name)]
            if shifted or learns_within(self.model):
                given = options.get("state_dict")
                options["state_dict"] = state_dict = dict(self.model.state_dict() if given is None else given)
                for name in folders:
                    drop_coefficients(state_dict, name)
                for name in shifted:
                    settings, stacked = for_untouched_base(self.model, name, state_dict)
                    stack.enter_context(_set(self.model.peft_config[name], settings))
                    state = states[name]
                    states[name] = None if state is None else replace(state, stacked=stacked)
            for name in folders:
                if name not in shifted and any(holds_linear(layer, name) for _, layer in lora_modules(self.model)):
                    # What was set on the layers, by hand or by hot-swapping, is in PEFT's configuration nowhere.
                    recipe = recipe_of(self.model, name, LoraNullConfig())
                    patterns = {"alpha_pattern": recipe.alpha_pattern or {}, "rank_pattern": recipe.rank_pattern or {}}
                    stack.enter_context(_set(self.model.peft_config[name], patterns))
            writes = options.get("is_main_process", True)
            for folder in folders.values() if writes else ():
                # Of another adapter, or of this one as it was: without it a folder is an ordinary adapter's.
                (folder / OWN_CONFIG).unlink(missing_ok=True)
            result = self.original(**options)
        for name, folder in folders.items() if writes else ():
            state = states[name]
            if state is not None:
                replace(state, config=recipe_of(self.model, name, state.config)).write(folder, sealed=True)
        return result

    def _folders(self, options: dict[str, Any]) -> dict[str, Path]:
        """Return the folder that each adapter is written to."""
        folder = Path(options["save_directory"])
        if isinstance(self.model, PeftModel):
            names = options.get("selected_adapters") or list(self.model.peft_config)
            return {name: folder if name == "default" else folder / name for name in names}
        return {self.model.active_adapters()[0]: folder}


class ModelCard:
    """``create_or_update_model_card`` of one ``PeftModel`` with a shifted base: the first that PEFT's saving calls.

    So it sees who calls ``PeftModel.save_pretrained`` on the class, which would write factors as they are.
    """

    def __init__(self, model: Any) -> None:
        self.model = model

    def __call__(self, output_dir: str) -> None:
        """Write the card; ValueError past the model's own ``save_pretrained``, with nothing written."""
        saving = called_by(PeftModel.save_pretrained)
        if saving is not None and called_by(SavePretrained.__call__) is None:
            for name in saving.f_locals["selected_adapters"]:
                if counts_on_shift(self.model, name):
                    raise ValueError(
                        "PeftModel.save_pretrained was called on the class, past that of this model, which alone can "
                        f"write the adapter {name!r} for the untouched base (train='ab'). Call "
                        "model.save_pretrained(folder)."
                    )
        type(self.model).create_or_update_model_card(self.model, output_dir)


class AddAdapter:
    """``add_adapter`` of one ``PeftModel``, by which a copy of an adapter has the form of its layers.

    TRL adds one under the configuration of the first, and copies its parameters by name, to have a reference.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.original = model, model.add_adapter

    def __call__(self, adapter_name: str, peft_config: Any, *args: Any, **kwargs: Any) -> None:
        """Add, as PEFT does; ValueError if the adapter reads or moves base weights that are shifted."""
        if is_shifted(self.model):
            require_unreading(adapter_name, peft_config)
        self.original(adapter_name, peft_config, *args, **kwargs)
        # One that is loaded is of the untouched base.
        if called_by(PeftModel.load_adapter) is None:
            start_beside(self.model, adapter_name)
        config = self.model.peft_config[adapter_name]
        for other in [name for name, known in self.model.peft_config.items() if known is config]:
            learn_alike(self.model, adapter_name, other)


class LoadAdapter:
    """``load_adapter`` of one ``PeftModel``, by which an adapter that it has already goes on as it was saved.

    PEFT gives the weights of a file to the adapter of that name as they are, whatever the scaling of the two.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.original = model, model.load_adapter

    def __call__(self, model_id: Any, adapter_name: str, *args: Any, **kwargs: Any) -> Any:
        """Load, and bring ``lora_B`` to the scaling of the adapter in memory; one with a new name is as in its file.

        Raises:
            ValueError: The adapter of that name counts on a shifted base, and the file's did not start there.
        """
        new = adapter_name not in self.model.peft_config
        if not new and adapter_name != "default" and _best_is_wanted():
            # load_best_model_at_end would give this adapter the weights of "default".
            own = Path(model_id) / adapter_name
            model_id = str(own) if (own / PEFT_CONFIG).exists() else model_id
        folder = Path(model_id) / (kwargs.get("subfolder") or "")
        known = recalled(self.model, adapter_name) is not None and (folder / PEFT_CONFIG).exists()
        saved = PeftConfig.from_pretrained(str(folder)) if known else None
        if not new:
            self._require_own(folder, adapter_name)
        result = self.original(model_id, adapter_name, *args, **kwargs)
        if saved is not None:
            recipe = with_recipe(LoraNullConfig(), saved)
            for name, layer in scaled_layers(self.model, adapter_name).items():
                # On a shifted base that is done where the form is taken apart.
                if initial_of(layer, adapter_name) is None:
                    scale_B(layer, adapter_name, recipe.scaling_of(name) / float(layer.scaling[adapter_name]))
        return result

    def _require_own(self, folder: Path, adapter_name: str) -> None:
        """Refuse plain factors of the start's rank, which a layer would take for those on its shifted base."""
        layers = scaled_layers(self.model, adapter_name) if counts_on_shift(self.model, adapter_name) else {}
        if not layers or not (folder / WEIGHTS).exists():
            return
        with opened(folder / WEIGHTS, "the adapter's weights") as file:
            for name in set(file.keys()) & {tensor_names(name)[0] for name in layers}:
                layer = next(layer for key, layer in layers.items() if tensor_names(key)[0] == name)
                initial = initial_of(layer, adapter_name)
                if initial is not None and file.get_slice(name).get_shape()[0] == len(initial[0]):
                    raise other_start(name)


def _best_is_wanted() -> bool:
    """Tell whether a trainer of transformers is asking, which gives the folder of all adapters whatever the name."""
    known: Any = sys.modules.get("transformers.trainer")
    return known is not None and called_by(known.Trainer._load_best_model) is not None


class LoadBeside:
    """``load_adapter`` of one model of transformers, which puts what it reads into the layers as it is."""

    def __init__(self, model: Any) -> None:
        self.model, self.original = model, model.load_adapter

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Load, unless the layers hold another form than files; ValueError then."""
        given = inspect.signature(type(self.model).load_adapter).bind(self.model, *args, **kwargs).arguments
        if (name := given.get("adapter_name") or "default") in self.model.peft_config:
            _require_plain(self.model, name)
        return self.original(*args, **kwargs)


@contextmanager
def _set(config: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Give ``config`` other values for the length of the block."""
    before = {name: getattr(config, name) for name in settings}
    try:
        for name, value in settings.items():
            setattr(config, name, value)
        yield
    finally:
        for name, value in before.items():
            setattr(config, name, value)

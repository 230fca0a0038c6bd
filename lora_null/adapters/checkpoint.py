"""The adapter in a folder that a trainer saved of a patched model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path

from torch import Tensor

from ..models.refusals import DIVERGED, require_finite
from ..models.shards import shards_of
from ..system.files import read_json
from ..system.log import logger
from ..system.tensors import opened, read_floating
from .delta import stack
from .extras import Extras, choose, differs
from .files import Adapter
from .names import short_names
from .state import CONFIG_KEY, AdapterState

_PARTS = ("lora_A", "lora_B", "initial_A", "initial_B")


def of_checkpoint(folder: Path, lora_alpha: float | None = None) -> Adapter:
    """Read the adapter from a checkpoint of a model that :func:`lora_null.initialize` has patched.

    Args:
        folder: Holds ``model.safetensors``, in one file or in shards.
        lora_alpha: Of the run; the default is what ``config.json`` states under ``lora_null``, and ``r`` with a
            warning where it states nothing.

    Raises:
        ValueError: A file is damaged, of a newer format, or holds no adapter.
    """
    config = read_json(folder / "config.json") if (folder / "config.json").exists() else {}
    state = _stated(folder, config, lora_alpha)
    names, tensors = _read_parts(folder)
    weights = {name.removesuffix(".weight") for name in names if name.endswith(".weight")}
    factors = {}
    for module, parts in tensors.items():
        _require_pairs(f"{folder}: the adapter of {module}", parts)
        lora_A, lora_B = parts["lora_A"], parts["lora_B"]
        if lora_alpha is not None:
            scaling = lora_alpha / lora_A.shape[0]
        else:
            scaling = 1.0 if state is None else state.config.scaling_of(module)
        initial = (parts["initial_A"], parts["initial_B"]) if "initial_A" in parts else None
        factors[module] = stack(lora_A, lora_B, scaling, initial)
    if state is not None:
        state = replace(state, stacked=state.stacked or any("initial_A" in parts for parts in tensors.values()))
    classes, base_model = config.get("architectures"), config.get("_name_or_path")
    first = str(classes[0]) if isinstance(classes, list) and classes else ""
    task_type = "CAUSAL_LM" if first.endswith(("ForCausalLM", "LMHeadModel")) else None
    named = base_model if isinstance(base_model, str) else None
    extras = Extras()
    if state is not None:
        extras = _extras(folder, names, state, factors)
        state = replace(state, config=replace(state.config, modules_to_save=extras.modules_to_save))
    return Adapter(factors, short_names(weights, factors), named, task_type, state, extras=extras)


def _require_pairs(what: str, parts: Mapping[str, Tensor]) -> None:
    """Refuse factors that are incomplete, of different ranks or not finite."""
    if not {"lora_A", "lora_B"} <= set(parts) or ("initial_A" in parts) != ("initial_B" in parts):
        raise ValueError(f"{what} is incomplete, it has only {sorted(parts)}; save the checkpoint again.")
    shapes = {part: tuple(tensor.shape) for part, tensor in parts.items()}
    A, B = shapes["lora_A"], shapes["lora_B"]
    fits = len(A) == len(B) == 2 and A[0] == B[1] > 0
    if not fits or shapes.get("initial_A", A) != A or shapes.get("initial_B", B) != B:
        raise ValueError(f"{what} has {shapes}; expected (r, d) and (m, r) of one rank r. Save the checkpoint again.")
    for start in ("lora", "initial"):
        if f"{start}_A" in parts:
            require_finite(what, parts[f"{start}_A"], parts[f"{start}_B"], f" in the checkpoint. {DIVERGED}")


def _read_parts(folder: Path) -> tuple[set[str], dict[str, dict[str, Tensor]]]:
    """Return the names of all tensors outside the adapters, and by adapted module the tensors of its adapter."""
    names: set[str] = set()
    tensors: dict[str, dict[str, Tensor]] = {}
    for key, read in _tensors(folder):
        module, _, part = key.removesuffix(".weight").rpartition(".")
        if part in _PARTS and key.endswith(".weight"):
            tensors.setdefault(module, {})[part] = read()
        elif not key.endswith(".lora_A.coefficients"):  # of which lora_A.weight is made
            names.add(key)
    if not tensors:
        raise ValueError(
            f"{folder} holds no lora_A and lora_B: it is a plain or merged model. Expected a checkpoint of a model "
            "patched by lora_null.initialize, saved before lora_null.merge."
        )
    return names, tensors


def _tensors(folder: Path) -> Iterator[tuple[str, Callable[[], Tensor]]]:
    """Yield the name of every tensor, and what reads it."""
    for file in shards_of(folder):
        with opened(file, "weights of the checkpoint") as content:
            for key in content.keys():
                yield key, partial(read_floating, content, file, key)


def _extras(folder: Path, names: set[str], state: AdapterState, adapted: Iterable[str]) -> Extras:
    """Read what was trained besides the factors: what differs from the model in which they began."""
    before = state.before
    # Of tied weights transformers writes one.
    held = {before[name]: name for name in sorted(names, reverse=True) if name in before}
    ties = {name: held[key] for name, key in before.items() if name not in names and key in held}
    changed = {key for key, read in _tensors(folder) if key in before and differs(read(), before[key])}
    changed |= {name for name, source in ties.items() if source in changed}
    chosen, extras = choose(sorted({*names, *ties}), changed, adapted, state.config.modules_to_save or ())
    sources = {ties.get(name, name) for name in chosen}
    values = {key: read() for key, read in _tensors(folder) if key in sources}
    return replace(extras, tensors={name: values[ties.get(name, name)] for name in chosen})


def _stated(folder: Path, config: dict, lora_alpha: float | None) -> AdapterState | None:
    """Return what the model's own configuration says of the run, with ``lora_alpha`` where it is given."""
    if config.get(CONFIG_KEY) is not None:
        state = AdapterState.from_dict(config[CONFIG_KEY], f"{folder / 'config.json'}: the entry {CONFIG_KEY!r}")
        return state if lora_alpha is None else replace(state, config=replace(state.config, lora_alpha=lora_alpha))
    if lora_alpha is None:
        logger.warning(
            f"{folder / 'config.json'} does not state the scaling of the run (no {CONFIG_KEY!r}); lora_alpha = r is "
            "assumed. If the run had another lora_alpha, the exported adapter is wrong: pass it (--lora-alpha)."
        )
    return None

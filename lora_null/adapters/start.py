"""The factors that adapters start from, in the null spaces of a model's activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..config import LoraNullConfig
from ..covariances.covariances import Covariances
from ..models.identity import fingerprint, require_same
from ..models.refusals import Target
from ..solver.factorize import factors_of
from ..solver.pooling import spread
from ..system.distributed import announcing_failure
from ..system.log import logger
from .basis import FreeDirections
from .experts import few_experts, with_pooled
from .spaces import Free, find_free, find_spaces, read, require_enough


@dataclass(frozen=True)
class Start:
    """Where adapters start.

    Attributes:
        factors: Layer name to ``A0 (r, d)`` and ``B0 (m, r)``, ``B0 A0 = W U U^T``.
        base_fingerprint: Of the adapted layers' weights; ``None`` where they are quantised.
        energies: By sharing group, the share ``tr(U^T C U) / tr(C)`` of the activations' energy that the adapters can
            see: ``U`` their r directions, or all that are free where A learns within them.
        free: By sharing group, how many directions are free; empty without an ``energy``.
        directions: Layer name to the free directions, one object for a group; empty unless A learns within them.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    base_fingerprint: str | None
    energies: dict[str, float]
    free: dict[str, int] = field(default_factory=dict)
    directions: dict[str, FreeDirections] = field(default_factory=dict)


def start_factors(
    linears: Mapping[str, Target],
    ranks: Mapping[str, int],
    covariances: Covariances,
    config: LoraNullConfig,
    *,
    task: Covariances | None = None,
    aliases: tuple[str, ...] = ("{}",),
    method: str = "auto",
    dtype: torch.dtype = torch.float32,
    verify_base: bool = True,
    progress: bool = True,
) -> Start:
    """Solve for the null spaces and factorise; nothing is changed, and what can be refused is refused before the work.

    Here it is decided which directions an adapter reads: the ``r`` least used; with a task those that it uses most,
    among all beyond ``config.energy`` or, without one, weighed against their energy. Processes of a
    ``torch.distributed`` group divide the solves, and all get the same factors.

    Args:
        linears: All linear layers of the model, by name.
        ranks: The rank of those that get an adapter, by name.
        covariances: Of the model.
        config: What is trained, the energy and the seed. Where the base is shifted, it must be writable.
        task: Of the model on the task's text.
        aliases: Forms in which covariances may hold a name.
        method: Passed to :func:`lora_null.null_space`.
        dtype: Of the factors.
        verify_base: Refuse covariances of other weights.
        progress: Show progress bars.

    Raises:
        ValueError: The covariances do not cover or do not fit the layers or are of other weights, a rank is too large,
            a weight is not finite, or cannot be shifted; an energy leaves fewer directions free than a layer's rank.
    """
    L = config.group_pooling
    assert not isinstance(L, str)
    with announcing_failure():
        keys = _checked_groups(linears, ranks, covariances, aliases, verify_base)
        for name, r in ranks.items():
            linears[name].require_rank(r, L)
            if config.train == "ab":
                linears[name].require_writable("freeze_a=False")
        few = few_experts(linears, keys, covariances)
        covariances, keys = with_pooled(covariances, keys, few)
        of_task = None
        if task is not None:
            own = _checked_groups(linears, ranks, task, aliases, verify_base, "task covariances")
            task, own = with_pooled(task, own, few | few_experts(linears, own, task))
            of_task = _Renamed(task, {keys[name]: key for name, key in own.items()}, L)
    largest = _largest(ranks, keys)
    free = find_free(covariances, largest, config, progress=progress)
    require_enough(free, ranks, keys, config.energy)
    spaces, energies = find_spaces(
        covariances,
        largest,
        free,
        {"method": method, "seed": config.seed},
        task=of_task,
        energy=config.protected,
        group_pooling=L,
        progress=progress,
    )
    base_fingerprint = fingerprint({name: target.linear for name, target in linears.items() if name in ranks})
    factors = {}
    for name, r in tqdm(ranks.items(), "factorise", unit="layer", disable=not progress):
        # Eigenvalues ascend, so a smaller rank takes the leading columns.
        basis = spaces[keys[name]].basis[:, :r]
        if L is not None:
            basis = spread(basis.mT, L).mT
        A0, B0 = factors_of(name, linears[name].linear, basis, dtype=dtype)
        # Entries of a group are equal but for the order of sums in a product: here to the bit.
        factors[name] = A0 if L is None else _even(A0, L), B0
    idle = [name for name, (A0, _) in factors.items() if not A0.any()]
    if idle:
        logger.warning(
            "%d layers, for instance %s, map all directions of their null space to zero, as a zero weight does: their "
            "factors start at zero, and nothing can learn there. Leave them out through exclude_modules.",
            len(idle),
            idle[0],
        )
    counts = {key: found.k for key, found in free.items()}
    return Start(factors, base_fingerprint, energies, counts, _by_layer(free, keys))


def directions_of(
    linears: Mapping[str, Target],
    ranks: Mapping[str, int],
    covariances: Covariances,
    config: LoraNullConfig,
    *,
    aliases: tuple[str, ...] = ("{}",),
    verify_base: bool = True,
    progress: bool = True,
) -> dict[str, FreeDirections]:
    """Solve for the free directions alone, in which a saved adapter goes on learning; errors as above."""
    with announcing_failure():
        keys = _checked_groups(linears, ranks, covariances, aliases, verify_base)
        for name, r in ranks.items():
            linears[name].require_rank(r, config.group_pooling)
        covariances, keys = with_pooled(covariances, keys, few_experts(linears, keys, covariances))
    free = find_free(covariances, _largest(ranks, keys), config, progress=progress)
    require_enough(free, ranks, keys, config.energy)
    return _by_layer(free, keys)


def _largest(ranks: Mapping[str, int], keys: Mapping[str, str]) -> dict[str, int]:
    """Return the largest rank of each sharing group."""
    largest: dict[str, int] = {}
    for name, r in ranks.items():
        largest[keys[name]] = max(largest.get(keys[name], 0), r)
    return largest


def _by_layer(free: Mapping[str, Free], keys: Mapping[str, str]) -> dict[str, FreeDirections]:
    return {name: held for name, key in keys.items() if key in free and (held := free[key].directions) is not None}


def _even(A: Tensor, L: int) -> Tensor:
    return A[:, ::L].repeat_interleave(L, 1)


class _Renamed(Mapping[str, Tensor]):
    """Covariances by the keys of others, of pooled inputs where these are."""

    def __init__(self, covariances: Covariances, names: Mapping[str, str], group_pooling: int | None):
        self._covariances, self._names, self._pooling = covariances, names, group_pooling

    def __getitem__(self, key: str) -> Tensor:
        return read(self._covariances[self._names[key]], self._pooling)

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def _checked_groups(
    linears: Mapping[str, Target],
    names: Mapping[str, int],
    covariances: Covariances,
    aliases: tuple[str, ...],
    verify_base: bool,
    what: str = "covariances",
) -> dict[str, str]:
    """Return by layer name the key of its sharing group, whose size fits and which is of these weights."""
    keys = _groups(names, covariances, aliases, what)
    for name, key in keys.items():
        linears[name].require_width(covariances.size(key))
    if verify_base:
        require_these_weights(linears, covariances, aliases, what)
    return keys


def _groups(names: Mapping[str, int], covariances: Covariances, aliases: tuple[str, ...], what: str) -> dict[str, str]:
    """Return by layer name the key of its sharing group."""
    sources = {name: next((a for a in _forms(name, aliases) if a in covariances), None) for name in names}
    missing = [name for name, source in sources.items() if source is None]
    if missing:
        raise ValueError(
            f"The {what} hold no entry for {len(missing)} of {len(names)} target layers, for instance "
            f"{missing[0]}; they were collected for another model or for fewer target_modules, or no token reached "
            "these layers. Run lora_null.calibrate on this model with the same target_modules."
        )
    return {name: covariances.group_of(source) for name, source in sources.items() if source is not None}


def _forms(name: str, aliases: tuple[str, ...]) -> list[str]:
    return [alias.format(name) for alias in aliases]


def require_these_weights(
    linears: Mapping[str, Target],
    covariances: Covariances,
    aliases: tuple[str, ...],
    what: str,
    print_of: Callable[[Mapping[str, nn.Linear]], str | None] = fingerprint,
) -> None:
    """Refuse covariances that were collected on weights other than those of ``linears``; ``print_of`` reads them."""
    known = covariances.metadata.get("base_fingerprint")
    members = {name for names in covariances.groups.values() for name in names}
    named = {form: target.linear for name, target in linears.items() for form in _forms(name, aliases)}
    if not known or not members <= set(named):
        return
    present = print_of({name: linear for name, linear in named.items() if name in members})
    require_same(
        known,
        present,
        f"The {what} were collected on other weights than these",
        "The null spaces of another model protect nothing here. Run lora_null.calibrate on this one, or pass "
        "verify_base=False (--no-verify-base) if the difference is intended: covariances from before an earlier "
        "adapter was merged, say, or one base rounded to bfloat16 here and to float16 there.",
    )

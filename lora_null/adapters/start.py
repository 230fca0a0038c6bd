"""The factors that adapters start from, in the null spaces of a model's activations."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..covariances.covariances import Covariances
from ..models.identity import fingerprint
from ..models.refusals import Target
from ..solver.factorize import factors_of
from ..solver.null_space import NullSpace
from ..solver.null_spaces import null_spaces
from ..system.distributed import announcing_failure, divide, gather
from ..system.log import logger


@dataclass(frozen=True)
class Start:
    """Where adapters start.

    Attributes:
        factors: Layer name to ``A0 (r, d)`` and ``B0 (m, r)``, ``B0 A0 = W U U^T``.
        base_fingerprint: Of the adapted layers' weights; ``None`` where they are quantised.
        energies: By sharing group, the share ``tr(U^T C U) / tr(C)`` of the activations' energy that ``U`` sees.
    """

    factors: dict[str, tuple[Tensor, Tensor]]
    base_fingerprint: str | None
    energies: dict[str, float]


def start_factors(
    linears: Mapping[str, Target],
    ranks: Mapping[str, int],
    covariances: Covariances,
    *,
    freeze_a: bool,
    aliases: tuple[str, ...] = ("{}",),
    method: str = "auto",
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    progress: bool = True,
) -> Start:
    """Solve for the null spaces and factorise; nothing is changed, and what can be refused is refused before the work.

    Processes of a ``torch.distributed`` group divide the solves, and all get the same factors.

    Args:
        linears: All linear layers of the model, by name.
        ranks: The rank of those that get an adapter, by name.
        covariances: Of the model.
        freeze_a: Whether the base weights stay as they are; otherwise they must be writable.
        aliases: Forms in which ``covariances`` may hold a name.
        method: Passed to :func:`lora_null.null_space`.
        seed: Seed of the solver.
        dtype: Of the factors.
        progress: Show progress bars.

    Raises:
        ValueError: The covariances do not cover or do not fit the layers, a rank is too large, a weight is not finite,
            or cannot be shifted.
    """
    with announcing_failure():
        _warn_of_other_weights(linears, covariances, aliases)
        keys = _groups(ranks, covariances, aliases)
        for name, r in ranks.items():
            linears[name].require_width(covariances.size(keys[name]))
            linears[name].require_rank(r)
            if not freeze_a:
                linears[name].require_writable("freeze_a=False")
    wanted: dict[str, int] = {}
    for name, r in ranks.items():
        wanted[keys[name]] = max(wanted.get(keys[name], 0), r)
    spaces, energies = _solve(covariances, wanted, method=method, seed=seed, progress=progress)
    base_fingerprint = fingerprint({name: linears[name].linear for name in ranks})
    factors = {}
    for name, r in tqdm(ranks.items(), "factorise", unit="layer", disable=not progress):
        # Eigenvalues ascend, so a smaller rank takes the leading columns.
        factors[name] = factors_of(name, linears[name].linear, spaces[keys[name]].basis[:, :r], dtype=dtype)
    idle = [name for name, (A0, _) in factors.items() if not A0.any()]
    if idle:
        logger.warning(
            "%d layers, for instance %s, map all directions of their null space to zero, as a zero weight does: their "
            "factors start at zero, and nothing can learn there. Leave them out through exclude_modules.",
            len(idle),
            idle[0],
        )
    return Start(factors, base_fingerprint, energies)


def _groups(names: Mapping[str, int], covariances: Covariances, aliases: tuple[str, ...]) -> dict[str, str]:
    """Return by layer name the key of its sharing group."""
    sources = {name: next((a for a in _forms(name, aliases) if a in covariances), None) for name in names}
    missing = [name for name, source in sources.items() if source is None]
    if missing:
        raise ValueError(
            f"The covariances hold no entry for {len(missing)} of {len(names)} target layers, for instance "
            f"{missing[0]}; they were collected for another model or for fewer target_modules, or no token reached "
            "these layers. Run lora_null.calibrate on this model with the same target_modules."
        )
    return {name: covariances.group_of(source) for name, source in sources.items() if source is not None}


def _forms(name: str, aliases: tuple[str, ...]) -> list[str]:
    return [alias.format(name) for alias in aliases]


def _warn_of_other_weights(linears: Mapping[str, Target], covariances: Covariances, aliases: tuple[str, ...]) -> None:
    """Log a warning if the covariances were collected on weights other than those of ``linears``."""
    known = covariances.metadata.get("base_fingerprint")
    members = {name for names in covariances.groups.values() for name in names}
    named = {form: target.linear for name, target in linears.items() for form in _forms(name, aliases)}
    if not known or not members <= set(named):
        return
    present = fingerprint({name: linear for name, linear in named.items() if name in members})
    if present and present != known:
        logger.warning(
            "The covariances were collected on other weights than these: the shapes agree, the values do not. The null "
            "spaces of another model protect nothing here; run lora_null.calibrate on this one."
        )


def _solve(
    covariances: Covariances, ranks: Mapping[str, int], *, method: str, seed: int, progress: bool
) -> tuple[dict[str, NullSpace], dict[str, float]]:
    """Return, by key of a sharing group, the null spaces of the given ranks and their shares of the energy."""
    spaces: dict[str, NullSpace] = {}
    energies: dict[str, float] = {}
    traces: dict[str, float] = {}

    def matrices(keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            C = covariances[key]
            traces[key] = float(C.diagonal().sum(dtype=torch.float64))
            yield key, C

    for r in sorted(set(ranks.values())):
        keys = [key for key, rank in ranks.items() if rank == r]
        with announcing_failure():
            mine = divide({key: covariances.size(key) ** 3 for key in keys})
            solved = dict(null_spaces(matrices(mine), r, method=method, seed=seed, progress=progress))
        # Rounding can leave a singular matrix with a sum a little below zero.
        for key, (space, energy) in gather(
            {key: (space, max(space.energy, 0.0) / traces[key]) for key, space in solved.items()}
        ).items():
            spaces[key], energies[key] = space, energy
    return spaces, energies

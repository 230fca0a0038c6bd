"""Which directions adapters read: the least used, and with an energy or a task those chosen among all that are free."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..config import LoraNullConfig
from ..covariances.covariances import Covariances
from ..solver.null_basis import NullBasis, null_basis, sufficient_energy
from ..solver.null_space import NullSpace
from ..solver.null_spaces import null_spaces
from ..solver.overlapped import Task, overlapped
from ..solver.pooling import pool_covariance
from ..system.distributed import announcing_failure, divide, gather
from ..system.log import logger
from .basis import FreeDirections


class Free(NamedTuple):
    """The free directions of a sharing group.

    Attributes:
        k: How many.
        share: ``tr(N^T C N) / tr(C)``, what they hold of the energy.
        enough: A share to protect that leaves as many free as the group's rank.
        directions: Those in which A stays; ``None`` unless it learns.
        least: The rank's least used of them, where they were solved for along the way.
    """

    k: int
    share: float
    enough: float
    directions: FreeDirections | None
    least: NullSpace | None


def find_free(
    covariances: Covariances, ranks: Mapping[str, int], config: LoraNullConfig, *, progress: bool
) -> dict[str, Free]:
    """Return, by sharing group, the directions beyond the energy; nothing where none is protected.

    Processes of a ``torch.distributed`` group divide the solves, and all get the same answer.

    Args:
        covariances: Of the model.
        ranks: By sharing group, the largest of its layers'.
        config: Its energy; without one, in a basis, at least the rank's least used directions are free.
        progress: Show a progress bar.
    """
    energy, keeps = config.protected, config.train == "b_in_basis"
    if energy is None:
        return {}
    L, dtype = config.group_pooling, getattr(torch, config.basis_dtype)
    assert not isinstance(L, str)

    def solve(C: Tensor, r: int) -> Free:
        free = null_basis(read(C, L), energy, at_least=r if config.energy is None else 0)
        share, enough = max(free.energy_left, 0.0) / _trace(C), sufficient_energy(free.eigenvalues, r)
        held = FreeDirections(free, dtype=dtype, group_pooling=L) if keeps else None
        return Free(free.k, share, enough, held, _least(free, r))

    def tasks(keys: list[str]) -> Iterator[Task[str, Free]]:
        for key in keys:
            C = covariances[key]
            yield key, C.device, len(C), partial(solve, C, ranks[key])
            del C

    with announcing_failure():
        mine = divide({key: covariances.size(key) ** 3 for key in ranks})
        solving = overlapped(tasks(mine), _tensors, what="free directions", total=len(mine), progress=progress)
        found = dict(solving)
    found = gather(found)
    parts = sorted(free.k * (L or 1) / covariances.size(key) for key, free in found.items())
    logger.info(
        "energy=%s leaves %.1f %% to %.1f %% of the directions free, in half of the %d groups at least %.1f %%.",
        *(energy, 100 * parts[0], 100 * parts[-1], len(parts), 100 * parts[len(parts) // 2]),
    )
    return found


def require_enough(
    found: Mapping[str, Free], ranks: Mapping[str, int], keys: Mapping[str, str], energy: float | None
) -> None:
    """Refuse an energy that leaves fewer directions free than the rank of a layer.

    Raises:
        ValueError: Says how many, in which layers, and what would do.
    """
    few = {name: found[keys[name]].k for name, r in ranks.items() if found and found[keys[name]].k < r}
    if few:
        enough = min(found[keys[name]].enough for name in few)
        shown = ", ".join(f"{name} (r={ranks[name]}) {k}" for name, k in list(few.items())[:5])
        raise ValueError(
            f"energy={energy} leaves fewer directions free than the rank in {len(few)} of {len(ranks)} layers: "
            f"{shown}{', ...' if len(few) > 5 else ''}. Lower it to energy={enough}, lower "
            f"r, or ask for smaller ranks there: rank_pattern={dict(list(few.items())[:5])}."
        )


def find_spaces(
    covariances: Covariances,
    ranks: Mapping[str, int],
    free: Mapping[str, Free],
    options: Mapping[str, Any],
    *,
    task: Mapping[str, Tensor] | None = None,
    energy: float | None = None,
    group_pooling: int | None = None,
    progress: bool,
) -> tuple[dict[str, NullSpace], dict[str, float]]:
    """Return, by sharing group, the null spaces of the given ranks and their shares of the energy.

    Args:
        covariances: Of the model.
        ranks: By sharing group.
        free: From :func:`find_free`.
        options: Of :func:`lora_null.null_space`.
        task: Of the model on the task's text, by the same keys, as A reads it: what it uses most is chosen.
        energy: To protect, for that choice.
        group_pooling: Of what A reads.
        progress: Show progress bars.
    """
    spaces: dict[str, NullSpace] = {}
    energies: dict[str, float] = {}
    traces: dict[str, float] = {}

    def matrices(keys: list[str]) -> Iterator[tuple[str, Tensor]]:
        for key in keys:
            C = covariances[key]
            traces[key] = _trace(C)
            yield key, read(C, group_pooling)

    # Where no more are free than the rank there is nothing to choose.
    choosing = {key for key in ranks if task is not None and not (key in free and free[key].k == ranks[key])}
    for r, chosen in sorted({(r, key in choosing) for key, r in ranks.items()}):
        keys = [key for key, rank in ranks.items() if (rank, key in choosing) == (r, chosen)]
        known = {key: space for key in keys if not chosen and key in free and (space := free[key].least) is not None}
        mode: dict[str, Any] = {"task": task, "energy": energy} if chosen else {}
        with announcing_failure():
            mine = divide({key: covariances.size(key) ** 3 for key in keys if key not in known})
            solved = dict(null_spaces(matrices(mine), r, progress=progress, **mode, **options))
        shares = {key: (space, max(space.energy, 0.0) / traces[key]) for key, space in solved.items()}
        for key, (space, share) in gather(shares).items():
            spaces[key], energies[key] = space, share
        spaces.update(known)
    # What A may learn is what it can see.
    energies.update({key: found.share for key, found in free.items() if found.directions is not None})
    return spaces, energies


def read(C: Tensor, group_pooling: int | None) -> Tensor:
    """Return the covariance of what A reads."""
    return C if group_pooling is None else pool_covariance(C, group_pooling)


def _tensors(free: Free) -> list[Tensor]:
    held = [] if free.directions is None else [free.directions.held]
    return held if free.least is None else [*held, free.least.basis]


def _least(free: NullBasis, r: int) -> NullSpace | None:
    if free.basis is None or free.k < r:
        return None
    values = free.eigenvalues[:r]
    return NullSpace(free.basis[:, :r].contiguous(), values, float(values.sum()))


# Rounding can leave a singular matrix with a sum a little below zero, hence the maxima above.
def _trace(C: Tensor) -> float:
    return float(C.diagonal().sum(dtype=torch.float64))

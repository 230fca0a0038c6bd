"""Experts that saw too few tokens for a null space of their own share that of all experts of their layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from ..covariances.covariances import Covariances, pooled, saw_few
from ..models.refusals import Target
from ..system.log import warn_once


def few_experts(linears: Mapping[str, Target], keys: Mapping[str, str], covariances: Covariances) -> set[str]:
    """Return the names of the experts, of those in ``keys``, whose own covariance is of too few tokens."""
    return {
        name
        for name, key in keys.items()
        if getattr(linears[name].linear, "is_routed", False) and saw_few(covariances.tokens[key], linears[name].d)
    }


def with_pooled(covariances: Covariances, keys: Mapping[str, str], few: set[str]) -> tuple[Covariances, dict[str, str]]:
    """Give the experts in ``few`` one covariance for each parameter, the sum over all experts.

    What no expert of a layer uses, this one does not use.

    Args:
        covariances: With one matrix for each expert.
        keys: Group key by name.
        few: Names of experts.

    Returns:
        The covariances, and the keys in them.
    """
    pools: dict[str, tuple[Sequence[str], Sequence[str]]] = {}
    changed = dict(keys)
    for parameter in sorted({name.rpartition(".")[0] for name in few}):
        own = {name: key for name, key in keys.items() if name.rpartition(".")[0] == parameter}
        members = [own[name] for name in own if name in few]
        pools[members[0]] = members, list(own.values())
        changed |= dict.fromkeys((name for name in own if name in few), members[0])
    if not few:
        return covariances, changed
    some = ", ".join(sorted(few)[:8]) + (", ..." if len(few) > 8 else "")
    message = (
        f"{len(few)} experts saw fewer than 2 tokens per feature, and start in the null space of "
        f"the sum over all experts of their layer: {some}."
    )
    warn_once(message, message)
    return pooled(covariances, pools), changed

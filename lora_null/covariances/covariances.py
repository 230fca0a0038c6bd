"""The activation covariances of a model: what calibration makes and initialisation reads."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ..models.arguments import PATH, takes
from ..system.files import parse_json
from .header import counts_by_key, names_by_key, strings_by_key
from .packed import DenseMatrices, PackedFile, PackedMatrices, PackedPools, PackedScaled, PackedSums, write_packed

_KIND = "lora_null.covariances"
_VERSION = 1
# Beyond a ratio of 2^24 the lighter text is lost in the rounding of float32, and far beyond it a sum overflows.
_WEIGHTS = 1e-6, 1e6


class Covariances:
    """Uncentred second moments ``C = sum_t x_t x_t^T`` of the inputs of a model's linear layers.

    Linear layers that read the same tensor (q, k and v of an attention block) form a group and share one
    matrix. A group's key is the name of its first member; every member's name finds the matrix.

    Args:
        matrices: Group key to ``C (d, d)``, symmetric, float32 or float64.
        groups: Group key to the names of all its members, in the order of the model, the key among them.
        tokens: Group key to the number of tokens summed.
        metadata: Where the numbers come from: model, data fingerprint, mask rule, ... Strings only.

    Raises:
        ValueError: The three mappings have different keys, a name is in two groups, a matrix is not square, or what
            cannot be kept in a file: a name or fact that is no string, a number of tokens that is none.
    """

    def __init__(
        self,
        matrices: Mapping[str, Tensor],
        groups: Mapping[str, Sequence[str]],
        tokens: Mapping[str, int],
        metadata: Mapping[str, str] | None = None,
    ):
        self.groups: dict[str, tuple[str, ...]] = {key: tuple(names) for key, names in groups.items()}
        self.tokens: dict[str, int] = counts_by_key({key: _whole(count) for key, count in tokens.items()})
        self.metadata: dict[str, str] = strings_by_key(dict(metadata or {}))
        names_by_key({key: list(names) for key, names in self.groups.items()})
        self._matrices = matrices if isinstance(matrices, PackedMatrices) else DenseMatrices(matrices)
        self._key_of = {name: key for key, names in self.groups.items() for name in names}
        if not set(matrices) == set(self.groups) == set(self.tokens):
            odd = sorted(set(matrices) ^ set(self.groups) | set(self.groups) ^ set(self.tokens))
            raise ValueError(f"matrices, groups and tokens must have the same keys; not in all three: {odd}.")
        if len(self._key_of) != sum(len(names) for names in self.groups.values()):
            raise ValueError("A module name is in more than one group; expected every name in exactly one.")
        for key, names in self.groups.items():
            if key not in names:
                raise ValueError(f"Group {key!r} has the members {names}; expected its key to be one of them.")

    def group_of(self, name: str) -> str:
        """Return the key of the group that the linear layer ``name`` belongs to."""
        if name not in self._key_of:
            known = ", ".join(list(self._key_of)[:3])
            raise KeyError(
                f"{name}: no covariance for this layer; there are {len(self._key_of)} layers ({known}, ...). "
                "Were they calibrated on another model, or with other target_modules?"
            )
        return self._key_of[name]

    def size(self, name: str) -> int:
        """Return ``d``, the number of input features of ``name``, without reading the matrix."""
        return self._matrices.sides[self.group_of(name)]

    def __getitem__(self, name: str) -> Tensor:
        return self._matrices[self.group_of(name)]

    def __contains__(self, name: object) -> bool:
        return name in self._key_of

    def __iter__(self) -> Iterator[str]:
        return iter(self.groups)

    def __len__(self) -> int:
        return len(self.groups)

    def __add__(self, other: Covariances) -> Covariances:
        """Return the covariances of both texts together; the matrices are added when they are asked for.

        After a task, those of its text on the merged model are added to what was kept before, and the next adapter
        leaves both alone.

        Raises:
            ValueError: They are of other layers, or of layers of other sizes.
        """
        if not isinstance(other, Covariances):
            return NotImplemented
        members = {frozenset(names): key for key, names in other.groups.items()}
        odd = {frozenset(names) for names in self.groups.values()} ^ set(members)
        sizes = [] if odd else [key for key, names in self.groups.items() if self.size(key) != other.size(names[0])]
        if odd or sizes:
            named = (
                f"{sizes[0]} has d={self.size(sizes[0])} and d={other.size(sizes[0])}" if sizes else sorted(min(odd))
            )
            raise ValueError(
                f"Covariances of other layers do not go together: {named}. Expected the same layers, grouped alike, of "
                "one model. Calibrate both on it, with the same target_modules and enough text to reach all layers."
            )
        names = {key: members[frozenset(group)] for key, group in self.groups.items()}
        tokens = {key: count + other.tokens[names[key]] for key, count in self.tokens.items()}
        facts = {name: _both(name, self.metadata, other.metadata) for name in {**self.metadata, **other.metadata}}
        return Covariances(PackedSums(self._matrices, other._matrices, names), self.groups, tokens, facts)

    def weighted(self, weight: float) -> Covariances:
        """Return the covariances of a text that counts ``weight`` times; numbers of tokens stay those that were read.

        Before they are added to those of another text, that is: a factor common to all changes no null space.

        Raises:
            ValueError: ``weight`` is no number from 1e-6 to 1e6. A difference of covariances is no covariance: what is
                taken away would leave directions with negative energy, which a null space would prefer to all others.
        """
        check_weight(weight)
        facts = {**self.metadata, "weight": f"{weight:g}"}
        return Covariances(PackedScaled(self._matrices, weight), self.groups, self.tokens, facts)

    def keys(self) -> list[str]:
        """Return the group keys, in the order of the model."""
        return list(self.groups)

    def items(self) -> Iterator[tuple[str, Tensor]]:
        """Iterate over ``(key, C)``, one per group; matrices of a file are read one at a time."""
        return ((key, self._matrices[key]) for key in self.groups)

    def __repr__(self) -> str:
        return (
            f"Covariances({len(self)} matrices for {len(self._key_of)} linear layers, "
            f"{max(self.tokens.values(), default=0)} tokens)"
        )

    @takes(path=PATH)
    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write one safetensors file, lower triangles only, atomically.

        Args:
            path: The file to write; missing folders are made.
            overwrite: Replace an existing file of covariances, and no other. An interrupted save leaves the old file
                whole either way.

        Raises:
            FileExistsError: The file exists, and ``overwrite`` is not set or it holds no covariances.
        """
        path = Path(path)
        check_target(path, overwrite)
        write_packed(
            path,
            self._matrices,
            {
                "kind": _KIND,
                "version": str(_VERSION),
                "groups": json.dumps(self.groups),
                "tokens": json.dumps(self.tokens),
                "provenance": json.dumps(self.metadata),
            },
        )

    @classmethod
    @takes(path=PATH)
    def load(cls, path: str | os.PathLike) -> Covariances:
        """Open a file of :meth:`save`. Matrices are mapped, and read when asked for.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is damaged, of another kind or of a newer version; the message says which.
        """
        file = PackedFile(Path(path), _KIND)
        if file.metadata.get("version") != str(_VERSION):
            raise ValueError(
                f"{path} has format version {file.metadata.get('version')}; this lora_null reads version "
                f"{_VERSION}. Upgrade lora_null or calibrate again."
            )
        try:
            groups = names_by_key(parse_json(file.metadata["groups"]))
            tokens = counts_by_key(parse_json(file.metadata["tokens"]))
            metadata = strings_by_key(parse_json(file.metadata["provenance"]))
            return cls(file, groups, tokens, metadata)
        except (KeyError, ValueError) as error:
            raise ValueError(f"{path} is damaged: its header is incomplete or contradicts itself ({error}).") from error


def saw_few(tokens: int, d: int) -> bool:
    """Tell whether a covariance is of so few tokens that its null space is largely arbitrary: fewer than ``2 d``."""
    return tokens < 2 * d


def check_weight(weight: Any) -> None:
    """Raise ValueError unless a text can count ``weight`` times."""
    least, most = _WEIGHTS
    if not isinstance(weight, int | float) or isinstance(weight, bool) or not least <= weight <= most:
        raise ValueError(
            f"weight is {weight!r}; expected a positive number, from {least:g} to {most:g}: how often a text counts. "
            "A text cannot be subtracted: directions would get negative energy, which a null space prefers to all "
            "others. Calibrate on the texts that shall count."
        )


def _both(name: str, first: Mapping[str, str], second: Mapping[str, str]) -> str:
    """Return a fact about two texts: the one that holds for both, or one after the other."""
    values = [facts[name] for facts in (first, second) if name in facts]
    if name == "without_tokens":
        return json.dumps(sorted({layer for value in values for layer in json.loads(value)}))
    return " + ".join(dict.fromkeys(part for value in values for part in value.split(" + ")))


def _whole(count: Any) -> Any:
    try:
        return int(count)
    except (OverflowError, TypeError, ValueError):
        return count  # which counts_by_key names


def pooled(covariances: Covariances, pools: Mapping[str, tuple[Sequence[str], Sequence[str]]]) -> Covariances:
    """Return covariances with some groups in one, whose matrix is a sum, made when it is asked for.

    Args:
        covariances: Of all groups.
        pools: Key of the new group, which is one of its own, to the keys of the groups that go into it and of those
            that are summed.
    """
    dropped = {key for key, (members, _) in pools.items() for key in members} - set(pools)
    groups = {key: names for key, names in covariances.groups.items() if key not in dropped}
    tokens = {key: covariances.tokens[key] for key in groups}
    for key, (members, summed) in pools.items():
        groups[key] = tuple(name for member in members for name in covariances.groups[member])
        tokens[key] = sum(covariances.tokens[part] for part in summed)
    sums = {key: summed for key, (_, summed) in pools.items()}
    return Covariances(PackedPools(covariances._matrices, sums, dropped), groups, tokens, covariances.metadata)


def check_target(path: Path, overwrite: bool) -> None:
    """Refuse a path to which covariances must not be written.

    Raises:
        FileExistsError: There is a file, and ``overwrite`` is not set or it is not one of covariances.
    """
    if not path.exists():
        return
    if not overwrite:
        raise FileExistsError(f"{path} exists; pass overwrite=True (--overwrite) to replace it, or another path.")
    try:
        PackedFile(path, _KIND)
    except (ValueError, OSError) as error:
        raise FileExistsError(
            f"{path} exists and is no covariance file, or a damaged one; overwriting replaces nothing else. Choose "
            "another path, or delete it yourself."
        ) from error

"""Which linear layers receive the same tensor: found by watching, not by names."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class TensorIdentity:
    """Recognises a tensor when it is passed again, without keeping its memory.

    Two tensors are the same if they have one storage, at one version, seen through one offset, shape and stride:
    a view made anew for each reader is recognised, a tensor overwritten in between is not. A weak reference to
    the storage pins its address, so that a later tensor cannot be taken for it, while its data are freed.
    """

    __slots__ = ("_compare_values", "_layout", "_storage")

    def __init__(self, x: Tensor, compare_values: bool = False):
        self._storage = StorageWeakRef(x.untyped_storage())
        self._compare_values = compare_values
        self._layout = self._describe(x)

    @property
    def address(self) -> int:
        """Identify the storage; no other storage has the same address while this object exists."""
        return self._storage.cdata

    def matches(self, x: Tensor) -> bool:
        """Tell whether ``x`` is the tensor this identity was taken from, unchanged."""
        return (
            x.untyped_storage()._cdata == self._storage.cdata
            and not self._storage.expired()
            and self._describe(x) == self._layout
        )

    def _describe(self, x: Tensor) -> tuple:
        version: float
        if not x.is_inference():
            version = x._version
        else:
            # Inference tensors count no versions: an in-place change between two readers shows in the values only.
            version = float(x.double().sum()) if self._compare_values else 0
        return version, x.storage_offset(), x.shape, x.stride()


@dataclass
class _Group:
    members: list[str]
    calls: int = 0
    identity: TensorIdentity | None = None


@dataclass
class SharedInputs:
    """Groups of linear layers that read the same tensor, grown as the layers are called.

    A layer joins a group at its first call, if it then receives the very tensor that the group's leader (its
    first member) received at *its* first call. From then on every call is checked: a member must receive what
    its leader has just received. So the sums of the leader's inputs are also the member's, exactly.

    Attributes:
        share: Off, every layer leads a group of its own.
    """

    share: bool = True
    groups: dict[str, _Group] = field(default_factory=dict)
    _key_of: dict[str, str] = field(default_factory=dict)
    _latest: dict[int, str] = field(default_factory=dict)
    _calls: dict[str, int] = field(default_factory=dict)

    def receive(self, name: str, x: Tensor) -> bool:
        """Note that the layer ``name`` is called with ``x``; True if it leads a group, so that ``x`` counts."""
        calls = self._calls[name] = self._calls.get(name, 0) + 1
        key = self._key_of.get(name) or self._assign(name, x, calls)
        group = self.groups[key]
        if name == key:
            if group.identity and self._latest.get(group.identity.address) == key:
                del self._latest[group.identity.address]
            # what the model overwrites in its first forward pass it overwrites in all
            group.calls, group.identity = calls, TensorIdentity(x, compare_values=calls == 1)
            self._latest[group.identity.address] = key
            return True
        if group.calls != calls or group.identity is None or not group.identity.matches(x):
            raise ValueError(
                f"{name} was grouped with {key}, because both received the same tensor at first, but its call "
                f"number {calls} has another input than {key}'s call number {group.calls}. The model routes its "
                "activations differently from batch to batch; pass share_inputs=False to give each layer a "
                "covariance of its own."
            )
        return False

    def _assign(self, name: str, x: Tensor, calls: int) -> str:
        key = self._latest.get(x.untyped_storage()._cdata) if self.share else None
        group = self.groups.get(key) if key else None
        if key and group and group.calls == calls and group.identity and group.identity.matches(x):
            group.members.append(name)
        else:
            key, self.groups[name] = name, _Group([name])
        self._key_of[name] = key
        return key

    def check(self) -> None:
        """Raise unless every member was called as often as its leader."""
        for key, group in self.groups.items():
            for name in group.members:
                if self._calls[name] != group.calls:
                    raise ValueError(
                        f"{name} was called {self._calls[name]} times, but {key}, with which it shares its input, "
                        f"{group.calls} times. Pass share_inputs=False to give each layer a covariance of its own."
                    )

    def restore(self, groups: Mapping[str, Sequence[str]], calls: Mapping[str, int]) -> None:
        """Continue where another process stopped."""
        for key, names in groups.items():
            self.groups[key] = _Group(list(names), calls[key])
            for name in names:
                self._key_of[name], self._calls[name] = key, calls[key]

    def members(self) -> dict[str, tuple[str, ...]]:
        """Return each group's key and members, in the order of the first calls."""
        return {key: tuple(group.members) for key, group in self.groups.items()}

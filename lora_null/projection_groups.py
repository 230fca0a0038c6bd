"""One projection for the layers that read the same tensor, while their ``lora_A`` is frozen.

Adapters of a sharing group (q, k and v; gate and up) start in one null space: their factors are ``A_i = M_i U`` with
one orthonormal ``U (r, d)`` and small ``M_i (r, r)``. So ``P = x U^T`` is computed once, each layer uses
``B_i M_i`` ``(m, r)`` on it, and the gradients of P are summed in rank-r space. The layers stay separate modules
with ordinary factors; the group only remembers, between their calls, the projection of the tensor last seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from threading import get_ident
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from . import ops
from ._logging import warn_once
from .ops._operation import is_observed
from .ops.dispatch import reason_against, requested_backend

if TYPE_CHECKING:
    from .layers import LoraNullLinear

# A row of A may lie outside the common row space by this many roundings of its dtype.
_ROUNDINGS = 8
# Frozen factors change when a model is moved or loaded. Where they change at every call, checking them costs more
# than sharing gains.
_MAX_REFRESHES = 16


@dataclass
class _Entry:
    """A projection waiting for the other layers of its group."""

    x: TensorWeakRef
    version: int
    circumstances: tuple
    projected: Tensor
    served: set[int] = field(default_factory=set)


class ProjectionGroup:
    """Computes ``P = x U^T`` at the first layer of the group that sees x and hands it to the others.

    P is reused only for the same, unchanged tensor object, under the same gradient mode, autocast state,
    saved-tensor hooks (so never across the border of a checkpointed block) and thread, and once per layer. It is
    dropped when the last layer has used it, when x is freed, or when another x comes along.

    A layer whose ``lora_A`` has become another parameter object computes its own projection: FSDP2 and offloading
    put a copy in its place for each forward, and what that holds cannot be told without reading it.

    Args:
        basis: ``U (r, d)`` with orthonormal rows.
        layers: The layers of the group.
    """

    def __init__(self, basis: Tensor, layers: Sequence[LoraNullLinear]):
        self.basis = basis
        self.size = len(layers)
        self.out_features = sum(layer.out_features for layer in layers)
        self._factors = [weakref.ref(layer.lora_A.weight) for layer in layers]
        self._forget()

    def _forget(self) -> None:
        self._entry: _Entry | None = None
        self._basis_on: dict[torch.device, Tensor] = {}
        self._mixings: weakref.WeakKeyDictionary[nn.Module, tuple] = weakref.WeakKeyDictionary()
        self._refreshes = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the basis, not what belongs to a forward pass."""
        factors = [factor for factor in (ref() for ref in self._factors) if factor is not None]
        return {"basis": self.basis, "size": self.size, "out_features": self.out_features, "_factors": factors}

    def leave(self, layer: LoraNullLinear) -> None:
        """Take note that ``layer`` is no longer one of the group."""
        self.size -= 1
        self.out_features -= layer.out_features

    def pays(self, x: Tensor) -> bool:
        """Say whether sharing saves more than folding costs: ``(n - 1) T d > r sum(m_i)``.

        Forward and backward, every layer but the first saves ``4 T d r`` FLOPs of projection, and every layer pays
        ``4 m r^2`` for ``B_i M_i`` and its gradient. Gate and up of a 1B LLaMA at r = 128 break even at 1024 tokens.
        """
        return x.numel() * (self.size - 1) > self.basis.shape[0] * self.out_features

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._factors = [weakref.ref(factor) for factor in state["_factors"]]
        self._forget()

    def forward(self, layer: LoraNullLinear, x: Tensor) -> Tensor | None:
        """Apply ``layer`` to ``x (..., d)`` through the shared projection; ``None`` if this call cannot share."""
        lora_A, lora_B = layer.lora_A.weight, layer.lora_B.weight
        if not self._may_share(layer, x, lora_A, lora_B):
            return None
        mixing = self._mixing(layer, lora_A)
        if mixing is None:
            return None
        folded_B = _product(lora_B.to(mixing.dtype), mixing)
        scaling, bias = layer.scaling, layer.bias
        entry, circumstances = self._entry, _circumstances(x)
        if (
            entry is not None
            and entry.x() is x
            and entry.version == x._version
            and entry.circumstances == circumstances
            and id(layer) not in entry.served
        ):
            entry.served.add(id(layer))
            if len(entry.served) >= self.size:
                self._entry = None
            return ops.lora_up_linear(x, layer.weight, entry.projected, folded_B, scaling=scaling, bias=bias)

        self._entry = None
        y, P = ops.lora_linear_and_projection(
            x, layer.weight, self._basis(x.device), folded_B, scaling=scaling, bias=bias
        )
        self._entry = _Entry(self._watch(x), x._version, circumstances, P, {id(layer)})
        return y

    def _may_share(self, layer: LoraNullLinear, x: Tensor, lora_A: Tensor, lora_B: Tensor) -> bool:
        return (
            type(lora_A) is nn.Parameter  # the replicas of nn.DataParallel hold plain tensors, made anew each time
            and not lora_A.requires_grad
            and any(ref() is lora_A for ref in self._factors)
            # a checkpointed block must do the same in its recomputation as it did at first
            and (self._refreshes < _MAX_REFRESHES or _saved_tensor_hooks() is not None)
            and self.pays(x)
            and not is_observed(x)
            and not x.is_inference()  # has no version, so that a change in place would go unnoticed
            and requested_backend() != "torch"
            and reason_against(x, layer.weight, lora_A, lora_B, layer.bias) is None
        )

    def _watch(self, x: Tensor) -> TensorWeakRef:
        group = weakref.ref(self)

        def drop(dead: weakref.ref) -> None:
            owner = group()
            if owner is not None and owner._entry is not None and owner._entry.x.ref is dead:
                owner._entry = None

        watched = TensorWeakRef(x)
        watched.ref = weakref.ref(x, drop)
        return watched

    def _basis(self, device: torch.device) -> Tensor:
        if device not in self._basis_on:
            self._basis_on[device] = self.basis.to(device)
        return self._basis_on[device]

    @torch.no_grad()
    def _mixing(self, layer: LoraNullLinear, lora_A: Tensor) -> Tensor | None:
        """Return ``M (r, r)`` with ``A = M U``, or ``None`` if A has left the common row space."""
        key = lora_A.data_ptr(), lora_A._version, lora_A.dtype, lora_A.device
        known = self._mixings.get(layer)
        if known is not None and known[0] == key:
            return known[1]
        self._refreshes += known is not None
        mixing = row_space_coordinates(lora_A, self._basis(lora_A.device))
        if mixing is None:
            warn_once(
                "left-projection-group",
                "A frozen lora_A no longer lies in the row space that its group shares, probably because other "
                "values were loaded into it. The layer computes its own projection from now on.",
            )
        self._mixings[layer] = key, mixing
        return mixing


def _product(lora_B: Tensor, mixing: Tensor) -> Tensor:
    """Multiply in the factors' own dtype: rounded to an autocast dtype here, B would be rounded twice."""
    if not torch.is_autocast_enabled(lora_B.device.type):
        return torch.mm(lora_B, mixing)
    with torch.autocast(lora_B.device.type, enabled=False):
        return torch.mm(lora_B, mixing)


def _circumstances(x: Tensor) -> tuple:
    """What has to be equal, besides x itself, for two calls to build the same piece of graph."""
    device = x.device.type
    autocast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
    hooks = _saved_tensor_hooks()
    return torch.is_grad_enabled(), x.requires_grad, autocast, hooks and weakref.ref(hooks[0]), get_ident()


def _saved_tensor_hooks() -> tuple | None:
    """Return the hooks of torch.utils.checkpoint and of activation offloading: no graph may cross their borders."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def row_space_coordinates(lora_A: Tensor, basis: Tensor) -> Tensor | None:
    """Return ``M = A U^T (r, r)`` in fp32 (fp64 for fp64) if every row of ``A (r, d)`` is one of ``M U`` to rounding.

    ``basis`` is ``U (r, d)`` with orthonormal rows. The comparison runs in fp64.
    """
    exact, U = lora_A.double(), basis.double()
    mixing = exact @ U.t()
    outside = (exact - mixing @ U).norm(dim=1)
    tolerance = _ROUNDINGS * max(torch.finfo(lora_A.dtype).eps, torch.finfo(basis.dtype).eps)
    if not bool((outside <= tolerance * exact.norm(dim=1)).all()):
        return None
    return mixing.to(torch.promote_types(lora_A.dtype, torch.float32))


def orthonormal_rows(lora_A: Tensor) -> Tensor:
    """Return ``U (r, d)`` in fp32 (fp64 for fp64) whose orthonormal rows span those of ``A (r, d)``.

    Rows are normalised first: those of a LoRA-Null factor are orthogonal, but of lengths ``sqrt(D_j)`` that may
    differ by orders of magnitude.
    """
    exact = lora_A.detach().double()
    exact = exact / exact.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    return torch.linalg.qr(exact.t())[0].t().to(torch.promote_types(lora_A.dtype, torch.float32)).contiguous()


def share_projections(model: nn.Module) -> int:
    """Let the adapted layers of ``model`` that can share a projection do so; return the number of groups.

    A group is made of the layers directly under one module whose frozen ``lora_A`` span the same rows. Whether they
    do read the same tensor is seen at every call, so that grouping too much costs nothing. Groups are no part of
    the state dict, of the parameters or of an exported adapter. Call it again after factors were replaced.
    """
    from .layers import adapter_layers

    parents: dict[str, list[LoraNullLinear]] = {}
    for name, layer in adapter_layers(model).items():
        layer.projection_group = None
        lora_A = layer.lora_A.weight
        if type(lora_A) is nn.Parameter and lora_A.ndim == 2 and lora_A.device.type != "meta":
            parents.setdefault(name.rpartition(".")[0], []).append(layer)
    return sum(_group(layers) for layers in parents.values())


def _group(layers: Iterable[LoraNullLinear]) -> int:
    waiting = [layer for layer in layers if not layer.lora_A.weight.requires_grad and not layer.shifted]
    groups = 0
    while waiting:
        first, *others = waiting
        shape = first.lora_A.weight.shape
        basis = orthonormal_rows(first.lora_A.weight)
        members: Sequence[LoraNullLinear] = [first] + [
            layer
            for layer in others
            if layer.lora_A.weight.shape == shape
            and row_space_coordinates(layer.lora_A.weight, basis.to(layer.lora_A.weight.device)) is not None
        ]
        if len(members) > 1:
            group = ProjectionGroup(basis, members)
            for layer in members:
                layer.projection_group = group
            groups += 1
        waiting = [layer for layer in waiting if not any(layer is member for member in members)]
    return groups

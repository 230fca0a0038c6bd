"""One projection for the layers that read the same tensor, while their ``lora_A`` is frozen.

Adapters of a sharing group (q, k and v; gate and up) start in one null space: their factors have the same rows up
to ``A_i = M_i A_1`` with small ``M_i (r, r)``. So ``P = x A_1^T`` is computed once, each layer uses ``B_i M_i``
``(m, r)`` on it, and the gradients of P are summed in rank-r space. The layers stay separate modules with ordinary
factors; the group only remembers, between their calls, the projection of the tensor last seen.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from threading import get_ident
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.weak import TensorWeakRef

from ..ops import linear
from ..ops.dispatch import reason_against
from ..ops.operation import autocast_dtype, is_observed
from ..system.log import warn_once

# A row of A may lie outside the common row space by this many roundings of its dtype, of fp32 at most. What bf16 has
# rounded off lies outside, where activations are larger than in a null space: taken from A_1 for every layer, it puts
# 100 times a layer's own error into its output if they are 100 times larger.
_ROUNDINGS = 8
# fp16 holds numbers from 2^-24 to 2^16. With entries of M beyond this, those of P that matter are too small for it, or
# those of B M too large: at 3000 the error is twice a layer's own, at 10000 the gradient of P overflows for a B of 1.
_MAX_MIXING_IN_FP16 = 1000.0
# Rows of A_1, made of equal length, may be this far from orthogonal, by their condition number: roundings of P grow by
# it. Those of a LoRA-Null factor are orthogonal, those of a random one of r = d / 16 have 1.7.
_MAX_CONDITION = 4.0
# On a GPU, sharing saves a pass over x in the forward and one over dx in the backward, and adds three small GEMMs with
# their casts. By bandwidth and launch times of an H100 the two meet near this many elements of x; not measured.
# Without products worth the name (2-core EPYC) three layers that share take 0.77 of the time of PEFT's, three that do
# not 0.55.
_MIN_ELEMENTS_ON_GPU = 2**24
# Frozen factors change when a model is moved or loaded. Where they change at every call, checking them costs more
# than sharing gains.
_MAX_REFRESHES = 16


class AdaptedLinear(Protocol):
    """What a group needs of a layer; :class:`lora_null.LoraNullLinear` is one."""

    lora_A: Any
    scaling: float
    out_features: int


@dataclass
class _Entry:
    """A projection waiting for the other layers of its group."""

    x: TensorWeakRef
    version: int
    circumstances: tuple
    projected: Tensor
    served: set[int] = field(default_factory=set)


class ProjectionGroup:
    """Computes ``P = x A_1^T`` at the first layer of the group that sees x and hands it to the others.

    P is reused only for the same, unchanged tensor object, under the same gradient mode, autocast state,
    saved-tensor hooks (so never across the border of a checkpointed block) and thread, and once per layer. It is
    dropped when the last layer has used it, when x is freed, when another x comes along, or when a backward has gone
    through it. Where x requires a gradient, outputs made of one P belong to one graph: separate backwards through
    them need ``retain_graph=True``.

    Factors may change between calls in every way that torch counts, which writing into their ``.data`` is not: call
    :func:`share_projections` again after that.

    A layer whose ``lora_A`` has become another parameter object computes its own projection: FSDP2 and offloading
    put a copy in its place for each forward, and what that holds cannot be told without reading it.

    Args:
        layers: The layers of the group; ``A_1`` is the factor of the first.
    """

    def __init__(self, layers: Sequence[AdaptedLinear]):
        self.size = len(layers)
        self._folded_features = sum(layer.out_features for layer in layers[1:])
        self._factors: list[Callable[[], Tensor | None]] = [weakref.ref(layer.lora_A.weight) for layer in layers]
        self._forget()

    def _forget(self) -> None:
        self._entry: _Entry | None = None
        self._mixings: weakref.WeakKeyDictionary[AdaptedLinear, tuple] = weakref.WeakKeyDictionary()
        self._refreshes = 0

    def __getstate__(self) -> dict[str, Any]:
        """Copies and pickles carry the factors, not what belongs to a forward pass."""
        return self.__dict__ | {"_factors": [ref() for ref in self._factors], "_entry": None, "_mixings": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._factors = [_gone if factor is None else weakref.ref(factor) for factor in state["_factors"]]
        self._forget()

    def leave(self, layer: AdaptedLinear) -> None:
        """Take note that ``layer`` is no longer one of the group."""
        self.size -= 1
        if layer.lora_A.weight is not self._factors[0]():
            self._folded_features -= layer.out_features

    def pays(self, x: Tensor) -> bool:
        """Say whether sharing saves more than folding costs: ``2 (n - 1) T d > 3 r sum(m_i)``, without ``m_1``.

        Every layer but the first saves ``4 T d r`` FLOPs of projection and its gradient, and pays ``6 m r^2``: for
        ``B_i M_i``, once more in the backward, and for its gradient. Gate and up of a 1B LLaMA at r = 128 break
        even at 768 tokens.
        """
        if not x.is_cpu and x.numel() < _MIN_ELEMENTS_ON_GPU:
            return False
        first = self._factors[0]()
        return first is not None and 2 * x.numel() * (self.size - 1) > 3 * first.shape[0] * self._folded_features

    def forward(
        self, layer: AdaptedLinear, x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, bias: Tensor | None
    ) -> Tensor | None:
        """Apply ``layer``, which holds the tensors given, to ``x (..., d)`` through the shared projection.

        ``None`` if this call cannot share.
        """
        if is_observed(x):
            # Before anything else: a condition on sizes would bind a graph of dynamic shapes to those that fulfil it.
            return None
        first = self._factors[0]()
        if first is None or not self._may_share(x, first, lora_A):
            return None
        mixing, state = None, _state(first)
        if lora_A is not first:
            key = _state(lora_A), state
            known = self._mixings.get(layer)
            if known is None or known[0] != key:
                if reason_against(x, weight, first, lora_A, lora_B, bias) is not None:
                    return None
                self._refreshes += known is not None
                known = self._mixings[layer] = self._mixing_anew(lora_A, first, key)
            _, mixing, largest, _ = known
            if mixing is None or (largest > _MAX_MIXING_IN_FP16 and _computes_in_fp16(x)):
                return None
        entry, circumstances = self._entry, (*_circumstances(x), state)
        if (
            entry is not None
            and entry.x() is x
            and entry.version == x._version
            and entry.circumstances == circumstances
            and id(layer) not in entry.served
        ):
            name, P = "lora_up_linear", entry.projected
            y = linear.call(name, x, weight, P, lora_B, bias, mixing, layer.scaling, may_refuse=True)
            if y is not None:
                entry.served.add(id(layer))
                if len(entry.served) >= self.size:
                    self._entry = None
            return y

        self._entry = None
        name = "lora_linear_and_projection"
        both = linear.call(name, x, weight, first, lora_B, bias, mixing, layer.scaling, may_refuse=True)
        if both is None:
            return None
        y, P = both
        self._entry = _Entry(self._watch(x), x._version, circumstances, P, {id(layer)})
        if P.grad_fn is not None:
            # a backward frees the graph that a layer called after it would need
            P.grad_fn.register_prehook(partial(_drop_entry, weakref.ref(self)))
        return y

    def _may_share(self, x: Tensor, first: Tensor, lora_A: Tensor) -> bool:
        return (
            self.pays(x)
            and type(lora_A) is nn.Parameter  # the replicas of nn.DataParallel hold plain tensors, made anew each time
            and not (lora_A.requires_grad or first.requires_grad)
            and any(ref() is lora_A for ref in self._factors)
            and first.ndim == 2  # ZeRO-3 takes a factor away when its own layer has run
            # a checkpointed block must do the same in its recomputation as it did at first
            and (self._refreshes < _MAX_REFRESHES or _saved_tensor_hooks() is not None)
            and not x.is_inference()  # has no version, so that a change in place would go unnoticed
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

    @torch.no_grad()
    def _mixing_anew(self, lora_A: Tensor, first: Tensor, key: tuple) -> tuple[tuple, Tensor | None, float, list]:
        """Return ``key``, M ``(r, r)`` with ``A = M A_1``, its largest entry, and what keeps the key from coming again.

        M is ``None`` if A left the common row space.
        """
        mixing = row_space_coordinates(lora_A, first)
        if mixing is None:
            warn_once(
                "left-projection-group",
                "Frozen lora_A of a group no longer have the row space that they shared, probably because other "
                "values were loaded into them. Their layers compute their own projections from now on.",
            )
        # while they are watched, no other storage gets the identity of these
        watched = [StorageWeakRef(factor.untyped_storage()) for factor in (lora_A, first)]
        largest = 0.0 if mixing is None else float(mixing.abs().max())
        return key, mixing, largest, watched


def _state(factor: Tensor) -> tuple:
    """Return what differs if ``factor`` holds other values; its address alone may be that of one freed."""
    storage = factor.untyped_storage()
    return storage._cdata, factor.data_ptr(), factor._version, factor.dtype, factor.device


def _drop_entry(group: weakref.ref[ProjectionGroup], *_: Any) -> None:
    owner = group()
    if owner is not None:
        owner._entry = None


def _gone() -> None:
    """Stand for a weak reference to what was gone when a group was copied."""


def _circumstances(x: Tensor) -> tuple:
    """What has to be equal, besides x itself, for two calls to build the same piece of graph."""
    autocast, hooks = autocast_dtype(x.device.type), _saved_tensor_hooks()
    return torch.is_grad_enabled(), x.requires_grad, autocast, hooks and weakref.ref(hooks[0]), get_ident()


def _computes_in_fp16(x: Tensor) -> bool:
    return (autocast_dtype(x.device.type) or x.dtype) is torch.float16


def _saved_tensor_hooks() -> tuple | None:
    """Return the hooks of torch.utils.checkpoint and of activation offloading: no graph may cross their borders."""
    return torch._C._autograd._top_saved_tensors_default_hooks(False)


def row_space_coordinates(lora_A: Tensor, first: Tensor) -> Tensor | None:
    """Return ``M (r, r)`` in fp32 (fp64 for fp64) with ``A = M A_1`` to rounding, or ``None`` if there is none.

    None either if the rows of ``A_1 (r, d)`` are too near to dependent ones. Computed in fp64, on rows of A_1 made of
    equal length: those of a LoRA-Null factor are orthogonal, but of lengths ``sqrt(D_j)`` that may differ by orders
    of magnitude.
    """
    exact, rows = lora_A.double(), first.double()
    lengths = rows.norm(dim=1, keepdim=True).clamp_min(torch.finfo(torch.float64).tiny)
    rows = rows / lengths
    # The Gram matrix squares a condition number that is at most 4 where it matters.
    gram = rows @ rows.t()
    spectrum = torch.linalg.eigvalsh(gram)
    # Zero rows, as of a zero weight, have no coordinates.
    if not bool(spectrum[0] * _MAX_CONDITION**2 >= spectrum[-1] > 0):
        return None
    mixing = torch.linalg.solve(gram, exact @ rows.t(), left=False)
    outside = (exact - mixing @ rows).norm(dim=1)
    eps = max(torch.finfo(lora_A.dtype).eps, torch.finfo(first.dtype).eps)
    tolerance = _ROUNDINGS * min(eps, torch.finfo(torch.float32).eps)
    if not bool((outside <= tolerance * exact.norm(dim=1)).all()):
        return None
    mixing = (mixing / lengths.t()).to(torch.promote_types(lora_A.dtype, torch.float32))
    return mixing if bool(mixing.isfinite().all()) else None

"""A linear layer with a low-rank adapter, made from an existing ``nn.Linear`` in place."""

from __future__ import annotations

import copyreg
import types
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, cast

from torch import Tensor, nn

from .. import ops
from ..models.layout import is_transposed, shape_of
from ..models.quantised import allow_gradients, is_dense_matrix
from ..models.refusals import Target
from ..models.wrappers import STATE
from .basis import BasisFactor
from .delta import shift_base, stack
from .projection import ProjectionGroup


class LowRankFactor(nn.Module):
    """One factor of an adapter, held as ``weight``.

    A module of its own rather than a bare parameter: the names in a state dict are then PEFT's
    (``lora_A.weight``), and hooks that move, gather or offload the base layer's own parameters leave it alone.
    """

    def __init__(self, weight: Tensor, trainable: bool):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trainable)

    def extra_repr(self) -> str:
        """Show the shape, as torch's layers do."""
        return f"{tuple(self.weight.shape)}, trainable={self.weight.requires_grad}"


class LoraNullLinear(nn.Linear):
    """``y = x W^T + bias + s (x A^T) B^T`` with ``W (m, d)``, ``A (r, d)``, ``B (m, r)``.

    Instances are made by :func:`attach_adapter`, which changes the class of an existing layer: parameters,
    hooks, state-dict names and every reference to the module stay as they are. Without ``initial_A`` and
    ``initial_B`` the base weight is the pre-trained one. With them it is ``W - s B0 A0``, and
    ``low_rank_delta`` is measured from them.

    Attributes:
        lora_A: Down-projection factor; its ``weight`` is ``(r, d)``, and no parameter where A learns within the free
            directions.
        lora_B: Up-projection factor; its ``weight`` is ``(m, r)``.
        initial_A: ``A0`` where the base is shifted, else ``None``.
        initial_B: ``B0`` where the base is shifted, else ``None``.
        scaling: The factor ``s``; one that is set by hand leaves the base shifted by the one attached.
        lora_dropout: Dropout probability on the adapter's input while training.
        adapter_enabled: ``False`` gives the pre-trained layer, on a shifted base too.
        projection_group: The layers that share one projection of their common input, from
            :func:`lora_null.adapters.sharing.share_projections`.
    """

    lora_A: LowRankFactor | BasisFactor
    lora_B: LowRankFactor
    initial_A: LowRankFactor | None
    initial_B: LowRankFactor | None
    scaling: float
    # The scaling that the adapter was attached with, which configurations and so checkpoints state.
    stated_scaling: float
    lora_dropout: float
    adapter_enabled: bool
    projection_group: ProjectionGroup | None = None

    @property
    def r(self) -> int:
        """Rank of the adapter."""
        return self.lora_A.weight.shape[0]

    @property
    def shifted(self) -> bool:
        """Whether the base weight is ``W - s B0 A0`` instead of the pre-trained ``W``."""
        return self.initial_A is not None

    def forward(self, x: Tensor) -> Tensor:
        """Map ``x (..., d)`` to ``(..., m)``."""
        enabled, base = self.adapter_enabled, _base_class(type(self))
        down = _registered(self, "_modules", "lora_A" if enabled else "initial_A")
        up = _registered(self, "_modules", "lora_B" if enabled else "initial_B")
        if down is None or up is None:
            return base.forward(self, x)
        scaling = self.scaling if enabled else self.stated_scaling
        lora_A, lora_B = _registered(down, "_parameters", "weight"), _registered(up, "_parameters", "weight")
        dropout = self.lora_dropout if self.training and enabled else 0.0
        weight: Any = _registered(self, "_parameters", "weight") if base is nn.Linear else None
        if is_dense_matrix(weight, (self.out_features, self.in_features)):
            bias = _registered(self, "_parameters", "bias")
            if self.projection_group is not None and enabled and not dropout:
                y = self.projection_group.forward(self, x, weight, lora_A, lora_B, bias)
                if y is not None:
                    return y
            return ops.lora_linear(x, weight, lora_A, lora_B, scaling=scaling, bias=bias, dropout=dropout)
        # A quantised or otherwise special base keeps its own product; only the low-rank term is ours.
        adapted = nn.functional.dropout(x, dropout) if dropout else x
        low_rank = (adapted @ lora_A.to(x.dtype).T) @ lora_B.to(x.dtype).T
        return base.forward(self, x) + scaling * low_rank

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """Refuse what ``parallelize_module`` tries: to register the factors' parameters as the layer's own."""
        if "." in name:
            raise ValueError(
                f"{name} belongs to a module inside this layer, so that parallelize_module cannot distribute it. "
                "Leave adapted layers out of its plan, or place weight, lora_A.weight and lora_B.weight by hand with "
                "distribute_tensor."
            )
        super().register_parameter(name, param)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """Refuse a scaling set by hand: few files hold it, and it would be read under the one attached."""
        _require_stated_scaling(self, prefix)
        super()._save_to_state_dict(destination, prefix, keep_vars)
        # Where torch keeps versions: no file of safetensors has it, what torch.save writes does.
        if metadata := getattr(destination, "_metadata", None):
            metadata[prefix[:-1]][SAVED_SCALING] = self.scaling

    def _load_from_state_dict(self, state_dict: dict, prefix: str, local_metadata: dict, *rest: Any) -> None:
        """Bring ``B`` of a run with another scaling to this one, where the state dict knows it."""
        factor = local_metadata.get(SAVED_SCALING, self.stated_scaling) / self.stated_scaling
        for name in ("lora_B", "initial_B") if factor != 1 else ():
            if (key := f"{prefix}{name}.weight") in state_dict:
                state_dict[key] = factor * state_dict[key]
        super()._load_from_state_dict(state_dict, prefix, local_metadata, *rest)

    def low_rank_delta(self) -> tuple[Tensor, Tensor]:
        """Return fp32 ``(A, B)`` with ``B A`` the change of the pre-trained weight; see ``delta.stack``."""
        lora_A: Tensor = self.lora_A.weight
        lora_B: Tensor = self.lora_B.weight
        if self.initial_A is None or self.initial_B is None:
            return stack(lora_A, lora_B, self.scaling, None)
        # Set by hand, the scaling is that of B A alone.
        lora_B = lora_B if self.scaling == self.stated_scaling else lora_B * (self.scaling / self.stated_scaling)
        return stack(lora_A, lora_B, self.stated_scaling, (self.initial_A.weight, self.initial_B.weight))

    def __reduce_ex__(self, protocol: Any) -> Any:
        """Copies and pickles name the class that was adapted: the adapted class is made on demand."""
        make, arguments, *rest = cast(tuple, super().__reduce_ex__(protocol))
        if make is copyreg.__newobj__ and type(self) is not LoraNullLinear:  # type: ignore[attr-defined]
            make, arguments = _new_adapted, (_base_class(type(self)),)
        return make, arguments, *rest

    def extra_repr(self) -> str:
        """Add the adapter's figures to torch's line."""
        return f"{super().extra_repr()}, r={self.r}, scaling={self.scaling:g}, shifted={self.shifted}"


# In what torch keeps of a state dict besides its tensors: the scaling that they were trained with.
SAVED_SCALING = "lora_null_scaling"
# Adapted class by the class it adapts; made on demand for quantised and other special linears.
_PATCHED: dict[type, type[LoraNullLinear]] = {nn.Linear: LoraNullLinear}


def _registered(module: nn.Module, kind: str, name: str) -> Any:
    """Return ``getattr(module, name)`` in a third of the time: modules and parameters are where Python looks last."""
    held = module.__dict__[kind]
    return held[name] if name in held else getattr(module, name)


def _require_stated_scaling(layer: LoraNullLinear, prefix: str) -> None:
    if layer.scaling != layer.stated_scaling:
        raise ValueError(
            f"{prefix.removesuffix('.')}: scaling is {layer.scaling:g}, set by hand, where the adapter was attached "
            f"with {layer.stated_scaling:g}; expected the same, for a state dict, and so a trainer's checkpoint, "
            "holds no scaling. Write it with lora_null.save_adapter, which keeps it, or train with "
            "LoraNullConfig(lora_alpha=..., alpha_pattern=...)."
        )


def _whole_state_dict(self: Any, *args: Any, **kwargs: Any) -> dict[str, Any]:
    """Add the factors to the state dict of a layer that, as HQQ's do, writes its own tensors and no module inside."""
    prefix = kwargs.get("prefix", "")
    _require_stated_scaling(self, prefix)
    own = super(LoraNullLinear, self).state_dict(*args, **kwargs)
    held = own if kwargs.get("destination") is None else kwargs["destination"]
    for name, child in self._modules.items():
        if child is not None:
            child.state_dict(destination=held, prefix=f"{prefix}{name}.", keep_vars=kwargs.get("keep_vars", False))
    return own


def _outputs(self: Any) -> int:
    return shape_of(self)[0]


def _inputs(self: Any) -> int:
    return shape_of(self)[1]


def _patched_class(base: type[nn.Linear]) -> type[LoraNullLinear]:
    if base not in _PATCHED:
        members: dict[str, Any] = {}
        if base.state_dict is not nn.Module.state_dict:
            members["state_dict"] = _whole_state_dict
        if is_transposed(base.__new__(base)):
            # It is an nn.Linear now, and says its sizes as those do.
            members |= {"out_features": property(_outputs), "in_features": property(_inputs)}
            members["__repr__"] = nn.Module.__repr__
        patched = type(f"LoraNull{base.__name__}", (LoraNullLinear, base), members)
        try:
            base.__new__(base).__class__ = patched
        except TypeError as error:
            raise ValueError(
                f"{base.__module__}.{base.__name__} cannot be adapted in place ({error}). Attach adapters with "
                "peft.get_peft_model and use lora_null.peft.initialize_lora_null_weights, or leave such layers out "
                "through target_modules."
            ) from None
        _PATCHED[base] = patched
    return _PATCHED[base]


def require_adaptable(targets: Mapping[str, Target]) -> None:
    """Refuse layers that :func:`attach_adapter` could not change in place, before it changes any."""
    for target in targets.values():
        target.require_plain("An adapter")
    for base in {type(target.linear) for target in targets.values()}:
        _patched_class(base)


def _new_adapted(base: type[nn.Linear]) -> LoraNullLinear:
    patched = _patched_class(base)
    return patched.__new__(patched)


def _base_class(patched: type[LoraNullLinear]) -> type[nn.Linear]:
    return nn.Linear if patched is LoraNullLinear else patched.__bases__[1]


def _set_class(layer: Any, new: Any) -> None:
    layer.__class__ = new
    if "_old_forward" in layer.__dict__:
        # accelerate keeps the bound forward of the class that it hooked.
        layer._old_forward = types.MethodType(new.forward, layer)


def attach_adapter(
    linear: nn.Linear,
    lora_A: Tensor | BasisFactor,  # (r, d)
    lora_B: Tensor,  # (m, r)
    *,
    scaling: float = 1.0,
    train_a: bool = False,
    lora_dropout: float = 0.0,
    initial: tuple[Tensor, Tensor] | None = None,  # A0 (r, d), B0 (m, r)
) -> LoraNullLinear:
    """Turn ``linear`` into a :class:`LoraNullLinear` in place; its own parameters stop being trained.

    With ``initial`` the base weight is shifted by them, to ``W - s B0 A0``.
    """
    if isinstance(linear, LoraNullLinear):
        raise ValueError(
            "The layer carries a lora_null adapter already. Merge it first (lora_null.merge), or start from a "
            "freshly loaded model."
        )
    shape = (lora_A if isinstance(lora_A, Tensor) else lora_A.weight).shape
    m, d = shape_of(linear)
    if (tuple(shape), tuple(lora_B.shape)) != ((shape[0], d), (m, shape[0])):
        raise ValueError(
            f"Factors of shape {tuple(shape)} and {tuple(lora_B.shape)} do not fit a linear layer of {d} inputs and "
            f"{m} outputs: expected (r, d) and (m, r)."
        )
    for parameter in linear.parameters():
        parameter.requires_grad_(False)
    allow_gradients([linear])
    if initial is not None:
        shift_base(linear, *initial, -scaling)
    _set_class(linear, _patched_class(type(linear)))
    layer = cast(LoraNullLinear, linear)
    layer.lora_A = LowRankFactor(lora_A, trainable=train_a) if isinstance(lora_A, Tensor) else lora_A
    layer.lora_B = LowRankFactor(lora_B, trainable=True)
    layer.initial_A = None if initial is None else LowRankFactor(initial[0], trainable=False)
    layer.initial_B = None if initial is None else LowRankFactor(initial[1], trainable=False)
    layer.scaling = layer.stated_scaling = float(scaling)
    layer.lora_dropout = float(lora_dropout)
    layer.adapter_enabled = True
    return layer


def detach_adapter(layer: LoraNullLinear) -> nn.Linear:
    """Turn the layer back into the class it was made from, without touching its weight."""
    if layer.projection_group is not None:
        layer.projection_group.leave(layer)
    for name in ("lora_A", "lora_B", "initial_A", "initial_B"):
        delattr(layer, name)
    for name in ("scaling", "stated_scaling", "lora_dropout", "adapter_enabled", "projection_group"):
        layer.__dict__.pop(name, None)
    _set_class(layer, _base_class(type(layer)))
    return layer


def adapter_layers(model: nn.Module) -> dict[str, LoraNullLinear]:
    """Return the adapted layers by module name, in the model's own order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraNullLinear)}


@contextmanager
def disable_adapters(model: nn.Module) -> Iterator[None]:
    """Run the pre-trained model for the length of the block, ``modules_to_save`` with their former values too."""
    layers = adapter_layers(model).values()
    before = [layer.adapter_enabled for layer in layers]
    swapped = []
    try:
        for layer in layers:
            layer.adapter_enabled = False
        for tensor, original in _originals(model):
            swapped.append((tensor, tensor.data))
            tensor.data = original.to(tensor.device, tensor.dtype)
        yield
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.adapter_enabled = enabled
        for tensor, trained in swapped:
            tensor.data = trained


def _originals(model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield what trained whole, each tensor once, with the values that it had before."""
    seen: set[int] = set()
    for module in model.modules():
        state = module.__dict__.get(STATE)
        for name, original in getattr(state, "originals", {}).items():
            owner, _, part = name.rpartition(".")
            tensor = getattr(module.get_submodule(owner), part)
            if id(tensor) not in seen:
                seen.add(id(tensor))
                yield tensor, original


def require_layers(model: nn.Module) -> dict[str, LoraNullLinear]:
    """Return the adapted layers by module name; ValueError where there are none."""
    layers = adapter_layers(model)
    if not layers:
        raise ValueError(
            f"{type(model).__name__} carries no lora_null adapter. Expected a model returned by lora_null.initialize "
            "or lora_null.load_adapter; for a PeftModel use lora_null.peft."
        )
    return layers


def refuse_adapted(linears: Mapping[str, Target]) -> None:
    """Refuse a model, given by its linear layers, that carries adapters of ours already."""
    adapted = [name for name, target in linears.items() if isinstance(target.linear, LoraNullLinear)]
    if adapted:
        raise ValueError(
            f"The model carries {len(adapted)} lora_null adapters already, for instance on {adapted[0]}. Merge them "
            "first (lora_null.merge), or start from a freshly loaded model."
        )

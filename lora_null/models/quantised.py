"""Weights that other libraries keep quantised, in a module of their own or as a tensor subclass."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..system.log import warn_once
from ..system.tensors import PLAIN_TENSORS
from .layout import is_transposed, shape_of

# The attribute of bitsandbytes' Linear4bit that lets its forward repack the weight.
_REPACKS = "support_avx512bf16_for_cpu"


def is_dense(linear: nn.Linear) -> bool:
    """Tell whether the weight is a floating-point matrix of torch's own, whole or sharded (``DTensor``)."""
    m, d = shape_of(linear)
    return is_dense_matrix(getattr(linear, "weight", None), (d, m) if is_transposed(linear) else (m, d))


def is_dense_matrix(weight: Any, shape: tuple[int, int]) -> bool:
    """Tell the same of the weight of a layer that would hold one of ``shape``."""
    known = type(weight) in PLAIN_TENSORS or hasattr(weight, "full_tensor")
    return known and weight.is_floating_point() and weight.shape == shape


@torch.no_grad()
def dequantised(linear: nn.Linear) -> Tensor:
    """Return the weight ``(m, d)`` that a quantised layer multiplies by, in floating point.

    Raises:
        ValueError: Nobody knows how to.
    """
    from peft.utils import integrations

    shape = (linear.out_features, linear.in_features)
    if not hasattr(linear, "weight"):
        own: Any = linear
        return own.dequantize().detach()
    weight: Any = linear.weight
    if integrations.get_bnb_param_type(weight):
        allow_gradients([linear])
        # dequantize_module_weight would give an 8-bit layer on a CPU a new weight without its scales.
        dense = integrations.dequantize_bnb_weight(weight, getattr(linear, "state", None))
    elif type(weight).dequantize is not Tensor.dequantize:
        dense = weight.dequantize()
    else:
        dense = integrations.dequantize_module_weight(linear)
    if type(dense) not in PLAIN_TENSORS or not dense.is_floating_point() or dense.shape != shape:
        raise ValueError(
            f"The weight of this {type(linear).__name__} is a {type(weight).__name__} of {weight.dtype} and shape "
            f"{tuple(weight.shape)}, which could not be dequantised to {shape}. bitsandbytes, torchao and "
            "optimum-quanto are known; leave the layer out through target_modules, or load the model in floating point."
        )
    return dense.detach()


def allow_gradients(modules: Iterable[nn.Module]) -> None:
    """Give 4-bit layers of bitsandbytes the layout back that they can be trained and dequantised in, and keep it.

    On CPUs with AVX512-BF16 a forward in eval mode repacks the weight for a product without a backward. It stays
    so: in training, the gradient would silently stop at the layer.
    """
    for module in modules:
        if not hasattr(module, _REPACKS):
            continue
        weight: Any = module.weight
        state = getattr(weight, "quant_state", None)
        if getattr(state, "packing_format_for_cpu", False):
            from bitsandbytes import functional

            weight.data, state = functional._convert_weight_packed_for_cpu_inverse(weight.data, state)
            if state.absmax.ndim == 2:  # without double quantisation, 0.50 leaves the scales as they were packed
                state.absmax = state.absmax.t().reshape(-1).float()
            weight.quant_state = state
        setattr(module, _REPACKS, False)


def warn_of_trainer(model: nn.Module) -> None:
    """Say that transformers' trainers take a quantised model only with adapters that PEFT has put into it."""
    if getattr(model, "is_quantized", False):
        warn_once(
            "quantised-trainer",
            "The base is quantised: transformers.Trainer, and what is made of it, refuses it, for it looks for "
            "adapters of PEFT. To train with that, use peft.get_peft_model and "
            "lora_null.peft.initialize_lora_null_weights, or lora_null.peft.load_trainable; a loop of your own and "
            "other trainers take this model.",
        )


@contextmanager
def layout_kept(model: nn.Module) -> Iterator[None]:
    """Keep 4-bit layers of bitsandbytes from repacking their weights, see :func:`allow_gradients`, in the block."""
    repacking = [module for module in model.modules() if getattr(module, _REPACKS, False)]
    try:
        for module in repacking:
            setattr(module, _REPACKS, False)
        yield
    finally:
        for module in repacking:
            setattr(module, _REPACKS, True)

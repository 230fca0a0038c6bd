"""Several samples of the factors in one forward.

Only a layer whose input is the same for all samples can share its base product: the first adapted one. Behind it
samples differ, and a network has to be run on each. :func:`folded` therefore folds the samples into the batch, as
``(S B, ...)``, so that they run as one batch through weights that are read once; each sample has its own low-rank
term, a batched product of rank r. :func:`on_shared_input` is the other case, one layer by itself.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn.attention import SDPBackend, sdpa_kernel

from .layers import AdaptedLayer

# By layer and factor: deviations of S samples, (S, r, d) for lora_A and (S, m, r) for lora_B.
Deviations = Mapping[str, Mapping[str, Tensor]]


def on_shared_input(layer: AdaptedLayer, x: Tensor, deviations: Mapping[str, Tensor]) -> Tensor:
    """Apply one layer with S sampled pairs of factors to one ``x (..., d)``; return ``(S, ..., m)``.

    The layer itself, base and mean adapter, is computed once. The S deviations of A are one matrix of rank ``S r``,
    so that x is read twice in all; one product then adds what each sample changes to a copy of the output. At r = 8 and
    S = 4 that is meant to cost at most 1.15 times a plain forward, which a claim of the benchmarks measures.
    """
    y = layer.module(x)
    found = _with_change(layer, x.reshape(-1, x.shape[-1]), y.reshape(-1, y.shape[-1]), deviations)
    return found.view(-1, *y.shape)


@contextmanager
def folded(layers: Mapping[str, AdaptedLayer], deviations: Deviations, rows: tuple[int, ...]) -> Iterator[None]:
    """Let every layer treat its input as S samples of a batch, one after the other, for the length of the block.

    Args:
        layers: By name.
        deviations: Of the same names.
        rows: ``(S, B)``, or ``(S, B, L)`` where the model reads tokens; what an input's first axes must amount to.
    """
    with ExitStack() as stack:
        for name, parts in deviations.items():
            hook = partial(_add, name, layers[name], parts, rows)
            stack.callback(layers[name].module.register_forward_hook(hook).remove)
        yield


@contextmanager
def linearised(layers: Mapping[str, AdaptedLayer], deviations: Mapping[str, Mapping[str, Tensor]]) -> Iterator[None]:
    """Let outputs carry, as forward-mode tangents, what one deviation changes them by to first order.

    A layer is affine in its input, so it is called again on the input's tangent, less what it makes of zeros: layers
    that have no forward-mode derivative of their own, quantised or fused, need none.

    Args:
        layers: By name.
        deviations: Of the same names: ``(r, d)`` for lora_A, ``(m, r)`` for lora_B.
    """
    with ExitStack() as stack:
        if torch.is_inference_mode_enabled():
            # There torch would drop all tangents without a word.
            stack.enter_context(torch.inference_mode(False))
            stack.enter_context(torch.no_grad())
        stack.enter_context(forward_ad.dual_level())
        # The fused attentions have no forward-mode derivative.
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        for name, parts in deviations.items():
            module: Any = layers[name].module
            # Not a hook: the layer's own forward must not see a tangent.
            stack.callback(_set_forward, module, module.__dict__.get("forward"))
            module.forward = partial(_with_tangent, layers[name], module.forward, parts)
        yield


def repeated(inputs: Mapping[str, Any], samples: int, batch: int) -> dict[str, Any]:
    """Repeat every tensor whose first axis is the batch, as a whole, ``samples`` times."""
    return {
        key: value.repeat(samples, *[1] * (value.ndim - 1))
        if isinstance(value, Tensor) and value.ndim and value.shape[0] == batch
        else value
        for key, value in inputs.items()
    }


def _set_forward(module: Any, forward: Any) -> None:
    """Give an instance a forward of its own again, or with None its class's."""
    del module.forward
    if forward is not None:
        module.forward = forward


def _with_tangent(layer: AdaptedLayer, forward: Any, parts: Mapping[str, Tensor], x: Tensor, *args: Any) -> Tensor:
    if torch.is_inference_mode_enabled():
        raise RuntimeError(
            "The model runs in torch.inference_mode() inside of linearised, where torch drops tangents, so that the "
            "logits would be those of the mean. Expected torch.no_grad() there."
        )
    x, moved = forward_ad.unpack_dual(x)
    y, A, B = forward(x, *args), layer.factor("lora_A"), layer.factor("lora_B")
    wide = x.to(A.dtype)
    change = torch.zeros_like(y)
    if "lora_A" in parts:
        change += layer.scaling * (wide @ parts["lora_A"].T @ B.T)
    if "lora_B" in parts:
        change += layer.scaling * (wide @ A.T @ parts["lora_B"].T)
    if moved is not None:
        change += forward(moved, *args) - forward(torch.zeros_like(x), *args)
    return forward_ad.make_dual(y, change)


def _add(
    name: str,
    layer: AdaptedLayer,
    parts: Mapping[str, Tensor],
    rows: tuple[int, ...],
    module: nn.Module,
    args: Sequence[Tensor],
    y: Tensor,
) -> Tensor:
    x, samples = args[0], rows[0]
    # Tokens flattened into rows keep their order; the tokens that a router sends to an expert do not.
    flat = x.ndim == 2 and len(rows) == 3 and x.shape[0] == samples * rows[1] * rows[2]
    if x.shape[0] != samples * rows[1] and not flat:
        raise ValueError(
            f"The input of {name} is {tuple(x.shape)}; expected the {samples} samples of {rows[1]} rows as its first "
            "axis. The model mixes rows, as experts do: pass batched=False to run one sample after the other."
        )
    inputs, outputs = (tensor.reshape(samples, -1, tensor.shape[-1]) for tensor in (x, y))
    return _with_change(layer, inputs, outputs, parts).view(y.shape)


def _with_change(layer: AdaptedLayer, x: Tensor, y: Tensor, parts: Mapping[str, Tensor]) -> Tensor:
    """Return ``y + s [x (A + dA)^T (B + dB)^T - x A^T B^T]``, ``(S, N, m)``, of ``x (N, d)`` or ``(S, N, d)``, y alike.

    Written as ``[x dA^T | x A^T] [B + dB | dB]^T``: nothing cancels, where ``A x = 0`` a random B changes nothing, and
    it is one product that adds to y.
    """
    A, B = layer.factor("lora_A"), layer.factor("lora_B")
    x = x.to(A.dtype)
    dA, dB = parts.get("lora_A"), parts.get("lora_B")
    samples = len(next(iter(parts.values())))
    low, high = [], []
    if dA is not None:
        if x.ndim == 2:
            low.append((x @ dA.flatten(0, 1).T).view(-1, samples, dA.shape[1]).transpose(0, 1))
        else:
            low.append(x @ dA.mT)
        high.append(B.expand(samples, *B.shape) if dB is None else B + dB)
    if dB is not None:
        low.append((x @ A.T).expand(samples, -1, -1))
        high.append(dB)
    left, right = (one[0] if len(one) == 1 else torch.cat(one, -1) for one in (low, high))
    shape = samples, y.shape[-2], y.shape[-1]
    return torch.baddbmm(y.expand(shape), left.to(y.dtype), right.mT.to(y.dtype), alpha=layer.scaling)

"""Experts fused into one parameter, as transformers 5 keeps them: each one seen as the linear layers that it is.

A module holds ``gate_up_proj`` (or ``up_proj``) and ``down_proj``, of one matrix for each of ``E`` experts, and is
called with tokens ``(T, d)``, the experts of each token ``(T, k)`` and their weights. All experts read the same tokens;
what ``down_proj`` reads is made inside, of the tokens that go to this expert.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

DOWN = "down_proj"
_UP = ("gate_up_proj", "up_proj")


class ExpertMatrix(nn.Module):
    """``W (m, d)`` of one expert as a linear layer without bias, which is a view of the parameter.

    ``weight`` is what the parameter holds now, and what is written into it is written into the parameter.

    Attributes:
        owner: The module of the experts.
        parameter: Name of the parameter in it.
        expert: Number of the expert.
        out_features: ``m``.
        in_features: ``d``.
    """

    def __init__(self, owner: nn.Module, parameter: str, expert: int, shape: tuple[int, int]):
        super().__init__()
        # No module of this one: it lies in the other.
        self.__dict__["owner"] = owner
        self.parameter, self.expert, self.bias = parameter, expert, None
        self.out_features, self.in_features = shape

    @property
    def weight(self) -> Tensor:
        """``W (m, d)``."""
        matrix = getattr(self.owner, self.parameter).detach()[self.expert]
        return matrix.t() if _lies_transposed(self.owner) else matrix

    @property
    def is_routed(self) -> bool:
        """Whether it reads what its own expert makes, and not the tokens that all read."""
        return self.parameter == DOWN


def matrices_of(owner: nn.Module, parameter: str) -> list[ExpertMatrix]:
    """Return the matrix of each expert in a parameter; none where it is not known how ``owner`` uses it."""
    held = owner._parameters
    up, down = next((held[name] for name in _UP if name in held), None), held.get(DOWN)
    if up is None or down is None or parameter not in (*_UP, DOWN) or not up.dim() == down.dim() == 3:
        return []
    transposed = _lies_transposed(owner)
    (m_up, d), (m, hidden) = (tuple(p.shape[:0:-1] if transposed else p.shape[1:]) for p in (up, down))
    fits = len(up) == len(down) and m == d and m_up == (2 if "gate_up_proj" in held else 1) * hidden
    # Quantised ones, in bytes and less, have their scales elsewhere.
    plain = up.is_floating_point() and min(up.element_size(), down.element_size()) > 1
    if not fits or not plain or getattr(owner, "_is_expert_parallel", False):
        return []
    shape = (m, hidden) if parameter == DOWN else (m_up, d)
    return [ExpertMatrix(owner, parameter, expert, shape) for expert in range(len(down))]


class Routing(NamedTuple):
    """What a module of experts was called with.

    Attributes:
        tokens: ``(..., d)``.
        experts: Numbers of the experts of each token, ``(T, k)``; those beyond ``E`` stand for none.
        weights: Of each in the sum, ``(T, k)``.
    """

    tokens: Tensor
    experts: Tensor
    weights: Tensor

    @classmethod
    def of_call(cls, owner: nn.Module, args: tuple, kwargs: dict) -> Routing | None:
        """Read the arguments of a call; ``None`` where they are others."""
        given = list(inspect.signature(owner.forward).bind(*args, **kwargs).arguments.values())
        if len(given) < 3 or not all(isinstance(value, Tensor) for value in given[:3]):
            return None
        tokens, experts, weights = given[:3]
        rows = tokens.shape[:-1].numel()
        fits = experts.dim() == 2 and experts.shape == weights.shape and len(experts) == rows
        return cls(tokens, experts, weights) if fits and not experts.is_floating_point() else None

    def rows_of(self, expert: int) -> Tensor:
        """Return the numbers of the tokens ``(n,)`` that an expert adds something to."""
        # A token that was dropped has no such expert, or has it with the weight zero.
        return ((self.experts == expert) & (self.weights != 0)).any(1).nonzero().view(-1)


def hidden_of(owner: nn.Module, expert: int, x: Tensor) -> Tensor:
    """Return what an expert makes of ``x (n, d)`` and multiplies by its down-projection: ``h (n, hidden)``."""
    known: Any = owner
    if not hasattr(owner, "gate_up_proj"):
        return known.act_fn(_product(owner, "up_proj", expert, x))
    made = _product(owner, "gate_up_proj", expert, x)
    if hasattr(owner, "_apply_gate"):
        return known._apply_gate(made)
    gate, up = made.chunk(2, dim=-1)
    return known.act_fn(gate) * up


def output_of(owner: nn.Module, routing: Routing, count: int) -> Tensor:
    """Return what the experts make of the first ``count`` tokens, by what is known of them."""
    known: Any = owner
    tokens = routing.tokens.reshape(-1, routing.tokens.shape[-1])[:count]
    experts, weights = routing.experts[:count], routing.weights[:count]
    result = torch.zeros_like(tokens)
    for token, place, expert in _pairs(experts, len(getattr(known, DOWN))):
        y = _product(owner, DOWN, expert, hidden_of(owner, expert, tokens[token : token + 1]))
        if getattr(known, "has_post_expert_norm", False):
            y = known.post_expert_norm(y)
        result[token] += (weights[token, place] * y[0]).to(result.dtype)
    return result


def _pairs(experts: Tensor, count: int) -> Iterator[tuple[int, int, int]]:
    for token, row in enumerate(experts.tolist()):
        for place, expert in enumerate(row):
            if expert < count:
                yield token, place, expert


def _product(owner: nn.Module, parameter: str, expert: int, x: Tensor) -> Tensor:
    matrix, biases = getattr(owner, parameter)[expert], getattr(owner, f"{parameter}_bias", None)
    product = x @ matrix if _lies_transposed(owner) else nn.functional.linear(x, matrix)
    return product if biases is None else product + biases[expert]


def _lies_transposed(owner: Any) -> bool:
    return bool(getattr(owner, "is_transposed", False))

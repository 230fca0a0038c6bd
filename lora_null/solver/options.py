"""Which options the solver takes."""

from __future__ import annotations

import math
import operator
import sys
from typing import Any

import torch

METHODS = ("auto", "exact", "filtered")
UPLO = ("full", "lower", "upper")
ENERGY = "a share of the energy tr(C) in [0, 1), for instance energy=0.99"


def check_options(
    task: Any, energy: Any, damping: Any, method: Any, tol: Any, oversample: Any, max_cycles: Any, seed: Any
) -> None:
    """Check what :func:`lora_null.null_space` takes besides its matrices, as far as that goes without them."""
    if method not in METHODS:
        raise ValueError(f"null_space: method is {method!r}; expected one of {METHODS}.")
    if method == "filtered" and (task is not None or energy is not None):
        raise ValueError(
            'null_space: method is "filtered" with task or energy; expected "auto" or "exact": an iteration for the '
            "smallest eigenvalues does not find the others that these need."
        )
    check_number("null_space: tol", tol, sys.float_info.min, 1, "a relative excess in energy in (0, 1)")
    if energy is not None:
        check_number("null_space: energy", energy, 0, 1, ENERGY)
    if damping is not None:
        if task is None or energy is not None:
            raise ValueError(
                f"null_space: damping is {damping!r} without a task, or with energy; expected it for a task without "
                "energy, where it weighs the two covariances. Leave one of them out."
            )
        check_number("null_space: damping", damping, sys.float_info.min, math.inf, "a positive number")
    integers = {"max_cycles": (max_cycles, 1), "seed": (seed, -(2**63))}
    if oversample is not None:
        integers["oversample"] = oversample, 0
    for name, (value, least) in integers.items():
        if isinstance(value, bool) or not isinstance(value, int):
            raise TypeError(f"null_space: {name} is {named(value)}; expected an integer.")
        if not least <= value < 2**63:
            raise ValueError(f"null_space: {name} is {value}; expected at least {least}.")


def check_rank(r: Any, d: int, what: str = "null_space: r") -> int:
    """Return ``r`` as an int in ``[1, d]``; ``what`` is for the message."""
    try:
        if isinstance(r, bool):
            raise TypeError
        r = operator.index(r)
    except TypeError:
        raise TypeError(
            f"{what} is {named(r)}; expected an integer, for instance r=128. Were the arguments swapped?"
        ) from None
    if not 1 <= r <= d:
        raise ValueError(
            f"{what} is {r} for a covariance of size {d}; expected 1 <= r <= {d}. A rank cannot exceed the "
            "number of in-features of the layer: lower r, or leave the layer out of target_modules."
        )
    return r


def check_number(what: str, value: Any, low: float, high: float, expected: str) -> float:
    """Return ``value`` if it is a number in ``[low, high)``; ``what`` and ``expected`` are for the message."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise TypeError(f"{what} is {named(value)}; expected {expected}.")
    if not low <= value < high:
        raise ValueError(f"{what} is {value!r}; expected {expected}.")
    return value


def check_dtype(what: str, dtype: Any) -> None:
    """Refuse what cannot hold a basis."""
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise TypeError(
            f"{what}: dtype is {named(dtype)}; expected a floating-point torch.dtype. The entries of a basis are "
            "below 1 and would be cut to zero: leave it out for float64."
        )


def named(value: Any) -> str:
    """Return a short word for what was given, for messages."""
    return repr(value) if value is None or isinstance(value, int | float | str) else f"a {type(value).__name__}"

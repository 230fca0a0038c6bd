"""Which implementation computes an adapted linear, decided here and nowhere else.

Three ways exist:

``triton``  fused kernels: base and low-rank product in one accumulator, dy read once for dS and dB;
``cublas``  the vendor's GEMM (cuBLAS; oneDNN or MKL on CPU) with the low-rank product accumulated into its result;
``torch``   :mod:`lora_null.ops.reference`, for tensors that only torch's own operators understand.

The choice between the first two is made per product, because the best way differs between products: a thin product
is bound by memory and gains from fusion, a square one is bound by how good the large GEMM is. Measured times in
``linear_times.json`` decide where the architecture has entries (see :mod:`lora_null.ops.measure`); elsewhere the
defaults below do. ``LORA_NULL_LINEAR_BACKEND=triton|cublas|torch`` overrides both.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .._logging import warn_once
from . import vendor

PRODUCTS = ("project", "forward", "backward_dy", "backward_dx", "backward_dA")

# Without measurements on an architecture: the pass over dy yields two thin products, for which the vendor reads dy
# twice and fused code once; every other product is one GEMM, where the vendor's is the safe choice (a fused GEMM
# that is 8 % slower loses more than the saved passes give back at d = 4096).
_UNMEASURED = {product: "cublas" for product in PRODUCTS} | {"backward_dy": "triton"}

_PLAIN = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)


@dataclass(frozen=True)
class Plan:
    """The implementation of each product for one shape.

    Attributes:
        backends: Product name to ``"triton"`` or ``"cublas"``.
        reasons: Product name to one phrase that says why.
    """

    backends: dict[str, str]
    reasons: dict[str, str] = field(default_factory=dict)

    def __getattr__(self, product: str) -> Callable[..., Any]:
        if product not in PRODUCTS:
            raise AttributeError(product)
        return getattr(_namespace(self.backends[product]), product)

    def __str__(self) -> str:
        return "\n".join(f"{name:12s} {self.backends[name]:7s} {self.reasons[name]}" for name in PRODUCTS)


def explain(x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, bias: Tensor | None = None) -> str:
    """Say which implementation :func:`lora_null.ops.lora_linear` takes for these tensors, and why.

    One line per product (projection, forward, the pass over dy, dx, dA), or a single line where the whole call goes
    through plain torch. Nothing is computed; the tensors may be on any device.
    """
    if requested_backend() == "torch":
        return "torch: LORA_NULL_LINEAR_BACKEND=torch"
    reason = reason_against(x, weight, lora_A, lora_B, bias)
    if reason is not None:
        return f"torch: {reason}"
    return str(plan(x.flatten(0, -2), weight.shape[0], lora_A.shape[0]))


def requested_backend() -> str:
    """Return the value of ``LORA_NULL_LINEAR_BACKEND``: ``auto``, ``triton``, ``cublas`` or ``torch``."""
    value = os.environ.get("LORA_NULL_LINEAR_BACKEND", "auto")
    if value not in ("auto", "triton", "cublas", "torch"):
        raise ValueError(
            f"LORA_NULL_LINEAR_BACKEND is {value!r}; expected auto, triton, cublas or torch. Unset it for auto."
        )
    return value


def use_reference(x: Tensor, *others: Tensor | None) -> bool:
    """Say whether this call has to go through plain torch, and log the reason once.

    ``others`` are matrices (weight, factors), an already made projection, or a bias.

    Raises:
        RuntimeError: A fallback is necessary and ``LORA_NULL_STRICT=1``.
    """
    if requested_backend() == "torch":
        return True
    reason = reason_against(x, *others)
    if reason is None:
        return False
    fall_back("lora_linear", reason)
    return True


def fall_back(what: str, reason: str) -> None:
    """Log once per reason that ``what`` uses plain torch, or raise in strict mode."""
    message = f"{what} falls back to plain torch operations: {reason}."
    if os.environ.get("LORA_NULL_STRICT") == "1":
        raise RuntimeError(f"{message} LORA_NULL_STRICT=1 turns this fallback into an error.")
    if not torch.compiler.is_compiling():
        warn_once(f"fallback: {what}: {reason}", message)


def reason_against(x: Tensor, *others: Tensor | None) -> str | None:
    """Return why the custom operations cannot take these tensors, or ``None`` if they can."""
    for tensor in (x, *others):
        if tensor is None:
            continue
        if type(tensor) not in _PLAIN:
            return f"a {type(tensor).__name__} is sharded, quantised or otherwise not a plain tensor"
        if not tensor.dtype.is_floating_point:
            return f"a {tensor.dtype} tensor is no plain weight or activation"
        if tensor.device != x.device:
            return f"x is on {x.device}, a weight or factor on {tensor.device}"
    if any(t is not None and t.ndim != 2 for t in others[:1]):
        return "a weight that is not a matrix is a shard of one or a packed one"
    return None


def plan(x: Tensor, m: int, r: int, *, d: int | None = None) -> Plan:
    """Choose for rows ``x (T, d)``, or for rows ``dy (T, m)`` with ``d`` given."""
    T, columns = x.shape
    return _plan(_arch(x.device), T, columns if d is None else d, m, r, x.dtype, requested_backend())


@lru_cache(maxsize=4096)
def _plan(arch: str, T: int, d: int, m: int, r: int, dtype: torch.dtype, requested: str) -> Plan:
    if requested == "cublas":
        return _uniform("cublas", "LORA_NULL_LINEAR_BACKEND=cublas")
    obstacle = _obstacle_to_triton(arch, dtype, r, forced=requested == "triton")
    if obstacle is not None:
        if requested == "triton":
            fall_back("LORA_NULL_LINEAR_BACKEND=triton", obstacle)
        return _uniform("cublas", obstacle)
    if requested == "triton":
        return _uniform("triton", "LORA_NULL_LINEAR_BACKEND=triton")
    backends, reasons = {}, {}
    for product in PRODUCTS:
        entry = nearest(measured_times(), arch, product, dtype, T, d, m, r)
        if entry is None:
            backends[product], reasons[product] = _UNMEASURED[product], f"default, {arch} is unmeasured"
        else:
            triton, cublas = entry["triton_us"], entry["cublas_us"]
            backends[product] = "triton" if triton < cublas else "cublas"
            shape = "T={T}, d={d}, m={m}, r={r}".format(**entry)
            reasons[product] = f"measured at {shape}: triton {triton:g} us, cublas {cublas:g} us"
    return Plan(backends, reasons)


def _uniform(backend: str, reason: str) -> Plan:
    return Plan({product: backend for product in PRODUCTS}, {product: reason for product in PRODUCTS})


def nearest(
    times: list[dict], arch: str, product: str, dtype: torch.dtype, T: int, d: int, m: int, r: int
) -> dict | None:
    """Return the entry of the same architecture, product and dtype whose shape is nearest in log space."""
    name = str(dtype).removeprefix("torch.")
    same = [e for e in times if (e["arch"], e["product"], e["dtype"]) == (arch, product, name)]

    def distance(entry: dict) -> float:
        wanted = {"T": T, "d": d, "m": m, "r": r}
        return sum(abs(math.log(max(value, 1) / entry[key])) for key, value in wanted.items())

    return min(same, key=distance, default=None)


@cache
def measured_times() -> list[dict]:
    """Return the entries of ``linear_times.json``: arch, product, dtype, T, d, m, r, ``triton_us``, ``cublas_us``."""
    return json.loads(files(__package__).joinpath("linear_times.json").read_text())["entries"]


@cache
def _arch(device: torch.device) -> str:
    """Name an architecture: ``sm_90``, ``gfx942``, or the device type where there is no finer name."""
    if device.type != "cuda":
        return device.type
    properties = torch.cuda.get_device_properties(device)
    name = getattr(properties, "gcnArchName", "") if torch.version.hip else ""
    return name.split(":")[0] or f"sm_{properties.major}{properties.minor}"


def _namespace(backend: str):
    if backend == "cublas":
        return vendor
    from ..kernels import lora

    return lora


def _obstacle_to_triton(arch: str, dtype: torch.dtype, r: int, forced: bool) -> str | None:
    if arch == "cpu" and not (forced and os.environ.get("TRITON_INTERPRET") == "1"):
        return "CPU tensors go to the vendor's GEMM"
    if dtype == torch.float64:
        return "the kernels have no fp64 version"
    if not _have_triton():
        return "triton is not installed"
    return None


@cache
def _have_triton() -> bool:
    from importlib.util import find_spec

    return find_spec("triton") is not None

"""Which implementation computes an adapted linear or a covariance, decided here and nowhere else.

An adapted linear goes one of these ways:

``compiled``   C++ calls the vendor's GEMMs, forward and backward, without the interpreter between them;
``operation``  a custom operation, whose products :func:`plan` gives one by one to

               ``triton``  fused kernels: base and low-rank product in one accumulator, dy read once for dS and dB;
               ``cublas``  the vendor's GEMM (cuBLAS; oneDNN or MKL on CPU), accumulating the low-rank product;
``traced``     plain operations for torch.compile and torch.export, where a compiler makes more of them;
``torch``      :mod:`lora_null.ops.reference`, for tensors that only torch's own operators understand.

The choice between ``triton`` and ``cublas`` is made per product, because the best way differs between products: a
thin product is bound by memory and gains from fusion, a square one is bound by how good the large GEMM is. Times
measured by ``lora-null tune`` decide where there are any for the architecture. Elsewhere the vendor's
GEMM is the safe choice (a fused one that is 8 % slower loses more than the saved passes give back at d = 4096), and
all of them are one call of C++. ``LORA_NULL_LINEAR_BACKEND=triton|cublas|torch`` overrides both,
``LORA_NULL_COVARIANCE_BACKEND`` what :func:`covariance_backend` says.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, lru_cache
from types import ModuleType
from typing import Literal

import torch
from torch import Tensor
from torch.autograd import forward_ad

from ..kernels import config, lora, syrk
from ..system import extension
from ..system.environment import fall_back, requested_backend, requested_covariance_backend
from ..system.tensors import PLAIN_TENSORS
from . import roofline, vendor

PRODUCTS = ("project", "forward", "backward_dy", "backward_dx", "backward_dA")
COVARIANCE_BACKENDS = ("triton", "compiled", "blocks", "torch")
_NAMESPACES = {"triton": lora, "cublas": vendor}

# Multiply-adds T d m below which the two large products of forward and backward take less than 200 us at 500 TFLOP/s.
# A layer with a fused kernel costs that much in the interpreter alone (120 us of a 2-core EPYC; 45 us where C++ calls
# the vendor's GEMMs, 75 us in PEFT), so that the GPU would wait, whatever a table says. Not measured on one.
LAUNCH_BOUND = 2.5e10

# Products that apply a dropout mask, which the kernels regenerate and a GEMM has to read.
_MASKED = ("project", "backward_dx", "backward_dA")

_TRACED = "; torch.compile traces plain operations"


@dataclass(frozen=True)
class Plan:
    """The implementation of each product for one shape: functions of one signature in both namespaces.

    Attributes:
        backends: Product name to ``"triton"`` or ``"cublas"``.
        reasons: Product name to one phrase that says why.
    """

    project: Callable[..., Tensor]
    forward: Callable[..., Tensor]
    backward_dy: Callable[..., tuple[Tensor | None, Tensor | None]]
    backward_dx: Callable[..., Tensor]
    backward_dA: Callable[..., Tensor]
    backends: dict[str, str]
    reasons: dict[str, str]

    @classmethod
    def of(cls, backends: dict[str, str], reasons: dict[str, str]) -> Plan:
        """Look the functions of ``backends`` up."""
        functions = {product: getattr(_NAMESPACES[backend], product) for product, backend in backends.items()}
        return cls(**functions, backends=backends, reasons=reasons)

    def __str__(self) -> str:
        return "\n".join(f"{name:12s} {self.backends[name]:7s} {self.reasons[name]}" for name in PRODUCTS)


def explain(
    x: Tensor, weight: Tensor, lora_A: Tensor, lora_B: Tensor, *, bias: Tensor | None = None, dropout: float = 0.0
) -> str:
    """Say which implementation :func:`lora_null.ops.lora_linear` takes for these tensors, and why.

    One line per product (projection, forward, the pass over dy, dx, dA), then one that says whether C++ calls them
    all at once or Python each, and on a GPU one with the passes over memory that this makes and, where the card is
    known to :mod:`lora_null.ops.roofline`, one with the speed-up over PEFT's eager layer that follows; or a single line
    where the whole call goes through plain torch. Where a compiled model takes another way, the lines say that too.
    Nothing is computed; the tensors may be on any device.
    """
    reason = reason_against(x, weight, lora_A, lora_B, bias)
    if reason is not None:
        return f"torch: {reason}"
    rows = x.reshape(x.shape[:-1].numel(), x.shape[-1])
    module = compiled(x, weight, lora_B, dropout)
    if module is None:
        reason = _reason_against_compiled(x, weight, lora_B, dropout) or "there is no C++ extension"
    else:
        reason = module.reason_against(x, weight, lora_A, lora_B, bias, None, False)
    caller = "C++     no interpreter between the products" if reason is None else f"Python  {reason}"
    chosen = plan(rows, weight.shape[0], lora_A.shape[0], weight=weight, dropout=dropout)
    lines = [str(chosen), f"{'called from':12s} {caller}"]
    arch = config.architecture(x.device)
    if arch != "cpu":
        count = roofline.passes(chosen.backends)
        lines.append(
            f"{'memory':12s} {count} passes over (T, d) beside the two large products, with A frozen; "
            f"separate operations make {roofline.SEPARATE_PASSES}"
        )
        (T, d), card = rows.shape, arch.partition(" ")[2]
        if x.dtype.itemsize == 2 and (told := roofline.story(card, T, d, weight.shape[0], count)):
            lines.append(f"{'predicted':12s} {told}")
    return "\n".join(lines)


def compiled(x: Tensor, weight: Tensor, lora_B: Tensor, dropout: float = 0.0) -> ModuleType | None:
    """Return the namespace in C++, or ``None`` where Python knows already that a call is not for it.

    Its functions see the rest (types, shapes, gradients, modes) at less cost, and return ``None`` in their turn for a
    call that Python has to do, or to say what is wrong with. The interpreter takes longer over a call than the
    products do wherever there are few tokens.
    """
    return None if _reason_against_compiled(x, weight, lora_B, dropout) else extension.ready()


def _reason_against_compiled(x: Tensor, weight: Tensor, lora_B: Tensor, dropout: float) -> str | None:
    if torch.compiler.is_compiling():
        return "a tracer has to see operations"
    backend = requested_backend()
    if backend not in ("auto", "cublas"):
        return "LORA_NULL_LINEAR_BACKEND asks for something else"
    if dropout:
        return "the dropout mask is made in Python"
    if forward_ad._current_level >= 0:
        return "forward-mode differentiation is at work"
    if x.is_cuda and backend == "auto" and x.numel() * (m := weight.shape[0]) >= LAUNCH_BOUND:
        d = x.shape[-1]
        chosen = _choose(config.architecture(x.device), x.numel() // d, d, m, lora_B.shape[-1], x.dtype, False)
        if "triton" in chosen.backends.values():
            return "measurements give a product to a kernel"
    return None


def choose(
    x: Tensor, weight: Tensor, *others: Tensor | None, dropout: float = 0.0
) -> Literal["operation", "traced", "torch"]:
    """Return the way of a call that C++ does not take; why it is the slowest is logged once.

    ``others`` are factors, an already made projection, a bias.

    ``traced`` is for CPUs, where every product is the vendor's GEMM either way, and a compiler that sees them fuses
    the addition of the low-rank term with what precedes and follows the layer. An exported program then needs nothing
    of this package. Opaque stay: calls with dropout, whose seed is a number to the plain operations and would end the
    graph; and CUDA, where ``auto`` may choose a Triton kernel for some products. Even where it chooses none, the
    choice depends on T, which a graph with dynamic shapes does not know, and what a compiler makes of the plain
    operations there is unmeasured. ``LORA_NULL_LINEAR_BACKEND=torch`` has them traced on any device.

    Raises:
        RuntimeError: A fallback is necessary and ``LORA_NULL_STRICT=1``.
    """
    backend = requested_backend()
    if backend == "torch" or _transformed():
        return "torch"
    reason = reason_against(x, weight, *others)
    if reason is not None:
        fall_back("lora_linear", reason)
        return "torch"
    plainly = torch.compiler.is_compiling() and x.device.type == "cpu" and not dropout and backend == "auto"
    return "traced" if plainly else "operation"


def _transformed() -> bool:
    """Say whether forward-mode differentiation or torch.func is at work, which only torch's own operations follow."""
    if forward_ad._current_level >= 0:
        return True
    return not torch.compiler.is_compiling() and torch._C._functorch.maybe_current_level() is not None


def reason_against(x: Tensor, *others: Tensor | None) -> str | None:
    """Return why the custom operations cannot or shall not take these tensors, or ``None`` if they may."""
    if requested_backend() == "torch":
        return "LORA_NULL_LINEAR_BACKEND=torch"
    for tensor in (x, *others):
        if tensor is None:
            continue
        if type(tensor) not in PLAIN_TENSORS:
            return f"a {type(tensor).__name__} is sharded, quantised or otherwise not a plain tensor"
        if not tensor.dtype.is_floating_point:
            return f"a {tensor.dtype} tensor is no plain weight or activation"
        if tensor.device != x.device:
            return f"x is on {x.device}, a weight or factor on {tensor.device}"
    if any(t is not None and t.ndim != 2 for t in others[:1]):
        return "a weight that is not a matrix is a shard of one or a packed one"
    return None


def plan(
    x: Tensor, m: int, r: int, *, weight: Tensor | None = None, d: int | None = None, dropout: float = 0.0
) -> Plan:
    """Choose for rows ``x (T, d)``, or for rows ``dy (T, m)`` with ``d`` given."""
    T, columns = x.shape
    requested, arch = requested_backend(), config.architecture(x.device)
    if requested == "cublas":
        return _uniform("cublas", "LORA_NULL_LINEAR_BACKEND=cublas")
    if requested == "auto" and arch == "cpu":
        return _uniform("cublas", "CPU tensors go to the vendor's GEMM" + ("" if dropout else _TRACED))
    obstacle = lora.supported(x, x if weight is None else weight, rank=r)
    if obstacle is None:
        if requested == "triton":
            return _uniform("triton", "LORA_NULL_LINEAR_BACKEND=triton")
        return _choose(arch, T, columns if d is None else d, m, r, x.dtype, dropout > 0)
    if requested == "triton":
        fall_back("LORA_NULL_LINEAR_BACKEND=triton", obstacle)
    return _uniform("cublas", obstacle)


@lru_cache(maxsize=4096)
def _choose(arch: str, T: int, d: int, m: int, r: int, dtype: torch.dtype, dropout: bool) -> Plan:
    if T * d * m < LAUNCH_BOUND and not dropout:
        return _uniform("cublas", "launches, and not products, take the time of so few tokens")
    times, backends, reasons = measured_times(arch), {}, {}
    for product in PRODUCTS:
        entry = nearest(times, product, dtype, T, d, m, r)
        if dropout and product in _MASKED:
            backends[product], reasons[product] = "triton", "the vendor's GEMM would need the mask in memory"
        elif entry is None:
            backends[product], reasons[product] = "cublas", f"default, {arch} is unmeasured"
        else:
            triton, cublas = entry["triton_us"], entry["cublas_us"]
            backends[product] = "triton" if triton < cublas else "cublas"
            shape = "T={T}, d={d}, m={m}, r={r}".format(**entry)
            reasons[product] = f"measured at {shape}: triton {triton:g} us, cublas {cublas:g} us"
    return Plan.of(backends, reasons)


@cache
def _uniform(backend: str, reason: str) -> Plan:
    return Plan.of(dict.fromkeys(PRODUCTS, backend), dict.fromkeys(PRODUCTS, reason))


def nearest(times: list[dict], product: str, dtype: torch.dtype, T: int, d: int, m: int, r: int) -> dict | None:
    """Return the entry of the same product and dtype whose shape is nearest in log space.

    An entry holds ``product``, ``dtype`` (``"bfloat16"``), ``T``, ``d``, ``m``, ``r``, and the medians
    ``triton_us`` and ``cublas_us``.
    """
    sizes = {"T": T, "d": d, "m": m, "r": r}
    name = str(dtype).removeprefix("torch.")
    same = [entry for entry in times if (entry["product"], entry["dtype"]) == (product, name)]

    def distance(entry: dict) -> float:
        return sum(abs(math.log(max(value, 1) / max(entry[key], 1))) for key, value in sizes.items())

    return min(same, key=distance, default=None)


def measured_times(arch: str) -> list[dict]:
    """Return what was measured on ``arch``: shipped with the kernels' data, overlaid by the tuning command's."""
    return config.table(arch)["dispatch"].get("linear", [])


def covariance_backend(x: Tensor, *, dtype: torch.dtype = torch.float32) -> str:
    """Return ``triton``, ``compiled``, ``blocks`` or ``torch``: what an update of a ``dtype`` C with ``x`` would take.

    Raises:
        ValueError: for an unknown ``LORA_NULL_COVARIANCE_BACKEND``.
        RuntimeError: under ``LORA_NULL_STRICT=1`` if the forced or preferred kernel cannot take the call.
    """
    name = requested_covariance_backend(COVARIANCE_BACKENDS)
    if name == "auto":
        if x.device.type != "cuda":
            return "blocks" if reason_against_compiled_covariance(x, dtype) else "compiled"
        d = x.shape[-1]
        T = x.numel() // max(d, 1)
        name = config.backend("covariance", x.dtype, config.architecture(x.device), d=d, T=T)
    if name in ("triton", "compiled"):
        reason = syrk.supported(x, dtype=dtype) if name == "triton" else reason_against_compiled_covariance(x, dtype)
        if reason is not None:
            fall_back(f"covariance_update ({name})", reason, "blocks through BLAS")
            name = "blocks"
    return name


def reason_against_compiled_covariance(x: Tensor, dtype: torch.dtype) -> str | None:
    """Return why C++ cannot add ``x^T x`` into a C of ``dtype``, or ``None`` if it can; builds the extension."""
    if x.device.type != "cpu":
        return f"x is on {x.device}"
    if dtype != torch.float32:
        return f"C is {dtype}"
    capability = torch.backends.cpu.get_cpu_capability()
    if capability not in ("AVX2", "AVX512"):
        return f"no AVX2 (torch calls this CPU {capability})"
    return "there is no C++ extension" if extension.load() is None else None

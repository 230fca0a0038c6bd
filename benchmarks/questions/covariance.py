"""Covariance update: ``C += X^T X`` into a resident fp32 matrix, of which one triangle is wanted."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import limits
from ..harness import Call, Case, Provider, Question, Verdict
from ..timing import Timed


@dataclass
class Inputs:
    """``x (T, d)`` and a former sum; the truth and torch's own distance from it."""

    x: Tensor
    start: Tensor
    truth: Tensor
    torch_error: float


def lower_error(C: Tensor, truth: Tensor) -> float:
    """Relative Frobenius error of the lower triangle, row block by row block to spare memory."""
    error = norm = 0.0
    for first in range(0, truth.shape[0], 2048):
        rows = slice(first, first + 2048)
        want = truth[rows].tril(first)
        error += float((C[rows].double().tril(first) - want).square().sum())
        norm += float(want.square().sum())
    return (error / norm) ** 0.5


class Covariance(Question):
    """How fast are activations added to a covariance?"""

    name = "covariance"
    title = "Covariance update C += X^T X, one triangle, fp32 sum"
    graphs = True
    seconds = 3.0

    def cases(self, device, full):
        """SmolLM2 and LLaMA widths."""
        if device == "cuda":
            shapes = [(4096, 8192, "bf16"), (8192, 8192, "bf16"), (14336, 8192, "bf16"), (2048, 8192, "bf16")]
            shapes += [(4096, 512, "bf16"), (4096, 8192, "fp32"), (28672, 8192, "bf16")] if full else []
        else:
            shapes = [(4096, 4096, "bf16"), (4096, 4096, "fp32"), (576, 8192, "fp32")]
            shapes += [(8192, 4096, "fp32"), (2048, 4096, "fp32"), (2048, 512, "fp32")] if full else []
        return [Case({"d": d, "T": T, "dtype": dtype}) for d, T, dtype in shapes]

    def setup(self, case, device):
        """Columns differ in scale by three decades, as the channels of real activations do."""
        generator = torch.Generator(device).manual_seed(0)
        d, T = case["d"], case["T"]
        scale = torch.logspace(0, -3, d, device=device)[torch.randperm(d, generator=generator, device=device)]
        x = (torch.randn(T, d, generator=generator, device=device) * scale).to(limits.DTYPES[case["dtype"]])
        earlier = torch.randn(64, d, generator=generator, device=device) * scale
        start = earlier.T @ earlier
        truth = start.double()
        for block in x.split(2048):
            truth.addmm_(block.double().T, block.double())
        in_torch = start.clone()
        _full_product(in_torch, x)
        return Inputs(x, start, truth, lower_error(in_torch, truth))

    def verify(self, case, inputs, output):
        """At most twice torch's own error in the same dtype."""
        ratio = lower_error(output, inputs.truth) / max(inputs.torch_error, 1e-9)
        return Verdict(ratio, 2.0, "error over torch's own")

    def work(self, case, mode):
        """See :func:`limits.covariance_work`."""
        return limits.covariance_work(case["T"], case["d"], case["dtype"])

    def derived(self, case, call, mode, median_ms):
        """Tokens per second."""
        return {"tokens_per_s": case["T"] / (median_ms / 1e3)}

    def providers(self):
        """Our op, and every way we know of writing it."""
        return [
            Provider("lora_null", _ours, role="ours"),
            Provider("torch addmm", lambda case, inputs: _call(inputs, _full_product)),
            Provider("fp32 cast + matmul", lambda case, inputs: _call(inputs, _cast_matmul)),
            Provider("block rows", lambda case, inputs: _call(inputs, _block_rows)),
            # Another library's order of summation: up to 2.9 times torch's error was seen on bf16 inputs.
            Provider("scipy ssyrk", _scipy_syrk, requires=("scipy",), devices=("cpu",), allowance=2.0),
            Provider("TF32 cast + matmul", _tf32, devices=("cuda",)),
        ]


def _call(inputs: Inputs, update) -> Call:
    C = inputs.start.clone()

    def output():
        result = inputs.start.clone()
        update(result, inputs.x)
        return result

    return Call({"run": Timed(lambda: update(C, inputs.x))}, output)


def _ours(case: Case, inputs: Inputs) -> Call:
    from lora_null import ops

    return _call(inputs, ops.covariance_update)


def _full_product(C: Tensor, x: Tensor) -> None:
    # The whole square in one product; low-precision inputs stay so where BLAS can return fp32.
    if x.dtype == torch.float32:
        torch.addmm(C, x.T, x, out=C)
    elif x.is_cuda:
        torch.addmm(C, x.T, x, out_dtype=torch.float32, out=C)
    else:
        wide = x.float()
        torch.addmm(C, wide.T, wide, out=C)


def _cast_matmul(C: Tensor, x: Tensor) -> None:
    # As GPTQ and CorDA write it: fp32 copy, full product into a new matrix, addition.
    wide = x.float()
    C += wide.T @ wide


def _block_rows(C: Tensor, x: Tensor, rows: int = 1024) -> None:
    # The lower triangle in block rows, each an ordinary product of the library.
    wide = x if x.is_cuda else x.float()
    for first in range(0, C.shape[0], rows):
        last = min(first + rows, C.shape[0])
        block = C[first:last, :last]
        if wide.dtype == torch.float32:
            block.addmm_(wide[:, first:last].T, wide[:, :last])
        else:
            block += torch.mm(x[:, first:last].T, x[:, :last], out_dtype=torch.float32)


def _scipy_syrk(case: Case, inputs: Inputs) -> Call:
    from scipy.linalg import blas

    # In Fortran's order x^T is the array that x already is, and the upper triangle is our lower one.
    def update(C: Tensor, x: Tensor) -> None:
        wide = x if x.dtype == torch.float32 else x.float()
        blas.ssyrk(1.0, wide.numpy().T, beta=1.0, c=C.numpy().T, lower=0, overwrite_c=1)

    return _call(inputs, update)


def _tf32(case: Case, inputs: Inputs) -> Call:
    def update(C: Tensor, x: Tensor) -> None:
        before = torch.backends.cuda.matmul.allow_tf32
        torch.backends.cuda.matmul.allow_tf32 = True
        try:
            _cast_matmul(C, x)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before

    return _call(inputs, update)

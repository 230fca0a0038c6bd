"""Factors: from a weight and a basis to ``A0`` and ``B0``; and the whole solve of one layer beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .. import limits, spectra
from ..harness import Call, Case, Provider, Question, Verdict
from ..peers.published import published_basis, published_factors
from ..timing import Timed
from .null_space import _eigh, _evr


@dataclass
class Inputs:
    """``C (d, d)``, the exact null space ``(d, r)`` in fp64, ``W (m, d)`` in fp32, and ``W U U^T`` in fp64."""

    C: Tensor
    basis: Tensor
    weight: Tensor
    truth: Tensor
    scale: float


class Factorize(Question):
    """How long does one layer take from its covariance to its factors?

    ``stage=factors`` times the factorisation of a ready basis; ``stage=solve`` the null space and the factors.
    """

    name = "factorize"
    title = "From a basis, or a covariance, to the factors A0, B0 of one layer"
    seconds = 8.0

    def cases(self, device, full):
        """Square layers of LLaMA models."""
        if device == "cuda":
            sizes = [(4096, "factors"), (4096, "solve")]
        else:
            sizes = [(4096, "solve"), (2048, "factors")]
        return [Case({"m": d, "d": d, "r": 128, "stage": stage}) for d, stage in sizes]

    def setup(self, case, device):
        """The exact basis comes from a full fp64 eigensolve."""
        C, _ = spectra.covariance(case["d"], "o", device=device)
        basis = _eigh(C, case["r"]).contiguous()
        generator = torch.Generator(device).manual_seed(1)
        weight = torch.randn(case["m"], case["d"], generator=generator, device=device) / case["d"] ** 0.5
        truth = weight.double() @ basis @ basis.T
        return Inputs(C, basis, weight, truth, float(torch.linalg.norm(truth)))

    def verify(self, case, inputs, output):
        """``B0 A0 = W P`` with a projector ``P``; for a given basis it must be that basis's projector.

        A solver is free to choose another subspace of nearly the same energy, so for ``stage=solve`` the product is
        compared with the weight projected on the rows that it chose.
        """
        A, B = output[0].double(), output[1].double()
        if case["stage"] == "factors":
            truth, scale = inputs.truth, inputs.scale
        else:
            Q, _ = torch.linalg.qr(A.T)
            truth = inputs.weight.double() @ Q @ Q.T
            scale = float(torch.linalg.norm(truth))
        return Verdict(float(torch.linalg.norm(B @ A - truth)) / scale, 1e-5, "relative error of B0 A0")

    def work(self, case, mode):
        """See :func:`limits.factorize_work` and :func:`limits.null_space_work`."""
        work = limits.factorize_work(case["m"], case["d"], case["r"])
        if case["stage"] == "solve":
            work = work + limits.null_space_work(case["d"], case["r"])
        return work

    def providers(self):
        """Ours, the published double SVD, and exact solvers followed by our thin factorisation."""
        return [
            Provider("lora_null", _ours, role="ours"),
            # fp32 singular vectors of a rank-r matrix: 1e-4 is their rounding, not an error of the method.
            Provider("published (full SVD)", _published, allowance=100.0),
            Provider("thin SVD in torch", _thin, only=lambda case: case["stage"] == "factors"),
            Provider(
                "eigh + thin SVD", _exact(_eigh), devices=("cuda",), only=lambda case: case["stage"] == "solve"
            ),
            Provider(
                "evr + thin SVD", _exact(_evr), requires=("scipy",), devices=("cpu",),
                only=lambda case: case["stage"] == "solve",
            ),
        ]  # fmt: skip


def _call(solve) -> Call:
    return Call({"run": Timed(solve)}, solve)


def _ours(case: Case, inputs: Inputs) -> Call:
    import lora_null

    if case["stage"] == "factors":
        return _call(lambda: lora_null.factorize(inputs.weight, inputs.basis))
    return _call(
        lambda: lora_null.factorize(inputs.weight, lora_null.null_space(inputs.C, case["r"], dtype=torch.float64).basis)
    )


def _published(case: Case, inputs: Inputs) -> Call:
    if case["stage"] == "factors":
        basis = inputs.basis.float()
        return _call(lambda: published_factors(inputs.weight, basis))
    return _call(lambda: published_factors(inputs.weight, published_basis(inputs.C, case["r"])))


def _thin_factors(weight: Tensor, basis: Tensor) -> tuple[Tensor, Tensor]:
    P, D, Rh = torch.linalg.svd(weight.double() @ basis, full_matrices=False)
    root = D.sqrt()
    return (root[:, None] * (Rh @ basis.T)).float(), (P * root).float()


def _thin(case: Case, inputs: Inputs) -> Call:
    return _call(lambda: _thin_factors(inputs.weight, inputs.basis))


def _exact(solver):
    def build(case: Case, inputs: Inputs) -> Call:
        return _call(lambda: _thin_factors(inputs.weight, solver(inputs.C, case["r"])))

    return build

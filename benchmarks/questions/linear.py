"""The adapted linear: forward, backward and both, against every other way of computing it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .. import limits
from ..harness import Call, Case, Provider, Question, Verdict, worst
from ..peers import layers
from ..timing import SavedBytes, Timed


@dataclass
class Inputs:
    """Shared tensors; ``truth`` holds y, dx, dB and with A trained dA in fp64, ``torch_error`` torch's distance."""

    x: Tensor  # (T, d)
    weight: Tensor  # (m, d)
    A: Tensor  # (r, d)
    B: Tensor  # (m, r)
    dy: Tensor  # (T, m)
    truth: dict[str, Tensor]
    torch_error: dict[str, float]


def relative_error(value: Tensor, truth: Tensor) -> float:
    """``||value - truth|| / ||truth||`` in fp64."""
    return float(torch.linalg.norm(value.double() - truth) / torch.linalg.norm(truth))


def worst_ratio(output: dict[str, Tensor], truth: dict[str, Tensor], torch_error: dict[str, float]) -> float:
    """Return the largest error over torch's own error of the same tensor; NaN if any tensor is missing or NaN."""
    if any(name not in output or output[name].shape != wanted.shape for name, wanted in truth.items()):
        return float("nan")
    return worst(relative_error(output[name], truth[name]) / max(torch_error[name], 1e-9) for name in truth)


def plain(x: Tensor, weight: Tensor, A: Tensor, B: Tensor, dy: Tensor, train_a: bool) -> dict[str, Tensor]:
    """``y = x W^T + (x A^T) B^T`` and its gradients by autograd, in the dtype of the arguments."""
    x, A, B = x.detach().requires_grad_(), A.detach().requires_grad_(train_a), B.detach().requires_grad_()
    y = x @ weight.T + layers.plain_adapter(x, A, B)
    return {"y": y.detach()} | gradients(y, dy, x, A, B)


def gradients(y: Tensor, dy: Tensor, x: Tensor, A: Tensor, B: Tensor) -> dict[str, Tensor]:
    """Return dx, dB and, where A is trained, dA."""
    leaves = {"dx": x, "dB": B} | ({"dA": A} if A.requires_grad else {})
    return dict(zip(leaves, torch.autograd.grad(y, list(leaves.values()), dy), strict=True))


class Linear(Question):
    """How long does one adapted linear take, forward and backward?"""

    name = "linear"
    title = "Adapted linear y = x W^T + (x A^T) B^T, W frozen"
    graphs = True
    seconds = 3.0

    def cases(self, device, full):
        """LLaMA layers, on a GPU those of Llama-3-8B and the width of Llama-3.2-1B; one that shows overhead alone."""
        tiny = self._case(4, 64, 64, 8, "fp32", "fp32", False)
        if device == "cuda":
            sizes = [(4096, 4096, 16), (2048, 2048, 16), (14336, 4096, 16), (4096, 4096, 128)]
            cases = [self._case(8192, m, d, r, "bf16", "bf16", False) for m, d, r in sizes]
            cases.append(self._case(8192, 4096, 4096, 16, "bf16", "bf16", True))
            cases.append(self._case(8192, 4096, 4096, 16, "bf16", "fp32", False))
            if full:
                every = [(4096, 4096), (1024, 4096), (14336, 4096), (4096, 14336), (2048, 2048)]
                wanted = [
                    self._case(8192, m, d, r, "bf16", "bf16", train_a)
                    for train_a in (False, True) for r in (16, 64, 128) for m, d in every
                ]  # fmt: skip
                cases += [case for case in wanted if case not in cases]
            return [*cases, tiny]
        cases = [
            self._case(2048, 2048, 2048, 128, "fp32", "fp32", False),
            self._case(2048, 2048, 2048, 128, "bf16", "bf16", False),
            self._case(2048, 2048, 2048, 128, "fp32", "fp32", True),
        ]
        if full:
            cases += [
                self._case(2048, 2048, 2048, 16, "fp32", "fp32", False),
                self._case(2048, 4096, 4096, 128, "fp32", "fp32", False),
                self._case(2048, 2048, 2048, 128, "bf16", "fp32", False),
            ]
        return [*cases, tiny]

    @staticmethod
    def _case(T: int, m: int, d: int, r: int, dtype: str, adapter: str, train_a: bool) -> Case:
        return Case({"T": T, "m": m, "d": d, "r": r, "dtype": dtype, "adapter": adapter, "train_a": train_a})

    def setup(self, case, device):
        """Random values of the size that a trained model has; B is not zero, or its error would hide."""
        generator = torch.Generator(device).manual_seed(0)

        def random(*shape: int, scale: float, dtype: str) -> Tensor:
            values = torch.randn(*shape, generator=generator, device=device) * scale
            return values.to(limits.DTYPES[dtype])

        T, m, d, r = case["T"], case["m"], case["d"], case["r"]
        x = random(T, d, scale=1.0, dtype=case["dtype"])
        weight = random(m, d, scale=d**-0.5, dtype=case["dtype"])
        A = random(r, d, scale=d**-0.5, dtype=case["adapter"])
        B = random(m, r, scale=r**-0.5, dtype=case["adapter"])
        dy = random(T, m, scale=1.0, dtype=case["dtype"])
        truth = plain(x.double(), weight.double(), A.double(), B.double(), dy.double(), case["train_a"])
        own = plain(x, weight, A.to(x.dtype), B.to(x.dtype), dy, case["train_a"])
        errors = {name: relative_error(own[name], truth[name]) for name in truth}
        return Inputs(x, weight, A, B, dy, truth, errors)

    def verify(self, case, inputs, output):
        """Every tensor at most twice as far from the truth as torch's own in the same dtype."""
        return Verdict(worst_ratio(output, inputs.truth, inputs.torch_error), 2.0, "worst error over torch's own")

    def work(self, case, mode):
        """See :func:`limits.linear_work`."""
        return limits.linear_work(case["T"], case["m"], case["d"], case["r"], case["dtype"], mode, case["train_a"])

    def derived(self, case, call, mode, median_ms):
        """Useful operations per second."""
        return {"tflops": self.work(case, mode).total_flops / (median_ms / 1e3) / 1e12}

    def providers(self):
        """Ours, PEFT, the accumulate path and foreign kernels where installed."""
        return [
            Provider("lora_null", _build(layers.attach_ours), role="ours"),
            Provider("base linear alone", _base, role="floor"),
            Provider("PEFT eager", _build(layers.attach_peft), requires=("peft",)),
            Provider("PEFT compiled", _build(layers.attach_peft, compiled=True), requires=("peft",)),
            Provider("accumulate", _build(layers.attach_accumulated)),
            Provider("PEFT + our kernels", _build(layers.attach_peft_fused), role="ours", requires=("peft",)),
            Provider("unsloth", _build(layers.attach_unsloth), requires=("unsloth",), devices=("cuda",)),
            Provider("axolotl", _build(layers.attach_axolotl), requires=("axolotl",), devices=("cuda",)),
        ]


def frozen_linears(weights: dict[str, Tensor]) -> Any:
    """Return a module with a frozen linear layer for each weight ``(m, d)``, which it shares."""
    holder = nn.Module()
    for name, weight in weights.items():
        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        setattr(holder, name, linear)
    return holder


def _timed(forward, inputs: Inputs, leaves: list[Tensor]) -> dict[str, Timed]:
    def both():
        return torch.autograd.grad(forward(), leaves, inputs.dy)

    return {
        "both": Timed(both),
        "forward": Timed(forward),
        "backward": Timed(lambda y: torch.autograd.grad(y, leaves, inputs.dy), prepare=forward),
    }


def _build(attach: layers.Attach, *, compiled: bool = False):
    def build(case: Case, inputs: Inputs) -> Call:
        holder = frozen_linears({"proj": inputs.weight})
        attach(holder, "proj", inputs.A, inputs.B, case["train_a"])
        # A clone: unsloth writes dx into the storage of x.
        x = inputs.x.clone().requires_grad_()
        trained = {parameter.shape: parameter for parameter in holder.parameters() if parameter.requires_grad}
        B = trained[inputs.B.shape]
        A = trained[inputs.A.shape] if case["train_a"] else inputs.A
        layer = torch.compile(holder.proj, dynamic=False) if compiled else holder.proj

        def forward() -> Tensor:
            return layer(x)

        def output() -> dict[str, Tensor]:
            y = forward()
            values = y.detach().clone()
            return {"y": values} | gradients(y, inputs.dy, x, A, B)

        with SavedBytes(holder.parameters()) as saved:
            forward()
        leaves = [x, B] + ([A] if case["train_a"] else [])
        return Call(_timed(forward, inputs, leaves), output, {"saved_bytes": saved.bytes})

    return build


def _base(case: Case, inputs: Inputs) -> Call:
    x = inputs.x.clone().requires_grad_()
    weight = inputs.weight
    with SavedBytes([weight]) as saved:
        x @ weight.T
    return Call(_timed(lambda: nn.functional.linear(x, weight), inputs, [x]), None, {"saved_bytes": saved.bytes})

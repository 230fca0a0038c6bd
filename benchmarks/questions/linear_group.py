"""A sharing group: q, k and v read one tensor, gate and up another, and with A frozen one projection serves all."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import limits, models
from ..harness import Call, Case, Provider, Question, Verdict
from ..peers import layers
from ..shapes import shapes
from ..timing import SavedBytes, Timed
from .linear import frozen_linears, relative_error, worst_ratio


@dataclass
class Inputs:
    """``x (T, d)``; per linear its weight ``(m, d)``, factors and cotangent ``(T, m)``; truth in fp64.

    The adapters' ``A_i (r, d)`` are rounded products ``D_i U^T`` with one basis ``U``; the truth is that of the exact
    products.
    """

    x: Tensor
    weights: dict[str, Tensor]
    adapters: models.Adapters
    dy: dict[str, Tensor]
    truth: dict[str, Tensor]
    torch_error: dict[str, float]


class LinearGroup(Question):
    """What does one projection for a whole sharing group save?"""

    name = "linear-group"
    title = "The linears of a sharing group with A frozen, forward and backward"
    graphs = True
    seconds = 5.0

    def cases(self, device, full):
        """q/k/v and gate/up of LLaMA models, and three square layers."""
        T = 8192 if device == "cuda" else 2048
        if device == "cuda":
            wanted = [("llama-3-8b", "qkv", 16), ("llama-3-8b", "gate_up", 16), ("llama-3-8b", "qkv", 128)]
            wanted += [("llama-3.2-1b", "qkv", 128)]
        else:
            wanted = [("square-2048", "qkv", 128), ("llama-3.2-1b", "qkv", 128)]
        dtype = "bf16" if device == "cuda" else "fp32"
        return [Case({"model": name, "group": group, "T": T, "r": r, "dtype": dtype}) for name, group, r in wanted]

    @staticmethod
    def linears(case: Case) -> dict[str, tuple[int, int]]:
        """Return ``(m, d)`` by name; ``square-2048`` is q/k/v without grouped queries."""
        if case["model"] == "square-2048":
            return dict.fromkeys(("q_proj", "k_proj", "v_proj"), (2048, 2048))
        linears = shapes()[case["model"]].linears
        return {linear.name: (linear.m, linear.d) for linear in linears if linear.group == case["group"]}

    def setup(self, case, device):
        """One row space for all A's, as LoRA-Null makes them."""
        generator = torch.Generator(device).manual_seed(4)
        dtype, T, r = limits.DTYPES[case["dtype"]], case["T"], case["r"]
        linears = self.linears(case)
        d = next(iter(linears.values()))[1]

        def random(*shape: int, scale: float = 1.0) -> Tensor:
            return (torch.randn(*shape, generator=generator, device=device) * scale).to(dtype)

        def orthonormal(n: int) -> Tensor:
            return torch.linalg.qr(random(n, r).float())[0].to(dtype)

        basis = orthonormal(d)
        mixings = {name: orthonormal(r) for name in linears}
        exact = {name: mixing.double() @ basis.double().T for name, mixing in mixings.items()}
        Bs = {name: random(m, r, scale=r**-0.5) for name, (m, _) in linears.items()}
        weights = {name: random(m, d, scale=d**-0.5) for name, (m, _) in linears.items()}
        dy = {name: random(T, m) for name, (m, _) in linears.items()}
        adapters = {name: (A.to(dtype), Bs[name]) for name, A in exact.items()}
        inputs = Inputs(random(T, d), weights, adapters, dy, {}, {})
        own = _plain(inputs)
        wide = Inputs(
            inputs.x.double(),
            {name: weight.double() for name, weight in weights.items()},
            {name: (A, Bs[name].double()) for name, A in exact.items()},
            {name: value.double() for name, value in dy.items()},
            {},
            {},
        )
        inputs.truth = _plain(wide)
        inputs.torch_error = {name: relative_error(own[name], truth) for name, truth in inputs.truth.items()}
        return inputs

    def verify(self, case, inputs, output):
        """Outputs, dx and every dB at most twice as far from the truth as torch's own."""
        return Verdict(worst_ratio(output, inputs.truth, inputs.torch_error), 2.0, "worst error over torch's own")

    def work(self, case, mode):
        """The sum of the linears, with x read and dx written once, and one projection and its gradient for all."""
        T, r = case["T"], case["r"]
        linears = list(self.linears(case).values())
        work = limits.Work(0.0)
        for m, d in linears:
            work = work + limits.linear_work(T, m, d, r, case["dtype"], "both", False)
        d, extra = linears[0][1], len(linears) - 1
        # Per linear, forward and backward each multiply T d r for the projection and move T d elements.
        saved_flops = extra * 2 * 2.0 * T * d * r
        saved_bytes = extra * 2 * T * d * limits.ITEM_BYTES[case["dtype"]]
        flops = {case["dtype"]: work.total_flops - saved_flops}
        return limits.Work(work.bytes - saved_bytes, flops, "sum of the linears, one pass over x and one projection")

    def providers(self):
        """Ours on a group, and every layer-wise variant."""
        return [
            Provider("lora_null", _ours, role="ours"),
            Provider("lora_null layer-wise", _layer_wise(layers.attach_ours), role="ours"),
            Provider("PEFT eager", _layer_wise(layers.attach_peft), requires=("peft",)),
            Provider("PEFT compiled", _layer_wise(layers.attach_peft, compiled=True), requires=("peft",)),
            Provider("accumulate", _layer_wise(layers.attach_accumulated)),
            Provider("base linears alone", _base, role="floor"),
        ]


def _plain(inputs: Inputs) -> dict[str, Tensor]:
    holder = frozen_linears(inputs.weights)
    _attach(holder, inputs, layers.attach_plain)
    return _Group(holder, inputs).output()


def _attach(holder: nn.Module, inputs: Inputs, attach: layers.Attach) -> None:
    for name, (A, B) in inputs.adapters.items():
        attach(holder, name, A, B, False)


class _Group:
    def __init__(self, holder: nn.Module, inputs: Inputs, *, compiled: bool = False):
        self.names = list(inputs.weights)
        self.x = inputs.x.clone().requires_grad_()
        self.parameters = list(holder.parameters())
        factors = [
            (name, parameter)
            for name in self.names
            for path, parameter in getattr(holder, name).named_parameters()
            if "lora_B" in path
        ]
        self.leaves = {"dx": self.x} | {f"dB {name}": parameter for name, parameter in factors}
        self.dy = [inputs.dy[name] for name in self.names]

        def run(x: Tensor) -> list[Tensor]:
            return [getattr(holder, name)(x) for name in self.names]

        self.run = torch.compile(run, dynamic=False) if compiled else run

    def both(self):
        return torch.autograd.grad(self.run(self.x), list(self.leaves.values()), self.dy)

    def output(self) -> dict[str, Tensor]:
        ys = self.run(self.x)
        values = {f"y {name}": y.detach().clone() for name, y in zip(self.names, ys, strict=True)}
        grads = torch.autograd.grad(ys, list(self.leaves.values()), self.dy)
        return values | dict(zip(self.leaves, grads, strict=True))

    def call(self, *, checked: bool = True) -> Call:
        with SavedBytes(self.parameters) as saved:
            self.run(self.x)
        return Call({"both": Timed(self.both)}, self.output if checked else None, {"saved_bytes": saved.bytes})


def _layer_wise(attach: layers.Attach, *, compiled: bool = False):
    def build(case: Case, inputs: Inputs) -> Call:
        holder = frozen_linears(inputs.weights)
        _attach(holder, inputs, attach)
        return _Group(holder, inputs, compiled=compiled).call()

    return build


def _ours(case: Case, inputs: Inputs) -> Call:
    holder = frozen_linears(inputs.weights)
    _attach(holder, inputs, layers.attach_ours)
    layers.share_projections(holder)
    return _Group(holder, inputs).call()


def _base(case: Case, inputs: Inputs) -> Call:
    return _Group(frozen_linears(inputs.weights), inputs).call(checked=False)

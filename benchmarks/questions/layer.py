"""One decoder layer: seven adapted linears with everything between them."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from .. import limits, models
from ..harness import Call, Case, Provider, Question, Verdict
from ..peers import layers
from ..shapes import shapes
from ..timing import SavedBytes, Timed
from .linear import relative_error, worst_ratio


@dataclass
class Inputs:
    """A frozen decoder layer, its input and cotangent ``(1, T, hidden)``, adapters, truth in fp64."""

    layer: nn.Module
    rotary: tuple[Tensor, Tensor]
    x: Tensor
    dy: Tensor
    adapters: models.Adapters
    truth: dict[str, Tensor]
    torch_error: dict[str, float]


class DecoderLayer(Question):
    """How long does a whole decoder layer take with adapters on its seven linears?"""

    name = "layer"
    title = "One decoder layer with seven adapters, forward and backward"
    graphs = True
    seconds = 8.0

    def cases(self, device, full):
        """Layers of LLaMA models, one sequence."""
        if device == "cuda":
            wanted = [("llama-3-8b", 4096, 16, False), ("llama-3.2-1b", 4096, 16, False)]
            wanted += [("llama-3-8b", 4096, 16, True), ("llama-3-8b", 4096, 128, False)] if full else []
        else:
            wanted = [("llama-3.2-1b", 512, 128, False)]
            wanted += [("llama-3.2-1b", 512, 128, True), ("llama-3-8b", 512, 128, False)] if full else []
        return [
            Case({"model": name, "T": T, "r": r, "dtype": "bf16", "train_a": train_a}) for name, T, r, train_a in wanted
        ]

    def setup(self, case, device):
        """Random weights; the truth is the same layer with plain adapters in fp64."""
        shape, dtype = shapes()[case["model"]], limits.DTYPES[case["dtype"]]
        model = models.random_model(shape, layers=1, vocab_size=32, dtype=dtype, device=device)
        layer = model.model.layers[0]
        generator = torch.Generator(device).manual_seed(2)
        x = torch.randn(1, case["T"], shape.hidden_size, generator=generator, device=device).to(dtype)
        dy = torch.randn(1, case["T"], shape.hidden_size, generator=generator, device=device).to(dtype)
        rotary = model.model.rotary_emb(x, torch.arange(case["T"], device=device)[None])
        adapters = models.random_adapters(shape, r=case["r"], dtype=dtype, device=device)
        inputs = Inputs(layer, rotary, x, dy, adapters, {}, {})
        own = _Adapted(case, inputs, layers.attach_plain).output()
        wide = Inputs(
            copy.deepcopy(layer).double(),
            tuple(part.double() for part in rotary),
            x.double(),
            dy.double(),
            {name: (A.double(), B.double()) for name, (A, B) in adapters.items()},
            {},
            {},
        )
        inputs.truth = _Adapted(case, wide, layers.attach_plain).output()
        inputs.torch_error = {name: relative_error(own[name], truth) for name, truth in inputs.truth.items()}
        return inputs

    def verify(self, case, inputs, output):
        """Output and every gradient at most twice as far from the truth as plain torch in the same dtype."""
        return Verdict(worst_ratio(output, inputs.truth, inputs.torch_error), 2.0, "worst error over torch's own")

    def work(self, case, mode):
        """See :func:`limits.decoder_work`; only forward and backward together is modelled."""
        if mode != "both":
            return None
        shape = shapes()[case["model"]]
        return limits.decoder_work(shape, case["T"], case["r"], case["dtype"], case["T"], train_a=case["train_a"])

    def derived(self, case, call, mode, median_ms):
        """Tokens per second of one layer."""
        return {"tokens_per_s": case["T"] / (median_ms / 1e3)} if mode == "both" else {}

    def providers(self):
        """Every variant of :func:`models.variants`."""
        return [Provider(name, _build(name, attach), **options) for name, attach, options in models.variants()]


class _Adapted:
    def __init__(self, case: Case, inputs: Inputs, attach, *, compiled: bool = False, liger: bool = False):
        # Parameters are shared with every other provider; only the modules are copied.
        self.layer = models.sharing_copy(inputs.layer)
        self.inputs, self.adapters = inputs, inputs.adapters
        self.x = inputs.x.clone().requires_grad_()
        self.leaves = {"dx": self.x}
        if attach is not None:
            models.attach_all([self.layer], inputs.adapters, attach, train_a=case["train_a"])
            trained = models.trained_b(self.layer, inputs.adapters)
            self.leaves |= {f"dB {name}": parameter for name, parameter in trained.items()}
        self.parameters = list(self.layer.parameters())
        extra = [p for p in self.parameters if p.requires_grad and all(p is not q for q in self.leaves.values())]
        self.all_leaves = [*self.leaves.values(), *extra]
        if liger:
            from liger_kernel.transformers import _apply_liger_kernel_to_instance

            holder = nn.Module()
            holder.layers = nn.ModuleList([self.layer])
            _apply_liger_kernel_to_instance(model=holder)
        if compiled:
            self.layer = torch.compile(self.layer, dynamic=False)

    def forward(self) -> Tensor:
        y = self.layer(self.x, position_embeddings=self.inputs.rotary)
        return y[0] if isinstance(y, tuple) else y

    def both(self):
        return torch.autograd.grad(self.forward(), self.all_leaves, self.inputs.dy)

    def output(self) -> dict[str, Tensor]:
        y = self.forward()
        values = y.detach().clone()
        grads = torch.autograd.grad(y, list(self.leaves.values()), self.inputs.dy)
        return {"y": values} | dict(zip(self.leaves, grads, strict=True))


def _build(name: str, attach):
    def build(case: Case, inputs: Inputs) -> Call:
        it = _Adapted(case, inputs, attach, compiled=name.endswith("compiled"), liger="Liger" in name)
        with SavedBytes(it.parameters) as saved:
            it.forward()
        return Call({"both": Timed(it.both)}, None if attach is None else it.output, {"saved_bytes": saved.bytes})

    return build

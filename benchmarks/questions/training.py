"""A training step: forward, loss, backward and AdamW on a LLaMA with adapters on every linear."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import limits, models
from ..harness import Call, Case, Provider, Question, Verdict
from ..peers import layers
from ..shapes import shapes
from ..timing import SavedBytes, Timed
from .linear import relative_error, worst_ratio


@dataclass
class Inputs:
    """The shared frozen model, a batch ``(b, T / b)``, adapters, and the model on which providers are checked.

    That is the timed model itself where its fp64 form fits, else a twin of one layer.
    """

    model: Any
    tokens: Tensor
    adapters: models.Adapters
    small: Any
    small_tokens: Tensor
    truth: dict[str, Tensor]
    torch_error: dict[str, float]


class TrainingStep(Question):
    """How many tokens per second does fine-tuning see?"""

    name = "training"
    title = "Training step of a LLaMA with random weights, adapters on every linear"
    seconds = 10.0

    def cases(self, device, full):
        """The 1B and 8B shapes; on a CPU one decoder layer of each and a small vocabulary."""
        if device == "cuda":
            wanted = [("llama-3-8b", None, None, 2, 2048, 16), ("llama-3.2-1b", None, None, 4, 2048, 16)]
            wanted += [("llama-3-8b", None, None, 2, 2048, 128)] if full else []
        else:
            wanted = [("llama-3.2-1b", 1, 4096, 1, 512, 128), ("llama-3-8b", 1, 4096, 1, 256, 128)]
        return [
            Case(
                {
                    "model": name, "layers": layers_ or shapes()[name].layers,
                    "vocab": vocab or shapes()[name].vocab_size, "batch": batch, "sequence": sequence, "r": r,
                    "dtype": "bf16", "train_a": False,
                }
            )
            for name, layers_, vocab, batch, sequence, r in wanted
        ]  # fmt: skip

    def assumption(self, case):
        """State what was cut."""
        shape = shapes()[case["model"]]
        if (case["layers"], case["vocab"]) == (shape.layers, shape.vocab_size):
            return ""
        return (
            f"{case['layers']} of {shape.layers} decoder layers and {case['vocab']} of {shape.vocab_size} vocabulary "
            "entries: times and tokens/s are those of the cut model, not of the whole one"
        )

    def setup(self, case, device):
        """Random weights and tokens. A model of several layers is checked on a twin of one, whose fp64 form fits."""
        shape, dtype = shapes()[case["model"]], limits.DTYPES[case["dtype"]]
        model = models.random_model(shape, layers=case["layers"], vocab_size=case["vocab"], dtype=dtype, device=device)
        adapters = models.random_adapters(shape, r=case["r"], dtype=dtype, device=device)
        # A trained adapter is small beside the base.
        adapters = {name: (A, B * 0.1) for name, (A, B) in adapters.items()}
        generator = torch.Generator(device).manual_seed(3)
        tokens = torch.randint(case["vocab"], (case["batch"], case["sequence"]), generator=generator, device=device)
        small, small_tokens = model, tokens
        if case["layers"] > 1:
            small = models.random_model(shape, layers=1, vocab_size=256, dtype=dtype, device=device)
            small_tokens = torch.randint(256, (1, 64), generator=generator, device=device)
        inputs = Inputs(model, tokens, adapters, small, small_tokens, {}, {})
        own = _Adapted(small, adapters, layers.attach_plain, case).gradients(small_tokens)
        wide = {name: (A.double(), B.double()) for name, (A, B) in adapters.items()}
        doubled = copy.deepcopy(small).double()
        inputs.truth = _Adapted(doubled, wide, layers.attach_plain, case).gradients(small_tokens)
        inputs.torch_error = {name: relative_error(own[name], truth) for name, truth in inputs.truth.items()}
        return inputs

    def verify(self, case, inputs, output):
        """Gradients of every ``lora_B`` of a layer at most twice as far from the truth as plain torch's."""
        return Verdict(worst_ratio(output, inputs.truth, inputs.torch_error), 2.0, "worst error over torch's own")

    def work(self, case, mode):
        """See :func:`limits.training_work`."""
        return limits.training_work(
            shapes()[case["model"]], case["batch"] * case["sequence"], case["r"], case["dtype"], case["sequence"],
            layers=case["layers"], vocab=case["vocab"], train_a=case["train_a"],
        )  # fmt: skip

    def derived(self, case, call, mode, median_ms):
        """Tokens and useful operations per second."""
        seconds = median_ms / 1e3
        return {
            "tokens_per_s": case["batch"] * case["sequence"] / seconds,
            "tflops": self.work(case, mode).total_flops / seconds / 1e12,
        }

    def providers(self):
        """Every variant of :func:`models.variants`."""
        return [Provider(name, _build(name, attach), **options) for name, attach, options in models.variants()]


class _Adapted:
    def __init__(self, model: Any, adapters, attach, case: Case, *, compiled=False, liger=False):
        self.model = models.sharing_copy(model)
        # As under gradient checkpointing: the first layer then computes dx like every other one.
        self.model.enable_input_require_grads()
        decoder_layers = self.model.model.layers
        if attach is not None:
            models.attach_all(decoder_layers, adapters, attach, train_a=case["train_a"])
            self.trained_b = models.trained_b(decoder_layers[0], adapters)
        if liger:
            models.with_liger(self.model)
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-5) if self.trained else None
        self.called = torch.compile(self.model, dynamic=False) if compiled else self.model

    def loss(self, tokens: Tensor) -> Tensor:
        return self.called(input_ids=tokens, labels=tokens, use_cache=False).loss

    def gradients(self, tokens: Tensor) -> dict[str, Tensor]:
        loss = self.loss(tokens)
        grads = torch.autograd.grad(loss, list(self.trained_b.values()))
        return dict(zip(self.trained_b, grads, strict=True))

    def step(self, tokens: Tensor) -> None:
        self.loss(tokens).backward()
        if self.optimizer is not None:
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)


def _build(name: str, attach):
    def build(case: Case, inputs: Inputs) -> Call:
        options = {"compiled": name.endswith("compiled"), "liger": "Liger" in name}

        def output():
            if inputs.small is inputs.model:
                return it.gradients(inputs.tokens)
            # The compiled form of the twin would be another program than the one that is timed.
            twin = _Adapted(inputs.small, inputs.adapters, attach, case, liger=options["liger"])
            return twin.gradients(inputs.small_tokens)

        it = _Adapted(inputs.model, inputs.adapters, attach, case, **options)
        with SavedBytes(it.model.parameters()) as saved:
            it.loss(inputs.tokens)
        metrics = {"saved_bytes": saved.bytes, "trained_parameters": sum(p.numel() for p in it.trained)}
        return Call({"run": Timed(lambda: it.step(inputs.tokens))}, None if attach is None else output, metrics)

    return build

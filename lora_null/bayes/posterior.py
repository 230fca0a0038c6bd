"""A distribution over adapters, whose mean is the adapter that the model carries."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..models.modes import evaluating
from .files import read, write
from .layers import FACTORS, AdaptedLayer, adapted_layers
from .likelihood import logits_of, model_inputs, probabilities
from .noise import Noise
from .sampling import folded, linearised, on_shared_input, repeated

# Saved in 16 bits and loaded again, a mean moves by less than this share of its norm; another training moves it more.
_SAME_NORM = 1e-2


class Posterior:
    """A distribution over the factors of a model's LoRA layers.

    It holds what factors deviate by, not the factors: the mean is the model's own adapter, which nothing here changes
    for longer than a block, so that it is saved, merged and exported as before.

    Args:
        noise: By layer and factor, such as ``"model.layers.0.mlp.up_proj.lora_B"``.
        norms: Frobenius norms of the factors that the noise was fitted around, by the same keys.
        method: How it was made.
        facts: Figures of the fit.

    Attributes:
        noise: As given, in the order of the keys, which samples are drawn in.
        method: As given.
        facts: As given.
    """

    def __init__(self, noise: Mapping[str, Noise], norms: Mapping[str, float], method: str, facts: Mapping[str, float]):
        self.noise = {key: noise[key] for key in sorted(noise)}
        self.norms, self.method, self.facts = dict(norms), method, dict(facts)

    def __repr__(self) -> str:
        facts = "".join(f", {key}={value:.4g}" for key, value in self.facts.items())
        return f"Posterior({self.method}, {len(self.noise)} random factors{facts})"

    def draw(self, seed: int) -> dict[str, Tensor]:
        """Return the deviations of one sample by key, fp32 on the CPU; equal seeds give equal samples."""
        generator = torch.Generator().manual_seed(seed)
        return {key: noise.draw(generator) for key, noise in self.noise.items()}

    @contextmanager
    def sample(self, model: nn.Module, seed: int = 0) -> Iterator[None]:
        """Give the model one sample of its adapter for the length of the block; the mean then returns bit by bit.

        Raises:
            ValueError: The model's adapter is not the one that the posterior was fitted around.
        """
        weights = {key: layer.factor(name) for key, layer, name in self._factors(model)}
        means = {key: weight.detach().clone() for key, weight in weights.items()}
        deviations = self.draw(seed)
        try:
            with torch.no_grad():
                for key, weight in weights.items():
                    weight.add_(deviations[key].to(weight.device))
            # of an autocast around the block, which keeps what it made of the weights before
            torch.clear_autocast_cache()
            yield
        finally:
            with torch.no_grad():
                for key, weight in weights.items():
                    weight.copy_(means[key])
            torch.clear_autocast_cache()

    @contextmanager
    def linearised(self, model: nn.Module, seed: int = 0) -> Iterator[None]:
        """Let logits carry what the sample changes them by to first order, as tangents of forward-mode derivatives.

        The mean plus the tangent are the logits of the model that is linear in its factors: of the samples that
        :meth:`sample` gives, the linearised predictive of Laplace-LoRA (arXiv 2308.13111), without any Jacobian.

        Raises:
            ValueError: The model's adapter is not the one that the posterior was fitted around.
        """
        layers = self._layers(model)
        drawn: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        for key, deviation in self.draw(seed).items():
            name, _, factor = key.rpartition(".")
            drawn[name][factor] = deviation.to(layers[name].factor(factor))
        with linearised(layers, drawn):
            yield

    def predict(
        self,
        model: nn.Module,
        batch: Mapping[str, Any] | Tensor,
        *,
        samples: int = 8,
        seed: int = 0,
        positions: Literal["last", "all"] = "last",
        batched: bool = True,
        linearised: bool = False,
    ) -> Tensor:
        """Return the mean of ``softmax(logits)`` over samples, without dropout.

        Args:
            model: The model with the adapter that the posterior was fitted around.
            batch: Keyword arguments of the model, labels aside, or token ids ``(B, L)``.
            samples: S, with the seeds ``seed`` to ``seed + S - 1`` of :meth:`sample`.
            seed: Of the first sample.
            positions: ``"last"``: the last one that is no padding. ``"all"``: every position.
            batched: Run all samples as one batch of ``S B`` rows; otherwise one after the other, in S times the calls
                and less memory. Needed where rows of a batch influence each other or are mixed, as with experts.
            linearised: Take the logits that are linear in the factors, see :meth:`linearised`; one sample after the
                other, each in about three times a forward. For a posterior of :func:`.laplace` over A and B, whose
                samples of the network itself go far beyond where its approximation holds.

        Returns:
            Probabilities ``(B, V)`` or ``(B, L, V)``, fp32 at least; ``(B, V)`` for a classifier.

        Raises:
            ValueError: ``samples`` or ``positions`` is none of these, the model's adapter is another one, or its rows
                are mixed.
        """
        if samples < 1 or positions not in ("last", "all"):
            raise ValueError(f'samples={samples}, positions={positions!r}; expected at least 1, and "last" or "all".')
        inputs = model_inputs(model, batch)
        with evaluating(model):
            if linearised or not batched:
                way = self.linearised if linearised else self.sample
                return sum(self._one(way(model, seed + i), model, inputs, positions) for i in range(samples)) / samples  # type: ignore[return-value]
            first = next(value for value in inputs.values() if isinstance(value, Tensor))
            by_layer = self._layers(model)
            deviations = self._stacked(by_layer, samples, seed)
            rows = (samples, *first.shape[: 1 if first.is_floating_point() else 2])
            with folded(by_layer, deviations, rows):
                everything = repeated(inputs, samples, len(first))
                p = probabilities(logits_of(model(**everything)), everything, positions)
            return p.view(samples, len(first), *p.shape[1:]).mean(0)

    def outputs(self, model: nn.Module, name: str, x: Tensor, *, samples: int = 8, seed: int = 0) -> Tensor:
        """Return the outputs ``(S, ..., m)`` of one layer for S samples on one shared input ``x (..., d)``.

        The base product is computed once for all samples, which within a network holds for its first adapted layer
        only; :meth:`predict` says what it does instead.
        """
        layers = self._layers(model)
        if name not in layers:
            raise ValueError(f"{name!r} has no random factor; there are {sorted(layers)[:3]}, ...")
        with torch.no_grad():
            deviations = self._stacked({name: layers[name]}, samples, seed)
            return on_shared_input(layers[name], x, deviations[name])

    def save(self, path: str | os.PathLike, *, overwrite: bool = False) -> None:
        """Write one safetensors file, atomically. The mean is not in it: save the adapter as ever.

        Raises:
            FileExistsError: The file exists and ``overwrite`` is not set.
        """
        write(Path(path), self.noise, self.norms, self.method, self.facts, overwrite=overwrite)

    @classmethod
    def load(cls, path: str | os.PathLike) -> Posterior:
        """Read a file of :meth:`save`.

        Raises:
            FileNotFoundError: No such file.
            ValueError: The file is damaged, of another kind or of a newer version; the message says which.
        """
        return cls(*read(Path(path)))

    @staticmethod
    def _one(sampled: AbstractContextManager, model: nn.Module, inputs: dict[str, Any], positions: str) -> Tensor:
        with sampled:
            return probabilities(logits_of(model(**inputs)), inputs, positions)

    def _stacked(self, layers: Mapping[str, AdaptedLayer], samples: int, seed: int) -> dict[str, dict[str, Tensor]]:
        drawn = [self.draw(seed + i) for i in range(samples)]
        stacked: dict[str, dict[str, Tensor]] = {name: {} for name in layers}
        for key in self.noise:
            name, _, factor = key.rpartition(".")
            if name in layers:
                weight = layers[name].factor(factor)
                stacked[name][factor] = torch.stack([one[key] for one in drawn]).to(weight)
        return stacked

    def _layers(self, model: nn.Module) -> dict[str, AdaptedLayer]:
        return {key.rpartition(".")[0]: layer for key, layer, _ in self._factors(model)}

    def _factors(self, model: nn.Module) -> list[tuple[str, AdaptedLayer, str]]:
        """Return key, layer and factor name of everything random, checked against the model."""
        layers = adapted_layers(model)
        found = []
        for key, noise in self.noise.items():
            name, _, factor = key.rpartition(".")
            if name not in layers or factor not in FACTORS:
                raise ValueError(
                    f"The model has no adapted layer {name}, which the posterior knows. Expected the model, and the "
                    "adapter, that it was fitted on."
                )
            weight = layers[name].factor(factor)
            norm, known = float(weight.detach().norm()), self.norms[key]
            if tuple(weight.shape) != noise.shape or abs(norm - known) > _SAME_NORM * max(known, norm):
                raise ValueError(
                    f"{key} is {tuple(weight.shape)} with norm {norm:.4g}; the posterior was fitted around "
                    f"{noise.shape} with norm {known:.4g}. Load the adapter that it belongs to, or fit it again."
                )
            found.append((key, layers[name], factor))
        return found

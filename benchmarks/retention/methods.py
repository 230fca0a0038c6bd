"""The ways of fine-tuning that the study compares; PEFT's own code wherever it has the method."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lora_null
from lora_null.adapters.spaces import read
from lora_null.models.targets import target_linears

MODERATE = (3e-4, 1e-3, 3e-3)


@dataclass(frozen=True)
class Start:
    """What a method may look at before training.

    Attributes:
        r: Rank.
        seed: Of the random factors.
        batches: The calibration text, padded.
        task_batches: The first training batches, for methods that start from the task.
        covariances: Of the calibration text.
        cache: Folder for what a method prepares once for all its runs.
    """

    r: int
    seed: int
    batches: list[dict[str, Tensor]]
    task_batches: list[dict[str, Tensor]]
    covariances: lora_null.Covariances
    cache: Path | None = None


@dataclass(frozen=True)
class Method:
    """How a model is made ready, and how it is then trained.

    Attributes:
        attach: Changes the model; returns the one to train.
        learning_rates: The grid: low, middle, high.
        weight_decay: Of AdamW.
        optimizer: Instead of AdamW: from the model and the learning rate.
        text: What is calibrated on, as :meth:`benchmarks.retention.study.Bench.covariances` names it.
    """

    attach: Callable[[Any, Start], nn.Module]
    learning_rates: tuple[float, float, float] = MODERATE
    weight_decay: float = 0.0
    optimizer: Callable[[Any, float], torch.optim.Optimizer] | None = None
    text: str = "words"


def full(model: Any, start: Start) -> nn.Module:
    """Every weight."""
    return model.requires_grad_(True)


def lora(model: Any, start: Start) -> nn.Module:
    """PEFT's LoRA: A random, B zero."""
    return _peft(model, start)


def lora_random_a_frozen(model: Any, start: Start) -> nn.Module:
    """The same with A left as it starts."""
    model = lora(model, start)
    for name, parameter in model.named_parameters():
        if "lora_A" in name:
            parameter.requires_grad_(False)
    return model


def fa_optimizer(model: Any, learning_rate: float) -> torch.optim.Optimizer:
    """PEFT's optimizer of LoRA-FA (arXiv 2308.03303), which freezes A and projects the gradient of B."""
    from peft.optimizers import create_lorafa_optimizer

    config = model.peft_config["default"]
    return create_lorafa_optimizer(model=model, r=config.r, lora_alpha=config.lora_alpha, lr=learning_rate)


def rslora(model: Any, start: Start) -> nn.Module:
    """PEFT's rank-stabilised LoRA (arXiv 2312.03732): scaled by ``alpha / sqrt(r)``."""
    return _peft(model, start, use_rslora=True)


def milora(model: Any, start: Start) -> nn.Module:
    """MiLoRA (arXiv 2406.09044): the r smallest singular values of W become ``B A``, the rest the frozen base."""
    model = lora(model, start)
    with torch.no_grad():
        for module in model.modules():
            if hasattr(module, "lora_A"):
                weight = module.get_base_layer().weight
                U, S, Vt = torch.linalg.svd(weight.float(), full_matrices=False)
                root = S[-start.r :].sqrt()
                B, A = U[:, -start.r :] * root, root[:, None] * Vt[-start.r :]
                module.lora_A["default"].weight.copy_(A)
                module.lora_B["default"].weight.copy_(B)
                weight.sub_(B @ A)
    return model


def pissa(model: Any, start: Start) -> nn.Module:
    """PEFT's PiSSA (arXiv 2404.02948): the r largest singular values of W become ``B A``."""
    return _peft(model, start, init_lora_weights="pissa")


def olora(model: Any, start: Start) -> nn.Module:
    """PEFT's OLoRA (arXiv 2406.01775): ``B A`` from a QR factorisation of W."""
    return _peft(model, start, init_lora_weights="olora")


def mica(model: Any, start: Start) -> nn.Module:
    """PEFT's MiCA (arXiv 2604.01694): B frozen at the least singular vectors of W, A trained from zero."""
    return _peft(model, start, init_lora_weights="mica")


def eva(model: Any, start: Start) -> nn.Module:
    """PEFT's EVA (arXiv 2410.07170): A spans the strongest directions of the task's activations; no rank is moved."""
    from peft import EvaConfig, initialize_lora_eva_weights

    model = _peft(model, start, init_lora_weights="eva", eva_config=EvaConfig(rho=1.0))
    initialize_lora_eva_weights(model, start.task_batches, show_progress_bar=False)
    return model


def corda(model: Any, start: Start) -> nn.Module:
    """PEFT's CorDA in knowledge-preserved mode (arXiv 2406.05223), on the same calibration text; needs attrs."""
    from peft.tuners.lora.config import CordaConfig
    from peft.tuners.lora.corda import preprocess_corda

    @torch.no_grad()
    def run() -> None:
        for batch in start.batches:
            for ids, mask in zip(batch["input_ids"], batch["attention_mask"], strict=True):
                model(input_ids=ids[mask.bool()][None])  # its hooks take one sequence at a time, without padding

    cache = None if start.cache is None else str(start.cache / f"corda-{start.r}.pt")
    options = {"init_lora_weights": "corda", "corda_config": CordaConfig(corda_method="kpm", cache_file=cache)}
    # its preparation does not know "all-linear"
    names = sorted({name.rpartition(".")[2] for name in target_linears(model)})
    preprocess_corda(model, _config(start, target_modules=names, **options), run_model=run)
    return _peft(model, start, target_modules=names, **options)


def lora_null_frozen(model: Any, start: Start) -> nn.Module:
    """LoRA-Null with A frozen."""
    return _ours(model, start, train="b")


def lora_null_trained(model: Any, start: Start) -> nn.Module:
    """LoRA-Null with A and B trained."""
    return _ours(model, start, train="ab")


def lora_null_task(model: Any, start: Start) -> nn.Module:
    """A frozen in the directions that the task uses most, of those beyond 99 % of the energy."""
    return _ours(model, start, task=_task(model, start), train="b", energy=0.99)


def null_basis(model: Any, start: Start, energy: float = 0.99) -> nn.Module:
    """Null-Basis LoRA (arXiv 2609.25618): A and B learn, A within the directions beyond a share of the energy."""
    return _ours(model, start, train="b_in_basis", energy=energy, rank_pattern=smaller_ranks(start, energy))


def smaller_ranks(start: Start, energy: float, group_pooling: int | None = None) -> dict[str, int]:
    """Return the ranks of layers in which fewer than ``r`` directions are free: 99.9 % leave some layers 9 of 576."""
    free = {key: lora_null.null_basis(read(C, group_pooling), energy).k for key, C in start.covariances.items()}
    members = start.covariances.groups.items()
    return {re.escape(name): free[key] for key, names in members for name in names if free[key] < start.r}


def null_basis_task(model: Any, start: Start) -> nn.Module:
    """The same from the directions that the task uses most."""
    return _ours(model, start, task=_task(model, start), train="b_in_basis", energy=0.99)


def _config(start: Start, **options: Any) -> Any:
    from peft import LoraConfig

    r = start.r
    wanted: dict[str, Any] = {"r": r, "lora_alpha": r, "target_modules": "all-linear", "task_type": "CAUSAL_LM"}
    return LoraConfig(**wanted | options)


def _peft(model: Any, start: Start, **options: Any) -> nn.Module:
    from peft import get_peft_model

    torch.manual_seed(start.seed)
    return get_peft_model(model, _config(start, **options))


def _ours(model: Any, start: Start, *, task: lora_null.Covariances | None = None, **options: Any) -> nn.Module:
    config = lora_null.LoraNullConfig(r=start.r, seed=start.seed, **options)
    return lora_null.initialize(model, start.covariances, config, task=task, progress=False)


def _task(model: Any, start: Start) -> lora_null.Covariances:
    batches = [{name: batch[name] for name in ("input_ids", "attention_mask")} for batch in start.task_batches]
    return lora_null.calibrate(model, batches, lora_null.LoraNullConfig(r=start.r), progress=False)

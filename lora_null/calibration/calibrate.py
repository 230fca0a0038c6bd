"""Run a model on calibration text and sum the second moments of its linear layers' inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Set
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import __version__
from ..config import LoraNullConfig
from ..covariances.covariances import Covariances
from ..models.identity import fingerprint
from ..models.modes import evaluating, input_device
from ..models.targets import output_head_names, target_linears
from ..models.weights import is_distributed
from ..models.wrappers import uncompiled
from ..system.distributed import announcing_failure, is_shared_out, require_lockstep, share_of
from ..system.log import logger
from .accumulator import ACCUMULATORS, Placement
from .batches import BatchReader, iterate, length_of, probe, to_device
from .callback import run_function
from .checkpoint import check_checkpoint
from .collector import Collector
from .job import Job, Settings, wants_queue
from .layerwise import plan_walk, run_layerwise
from .memory import MemoryPlan, observe, plan_streaming
from .streaming import run_streaming


def calibrate(
    model: nn.Module,
    batches: Any,
    config: LoraNullConfig | None = None,
    *,
    mask: str = "attention",
    checkpoint: str | os.PathLike | None = None,
    checkpoint_every: int = 32,
    device: str | torch.device | None = None,
    offload: str | None = None,
    low_memory: bool = False,
    memory_limit: int | None = None,
    queue_tokens: int = 4096,
    accumulate: str = "fp32",
    normalize: str | None = None,
    share_inputs: bool = True,
    shard: bool | None = None,
    progress: bool = True,
) -> Covariances:
    """Sum ``C = sum_t x_t x_t^T`` over the calibration tokens, for every input of the target layers.

    Linear layers that receive the same tensor share one matrix; which do is observed, so q, k, v and gate, up of a
    LLaMA block give 4 matrices per block. The model runs in eval mode without gradients, and without its output head
    where it allows that; its modes, hooks and weights are as before when this returns or raises.

    Under ``torch.distributed`` each process runs its share of the batches, and all return the same sums. An error
    in one process ends the others with ``OtherProcessFailed``; a process that is killed ends them when
    ``torch.distributed`` notices it. A model sharded by ``fully_shard`` needs equal shares, and neither
    ``checkpoint`` nor ``low_memory``.

    Args:
        model: A Hugging Face causal LM or any ``nn.Module``; in any dtype, on any devices, offloaded by accelerate or
            not. If it is compiled it runs as it was before.
        batches: A list, DataLoader or iterator of batches; a batch is token ids ``(B, L)`` or ``(L,)``, a mapping
            with ``input_ids`` and perhaps ``attention_mask`` and ``labels``, or a tuple in the order of the model's
            arguments. One tensor or mapping is cut into batches of about ``queue_tokens`` tokens. Or a
            function without arguments that runs the model: every call of the model in it is a batch.
        config: Only ``target_modules`` matters here; the default covers every linear layer but the output head.
        mask: Which tokens count. ``"attention"``: those with ``attention_mask != 0``. ``"labels"``: of
            those, the ones with ``labels != -100``, which leaves out prompts. ``"none"``: all, padding too.
        checkpoint: File for the sums in progress. If it exists the run continues from it, to the same bits as if it
            had not been interrupted; a finished one is returned at once. With ``low_memory``, one file
            per layer, ``<checkpoint>.<layer>``; with several processes, one per process.
        checkpoint_every: Write it after so many batches. Queues are emptied then, with or without a checkpoint, so that
            neither it nor an interruption changes a bit of the result.
        device: Where the sums are formed and kept; the default is the device of each layer's input. With
            ``low_memory`` also where each decoder layer runs, so that a model in CPU memory can be larger than it.
        offload: ``"cpu"`` keeps the sums (with ``low_memory`` the hidden states) in CPU memory. Without
            ``low_memory`` every launch then moves a ``d x d`` product to the CPU, which is slow.
        low_memory: One pass per decoder layer, with the sums of that layer only; the hidden states of all
            batches are kept between passes. About the same time; the result lies packed in CPU memory.
        memory_limit: Bytes that the plan may use per device, the model itself aside; the default is the memory
            that is free. A plan that does not fit is refused before the run.
        queue_tokens: Batches of fewer than half as many tokens are collected up to launches of at least that half.
        accumulate: ``"fp32"`` or ``"fp64"``, the precision of the sums. Half-precision inputs are multiplied exactly
            and summed in fp32, which suffices for the smallest eigenvalues of real activations.
        normalize: ``"reference"`` divides each sample by the absolute value of its signed maximum, like the
            published code; for comparisons only.
        share_inputs: Off, each layer gets a matrix of its own.
        shard: Several processes only. ``True``: all are given the same batches and each takes its share;
            ``False``: each is given its own; the default is ``False`` for a DataLoader with a DistributedSampler
            and ``True`` otherwise.
        progress: Show a progress bar with tokens per second.

    Returns:
        The sums, as ``float32`` or ``float64`` matrices where they were kept.

    Raises:
        TypeError: A batch is of no known form.
        ValueError: An argument is out of range; the model has no target layer; no token counts; the embedding lacks a
            token id; an activation is NaN or Inf (layer and batch are named); the plan does not fit; the checkpoint
            belongs to another run.
        IsADirectoryError: ``checkpoint`` is a folder.
        RuntimeError: Another process failed.
    """
    model, config = uncompiled(model), config or LoraNullConfig()
    _check_options(offload, checkpoint_every, queue_tokens)
    if checkpoint is not None:
        check_checkpoint(Path(checkpoint))
    linears = target_linears(model, config.target_modules)
    reader = BatchReader(model, mask, needs_head=bool(output_head_names(model) & set(linears)))
    placement = _placement(device, None if low_memory else offload, queue_tokens, accumulate)
    collector = Collector(linears, placement, share_inputs=share_inputs, normalize=normalize)
    job = Job(model, reader, collector, input_device(model), checkpoint_every, progress)
    options = {
        "mask": mask,
        "accumulate": accumulate,
        "normalize": str(normalize),
        "share_inputs": str(share_inputs),
        "queue_tokens": str(queue_tokens),
        "checkpoint_every": str(checkpoint_every),
        "low_memory": str(low_memory),
    }
    settings = Settings(None if checkpoint is None else Path(checkpoint), offload, memory_limit, options)
    with evaluating(model), announcing_failure():
        if callable(batches) and not isinstance(batches, Iterable):
            if low_memory or checkpoint is not None:
                raise ValueError(
                    "low_memory and checkpoint need the batches themselves, but batches is a function that runs the "
                    "model. Pass a list, DataLoader or iterator of batches."
                )
            sums = run_function(job, batches, memory_limit)
        else:
            sharded = is_distributed(model)
            if sharded and (low_memory or checkpoint is not None):
                raise ValueError(
                    "low_memory and checkpoint let the processes run different parts of the model, which waits for all "
                    "of them where it is sharded. Leave them out, or calibrate before sharding."
                )
            source = iterate(batches, queue_tokens)
            total = length_of(source)
            if shard if shard is not None else not is_shared_out(batches):
                source, total = share_of(source), None if total is None else len(list(share_of(range(total))))
            if sharded:
                require_lockstep(total)
            sums = run_layerwise(job, source, settings) if low_memory else run_streaming(job, source, total, settings)
    called = {name for names in sums.groups.values() for name in names}
    provenance = {**_provenance(model, linears, config, called), **options, "data": sums.data}
    result = Covariances(sums.matrices, sums.groups, sums.tokens, provenance)
    _check_counts(result, linears)
    return result


def memory_plan(
    model: nn.Module,
    batch: Any,
    config: LoraNullConfig | None = None,
    *,
    tokens: int = 0,
    device: str | torch.device | None = None,
    offload: str | None = None,
    low_memory: bool = False,
    checkpoint: str | os.PathLike | None = None,
    queue_tokens: int = 4096,
    accumulate: str = "fp32",
    share_inputs: bool = True,
) -> MemoryPlan:
    """Say what :func:`calibrate` with these arguments would keep in memory; runs one small forward pass.

    The model may lie on the ``meta`` device: then nothing is computed or allocated.

    Args:
        model: The model.
        batch: One batch.
        config: As for :func:`calibrate`, like the other arguments.
        tokens: ``B L`` summed over all batches, padding included; needed with ``low_memory``.
        device: See :func:`calibrate`.
        offload: See :func:`calibrate`.
        low_memory: See :func:`calibrate`.
        checkpoint: See :func:`calibrate`; nothing is read or written.
        queue_tokens: See :func:`calibrate`.
        accumulate: See :func:`calibrate`.
        share_inputs: See :func:`calibrate`.

    Returns:
        The plan; ``str(plan)`` is a table, ``plan.total(device)`` the bytes on one device.
    """
    model, config = uncompiled(model), config or LoraNullConfig()
    linears = target_linears(model, config.target_modules)
    reader = BatchReader(model, "none", needs_head=bool(output_head_names(model) & set(linears)))
    placement = _placement(device, None if low_memory else offload, queue_tokens, accumulate)
    first = reader.read(batch, 0)
    inputs = to_device(probe(first.inputs), input_device(model))
    if reader.is_hf and next(model.parameters()).is_meta and not hasattr(model, "_hf_hook"):
        # transformers looks at the values of positions and masks, and there are none; it takes a mask of four
        # dimensions as it is
        inputs = to_device(inputs, torch.device("meta"))
        length = inputs["input_ids"].shape[1]
        inputs["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool, device="meta")
    with evaluating(model):
        seen = observe(model, inputs, linears, share_inputs)
    placement = replace(placement, queue=wants_queue([first], queue_tokens))
    if not low_memory:
        return plan_streaming(seen, placement)
    return plan_walk(
        model,
        linears,
        seen,
        placement,
        offload,
        tokens=tokens or first.tokens,
        largest_batch=first.tokens,
        on_disk=checkpoint is not None,
    )


def _placement(device: str | torch.device | None, offload: str | None, queue_tokens: int, accumulate: str) -> Placement:
    if accumulate not in ACCUMULATORS:
        raise ValueError(f"accumulate is {accumulate!r}; expected one of {tuple(ACCUMULATORS)}.")
    compute = None if device is None else torch.device(device)
    if compute == torch.device("cuda") and torch.cuda.is_available():
        # tensors name their device with its number
        compute = torch.device("cuda", torch.cuda.current_device())
    store = torch.device("cpu") if offload == "cpu" else None
    return Placement(ACCUMULATORS[accumulate], compute, store, queue_tokens)


def _check_options(offload: str | None, checkpoint_every: int, queue_tokens: int) -> None:
    if offload not in (None, "cpu"):
        raise ValueError(f'offload is {offload!r}; expected None or "cpu".')
    for name, value in (("checkpoint_every", checkpoint_every), ("queue_tokens", queue_tokens)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; expected a positive integer.")


def _provenance(
    model: nn.Module, linears: Mapping[str, nn.Linear], config: LoraNullConfig, called: Set[str]
) -> dict[str, str]:

    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    return {
        "lora_null": __version__,
        "model": type(model).__name__,
        # a local path would tell others about this machine, and mean nothing to them
        "model_name": Path(name).name if os.path.isabs(name) else name,
        "model_dtype": ",".join(dtypes),
        "base_fingerprint": fingerprint({name: linears[name] for name in linears if name in called}) or "",
        "without_tokens": json.dumps([name for name in linears if name not in called]),
        "target_modules": json.dumps(config.to_dict()["target_modules"]),
    }


def _check_counts(result: Covariances, linears: Mapping[str, nn.Linear]) -> None:
    """Refuse an empty result; warn of layers without tokens and of null spaces that too few tokens leave open."""
    if not result:
        raise ValueError(
            "No token was counted for any target layer. Expected batches with tokens that the mask keeps "
            "(attention_mask != 0, labels != -100), and a model whose target layers are called."
        )
    missing = [name for name in linears if name not in result]
    if missing:
        logger.warning(
            "%d of %d target layers received no token and have no covariance, for instance %s. With "
            "all-linear they get no adapter; to adapt them, add batches that reach them.",
            len(missing),
            len(linears),
            missing[0],
        )
    few = [key for key in result if result.tokens[key] < 2 * result.size(key)]
    if few:
        worst = max(few, key=lambda key: result.size(key) / result.tokens[key])
        logger.warning(
            "%d of %d covariances have fewer than 2 tokens per feature (%s: %d tokens, d = %d). Their null spaces are "
            "then largely arbitrary and protect only these very texts. Calibrate on more text: at least %d tokens.",
            len(few),
            len(result),
            worst,
            result.tokens[worst],
            result.size(worst),
            2 * max(result.size(key) for key in few),
        )

"""Run a model on calibration text and sum the second moments of its linear layers' inputs."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..config import LoraNullConfig
from ..covariances.covariances import Covariances, saw_few
from ..models.arguments import takes
from ..models.identity import fingerprint
from ..models.modes import evaluating
from ..models.weights import is_distributed
from ..models.wrappers import uncompiled
from ..system.distributed import announcing_failure, is_shared_out, require_lockstep, share_of
from ..system.log import logger
from ..system.version import __version__
from .batches import iterate, length_of
from .callback import run_callback
from .checkpoint import check_checkpoint
from .job import Job, Sums
from .layerwise import run_layerwise
from .options import Options
from .streaming import run_streaming


@takes(model=nn.Module, config=LoraNullConfig)
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
    share_inputs: bool = True,
    shard: bool | None = None,
    progress: bool = True,
) -> Covariances:
    """Sum ``C = sum_t x_t x_t^T`` over the calibration tokens, for every input of the target layers.

    Linear layers that receive the same tensor share one matrix; which do is observed, so q, k, v and gate, up of a
    LLaMA block give 4 matrices per block. A subclass of ``nn.Linear`` that computes something else than ``x W^T``, as
    some routers of experts do, is left out with a warning. Experts that are fused into parameters are summed where
    ``config.target_parameters`` names these: all ``gate_up_proj`` of a layer share one matrix, of the tokens that the
    layer reads; ``down_proj`` has one for each expert, of what that makes of its own tokens. The model runs in eval
    mode without gradients, and without its output head where it allows that; its modes, hooks and weights are as before
    when this returns or raises.

    Under ``torch.distributed`` each process runs its share of the batches, and all return the same sums. An error
    in one process ends the others with ``OtherProcessFailed``; a process that is killed ends them when
    ``torch.distributed`` notices it. A model sharded by ``fully_shard`` needs equal shares, and neither
    ``checkpoint`` nor ``low_memory``.

    Args:
        model: A Hugging Face causal LM or any ``nn.Module``; in any dtype, on any devices, offloaded by accelerate or
            not. If it is compiled it runs as it was before.
        batches: A list, DataLoader or iterator of batches; a batch is token ids ``(B, L)`` or ``(L,)``, a mapping
            with ``input_ids`` and perhaps ``attention_mask``, ``labels`` and ``text_weight`` (how often its tokens
            count, see :meth:`Covariances.weighted`), or a tuple in the order of the model's arguments. One tensor or
            mapping is cut into batches of about ``queue_tokens`` tokens. Or a function without arguments that runs the
            model: every call of the model in it is a batch.
        config: What it selects matters here, by ``target_modules`` and ``target_parameters``; the default covers every
            linear layer but the output head.
        mask: Which tokens count. ``"attention"``: those with ``attention_mask != 0``. ``"labels"``: of
            those, the ones with ``labels != -100``, which leaves out prompts. ``"none"``: all, padding too. In an
            encoder-decoder model the decoder has a mask of its own: ``decoder_attention_mask``, or the labels. Of
            images and sounds all rows count but those that the model itself masks.
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
    options = Options(
        mask=mask,
        checkpoint=checkpoint,
        checkpoint_every=checkpoint_every,
        device=device,
        offload=offload,
        low_memory=low_memory,
        memory_limit=memory_limit,
        queue_tokens=queue_tokens,
        accumulate=accumulate,
        share_inputs=share_inputs,
        shard=shard,
        progress=progress,
    )
    if options.checkpoint_path is not None:
        check_checkpoint(options.checkpoint_path)
    config = config or LoraNullConfig()
    job = Job.of(uncompiled(model), config, options)
    with evaluating(job.model), announcing_failure():
        sums = run(job, batches)
    called = {name for names in sums.groups.values() for name in names}
    base = fingerprint({name: linear for name, linear in job.linears.items() if name in called})
    result = Covariances(sums.matrices, sums.groups, sums.tokens, provenance(job, config, sums, base))
    check_counts(result.tokens, {key: result.size(key) for key in result}, called, job.linears, sums.left_out)
    return result


def run(job: Job, batches: Any) -> Sums:
    """Sum over ``batches`` of any form, in the way that the job's options ask for."""
    options, sharded = job.options, is_distributed(job.model)
    walks = options.low_memory or options.checkpoint is not None
    if callable(batches) and not isinstance(batches, Iterable):
        if walks:
            raise ValueError(
                "low_memory and checkpoint need the batches themselves, but batches is a function that runs the "
                "model. Pass a list, DataLoader or iterator of batches."
            )
        return run_callback(job, batches)
    if sharded and walks:
        raise ValueError(
            "low_memory and checkpoint let the processes run different parts of the model, which waits for all "
            "of them where it is sharded. Leave them out, or calibrate before sharding."
        )
    source, total = _share(batches, iterate(batches, options.queue_tokens), options.shard)
    if sharded:
        require_lockstep(total)
    return run_layerwise(job, source) if options.low_memory else run_streaming(job, source, total)


def _share(batches: Any, source: Iterable[Any], shard: bool | None) -> tuple[Iterable[Any], int | None]:
    """Return what this process reads of ``source``, which was made of ``batches``, and how many that are if known."""
    total = length_of(source)
    if shard is False or (shard is None and is_shared_out(batches)):
        return source, total
    return share_of(source), None if total is None else sum(1 for _ in share_of(range(total)))


def provenance(job: Job, config: LoraNullConfig, sums: Sums, base_fingerprint: str | None) -> dict[str, str]:
    """Say where covariances come from."""
    model, linears = job.model, job.linears
    called = {name for names in sums.groups.values() for name in names}
    name = str(getattr(getattr(model, "config", None), "_name_or_path", "") or "")
    dtypes = sorted({str(parameter.dtype).removeprefix("torch.") for parameter in model.parameters()})
    return {
        "lora_null": __version__,
        "model": type(model).__name__,
        # a local path would tell others about this machine, and mean nothing to them
        "model_name": Path(name).name if os.path.isabs(name) else name,
        "model_dtype": ",".join(dtypes),
        "base_fingerprint": base_fingerprint or "",
        "without_tokens": json.dumps([name for name in linears if name not in called]),
        "target_modules": json.dumps(config.to_dict()["target_modules"]),
        **({"target_parameters": json.dumps(config.target_parameters)} if config.target_parameters else {}),
        **job.options.key(),
        "data": sums.data,
        **({} if set(job.reader.weights) <= {1} else {"weight": " + ".join(f"{w:g}" for w in job.reader.weights)}),
    }


def check_counts(
    tokens: Mapping[str, int],
    sizes: Mapping[str, int],
    called: set[str],
    linears: Mapping[str, nn.Linear],
    left_out: Mapping[str, str],
) -> None:
    """Refuse an empty result; warn of layers without tokens and of null spaces that too few tokens leave open.

    Args:
        tokens: By group key.
        sizes: Number of features by group key.
        called: Names of the layers that are in a group.
        linears: The target layers.
        left_out: Those that compute something else than ``x W^T``, and what.
    """
    for reason, names in _by_reason(left_out).items():
        logger.warning(
            "%d of %d target layers are linear in name only and have no covariance: %s and its like, since %s. With "
            "all-linear they get no adapter.",
            len(names),
            len(linears),
            names[0],
            reason,
        )
    if not tokens:
        raise ValueError(
            "No token was counted for any target layer. Expected batches with tokens that the mask keeps "
            "(attention_mask != 0, labels != -100), and a model whose target layers are called and linear."
        )
    missing = [name for name in linears if name not in called and name not in left_out]
    if missing:
        logger.warning(
            "%d of %d target layers received no token and have no covariance, for instance %s. With "
            "all-linear they get no adapter; to adapt them, add batches that reach them.",
            len(missing),
            len(linears),
            missing[0],
        )
    few = [key for key in tokens if saw_few(tokens[key], sizes[key])]
    pooled = [key for key in few if getattr(linears[key], "is_routed", False)]
    if pooled:
        logger.warning(
            "%d experts saw fewer than 2 tokens per feature (%s: %d tokens, d = %d). In their place initialisation "
            "takes the sum over all experts of the layer. For null spaces of their own, calibrate on more text.",
            len(pooled),
            pooled[0],
            tokens[pooled[0]],
            sizes[pooled[0]],
        )
    few = [key for key in few if key not in pooled]
    if few:
        worst = max(few, key=lambda key: sizes[key] / tokens[key])
        logger.warning(
            "%d of %d covariances have fewer than 2 tokens per feature (%s: %d tokens, d = %d). Their null spaces are "
            "then largely arbitrary and protect only these very texts. Calibrate on more text: at least %d tokens.",
            len(few),
            len(tokens),
            worst,
            tokens[worst],
            sizes[worst],
            2 * max(sizes[key] for key in few),
        )


def _by_reason(left_out: Mapping[str, str]) -> dict[str, list[str]]:
    names: dict[str, list[str]] = {}
    for name, reason in left_out.items():
        names.setdefault(reason, []).append(name)
    return names

"""What a calibration would keep in memory, without running it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from ..config import LoraNullConfig
from ..models.arguments import takes
from ..models.modes import evaluating
from ..models.wrappers import uncompiled
from .batches import Batch, first_tokens, to_device
from .job import Job
from .layerwise import plan_walk
from .memory import MemoryPlan, plan_directions, plan_streaming
from .options import Options
from .probe import Probe, probe


@takes(on_meta=True, model=nn.Module, config=LoraNullConfig)
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
        config: As for :func:`calibrate`, like the other arguments. Where it is given and A learns within the free
            directions, the plan says also what these take in training.
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

    Raises:
        ValueError: An argument is out of range; the model has no target layer; the batch holds no token.
    """
    options = Options(
        mask="none",
        checkpoint=checkpoint,
        device=device,
        offload=offload,
        low_memory=low_memory,
        queue_tokens=queue_tokens,
        accumulate=accumulate,
        share_inputs=share_inputs,
    )
    job = Job.of(uncompiled(model), config or LoraNullConfig(), options)
    first = job.reader.read(batch, 0)
    with evaluating(job.model):
        plan, seen = plan_for(job, [first], tokens=tokens or first.positions)
    if config is None or config.train != "b_in_basis":
        return plan
    # "auto" is known with the covariances only; unpooled, the directions take no less.
    pooling = config.group_pooling if isinstance(config.group_pooling, int) else 1
    return replace(plan, later=plan_directions(seen, getattr(torch, config.basis_dtype), pooling))


def plan_for(job: Job, batches: Sequence[Batch], *, tokens: int) -> tuple[MemoryPlan, Probe]:
    """Plan for ``tokens`` tokens in ``batches`` and more of their kind; returns also what the first of them showed."""
    counted = [batch for batch in batches if batch.tokens]
    if not counted:
        raise ValueError("No token counts in the batches to plan for; expected one with tokens that the mask keeps.")
    seen = _probe(job, counted[0])
    if not job.options.low_memory:
        return plan_streaming(seen, job.collector(counted[:1]).placement), seen
    largest = max(batch.positions for batch in counted)
    return plan_walk(job, seen, job.collector(counted).placement, tokens=tokens, largest_batch=largest), seen


def _probe(job: Job, batch: Batch) -> Probe:
    """Probe the model, which may be on the ``meta`` device."""
    if not (job.reader.is_hf and next(job.model.parameters()).is_meta and not hasattr(job.model, "_hf_hook")):
        return job.probe(batch)
    inputs = inputs_on_meta(job, first_tokens(batch.inputs))
    with ExpertsOnMeta():
        return probe(job.model, inputs, job.linears, job.options.share_inputs)


def inputs_on_meta(job: Job, inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return inputs of a transformers model that lies on the device meta.

    It would look at the values of positions and masks, and there are none; it takes a mask of four dimensions and
    positions that are given as they are.
    """
    meta = torch.device("meta")
    moved: dict[str, Any] = to_device(dict(inputs), meta)
    length = moved["input_ids"].shape[1]
    moved["attention_mask"] = torch.ones(1, 1, length, length, dtype=torch.bool, device=meta)
    if "position_ids" in job.reader.parameters:
        moved.setdefault("position_ids", torch.arange(length, device=meta)[None])
    return moved


class ExpertsOnMeta(TorchDispatchMode):
    """Lets fused experts of any dtype run on the device meta.

    torch 2.13 refuses their grouped product there unless it is of bfloat16, though it computes others elsewhere.
    """

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Mapping | None = None) -> Any:
        if function is torch.ops.aten._grouped_mm.default and args[0].is_meta and args[0].dim() == 2:
            return args[0].new_empty(args[0].shape[0], args[1].shape[-1])
        return function(*args, **(kwargs or {}))

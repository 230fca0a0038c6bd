"""Run a model on calibration text and sum the second moments of its linear layers' inputs."""

from __future__ import annotations

import time
from typing import Any

from torch import nn
from tqdm.auto import tqdm

from ._accumulate import ACCUMULATORS, Placement
from ._batches import BatchReader, DataFingerprint, iterate, to_device
from ._collect import Collector
from ._logging import logger
from ._modes import evaluating, input_device
from ._observe import watching
from ._ops import symmetrize_
from .config import LoraNullConfig
from .covariances import Covariances
from .targets import output_head_names, target_linears


def calibrate(
    model: nn.Module,
    batches: Any,
    config: LoraNullConfig | None = None,
    *,
    mask: str = "attention",
    queue_tokens: int = 4096,
    accumulate: str = "fp32",
    normalize: str | None = None,
    share_inputs: bool = True,
    progress: bool = True,
) -> Covariances:
    """Sum ``C = sum_t x_t x_t^T`` over the calibration tokens for every input of the target layers."""
    config = config or LoraNullConfig()
    linears = target_linears(model, config.target_modules)
    placement = Placement(dtype=ACCUMULATORS[accumulate], queue_tokens=queue_tokens)
    collector = Collector(linears, placement, share_inputs=share_inputs, normalize=normalize)
    reader = BatchReader(model, mask, needs_head=bool(output_head_names(model) & set(linears)))
    data = DataFingerprint()
    device = input_device(model)
    tokens = 0
    start = time.perf_counter()
    with evaluating(model), watching(linears, collector.receive):
        bar = tqdm(iterate(batches, queue_tokens), desc="calibrate", unit="batch", disable=None if progress else True)
        for index, item in enumerate(bar):
            batch = reader.read(item, index)
            data.add(batch)
            if not batch.tokens:
                continue
            collector.begin(index, batch.mask)
            model(**to_device(batch.inputs, device))
            collector.end()
            tokens += batch.tokens
            bar.set_postfix_str(f"{tokens / (time.perf_counter() - start):.0f} tokens/s")
        collector.accumulator.flush()
    collector.shared.check()
    matrices, counts = {}, {}
    for key, entry in collector.accumulator.sums.items():
        entry.queue = None
        matrices[key], counts[key] = symmetrize_(entry.matrix), entry.tokens
    if not matrices:
        raise ValueError(
            "No calibration token was counted: expected batches with at least one token that its mask keeps."
        )
    groups = collector.shared.members()
    for key, matrix in matrices.items():
        if counts[key] < 2 * len(matrix):
            logger.warning("%s: %d tokens for %d features; use at least twice as many", key, counts[key], len(matrix))
    return Covariances(matrices, groups, counts, {"data": str(data), "mask": mask})

"""Calibrate through the caller's own loop: every outermost call of the model in it is a batch."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from ..models.parts import is_encoder_decoder
from .collector import Collector, combined
from .job import Job, Sums, log_plan
from .memory import plan_streaming
from .probe import unprobed


def run_callback(job: Job, run_model: Callable[[], Any]) -> Sums:
    """Sum over the calls of the model, or of its base model, that ``run_model()`` makes."""
    collector = job.collector(None)
    # Which layers share an input is not known before the first call, so this is the most that can be needed: a
    # reason to refuse only what the caller has forbidden.
    limit = job.options.memory_limit
    log_plan(plan_streaming(unprobed(job.linears), collector.placement), limit, refuse=limit is not None)
    with collector.watching(job.linears), job.bar(None) as advance, _batches_begun(job, collector, advance):
        run_model()
    collector.flush()
    return Sums(*combined(collector), data="function", left_out=collector.left_out)


@contextmanager
def _batches_begun(job: Job, collector: Collector, advance: Callable[[int], None]) -> Iterator[None]:
    """Begin and end a batch of ``collector`` with each outermost call, for the length of the block."""
    roots = _roots(job.model)
    signatures = {root: inspect.signature(root.forward) for root in roots}
    depth, index, tokens = 0, 0, 0

    def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
        nonlocal depth, tokens
        depth += 1
        if depth == 1:
            bound = signatures[module].bind_partial(*args, **kwargs).arguments
            inputs = {**bound, **bound.get("kwargs", {})}
            job.reader.check_ids(inputs, index)
            collector.begin(index, job.reader.rule.read(inputs, index))
            ids = next((value for value in inputs.values() if isinstance(value, Tensor)), None)
            tokens = 0 if ids is None else ids.shape[:2].numel()

    def after(module: nn.Module, args: tuple, output: Any) -> None:
        nonlocal depth, index
        depth -= 1
        if depth == 0:
            # output is None when the forward raised; its error is on its way already
            if output is None:
                collector.leave()
            else:
                collector.end()
                advance(tokens)
            index += 1

    handles = []
    try:
        for root in roots:
            handles.append(root.register_forward_pre_hook(before, with_kwargs=True))
            handles.append(root.register_forward_hook(after, always_call=True))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _roots(model: Any) -> list[nn.Module]:
    """Return the modules that a loop may call with token ids: the model, what it wraps, and its encoder or decoder.

    ``generate`` of an encoder-decoder model calls the encoder by itself, that of a PEFT model the model within.
    """
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    roots = [model, getattr(model, "base_model", model), inner, getattr(inner, "base_model", inner)]
    if is_encoder_decoder(inner):
        roots.append(inner.get_encoder())
    elif hasattr(inner, "get_decoder"):
        roots.append(inner.get_decoder())
    return list(dict.fromkeys(roots))

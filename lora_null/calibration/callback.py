"""Calibrate through the caller's own loop."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from .collector import combined
from .job import Job, Sums, _log_plan
from .memory import plan_streaming, unobserved
from .shared_inputs import watching


def run_function(job: Job, run_model: Callable[[], Any], memory_limit: int | None) -> Sums:
    """Sum over the calls of the model that ``run_model()`` makes."""
    linears, placement = job.collector.linears, job.collector.accumulator.placement
    # Which layers share an input is not known before the first call, so this is the most that can be needed: a
    # reason to refuse only what the caller has forbidden.
    _log_plan(plan_streaming(unobserved(linears), placement), memory_limit, refuse=memory_limit is not None)
    with watching(linears, job.collector.receive):
        run_callback(job, run_model)
    return Sums(*combined(job.collector), data="function")


def run_callback(job: Job, run_model: Callable[[], Any]) -> None:
    """Let the caller run the model; each outermost call of it, or of its base model, is one batch."""
    model, depth, index = job.model, 0, 0
    roots = list(dict.fromkeys([model, getattr(model, "base_model", model)]))
    signatures = {root: inspect.signature(root.forward) for root in roots}

    with job.bar(None) as advance:
        tokens = 0

        def before(module: nn.Module, args: tuple, kwargs: dict) -> None:
            nonlocal depth, tokens
            depth += 1
            if depth == 1:
                bound = signatures[module].bind_partial(*args, **kwargs).arguments
                inputs = {**bound, **bound.get("kwargs", {})}
                job.reader.check_ids(inputs, index)
                job.collector.begin(index, job.reader.mask(inputs, index))
                ids = next((value for value in inputs.values() if isinstance(value, Tensor)), None)
                tokens = 0 if ids is None else ids.shape[:2].numel()

        def after(module: nn.Module, args: tuple, output: Any) -> None:
            nonlocal depth, index
            depth -= 1
            if depth == 0:
                # output is None when the forward raised; its error is on its way already
                if output is not None:
                    job.end_batch(index)
                    advance(tokens)
                index += 1

        handles = []
        try:
            for root in roots:
                handles.append(root.register_forward_pre_hook(before, with_kwargs=True))
                handles.append(root.register_forward_hook(after, always_call=True))
            run_model()
        finally:
            for handle in handles:
                handle.remove()
    job.collector.accumulator.flush()

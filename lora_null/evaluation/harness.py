"""Tasks of lm-evaluation-harness on the live model."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .intervals import Estimate, Paired, paired
from .pretrained import pretrained


def run_tasks(
    model: Any, base: Any | None, tokenizer: Any, tasks: Sequence[Any], batch_size: int, resampling: dict[str, int]
) -> dict[str, dict[str, Paired]]:
    """Run the harness on the pre-trained and on the tuned model.

    Returns:
        Task to measure, as ``"acc,none"``, to its figures. A measure that is the mean of one number per document has
        intervals, paired by document; of others, such as a perplexity, the harness' own value stands alone.

    Raises:
        ImportError: The harness is not installed.
    """
    try:
        import lm_eval
        from lm_eval.models.huggingface import HFLM
        from lm_eval.tasks import TaskManager
    except ImportError as error:
        raise ImportError(
            "lm_eval_tasks needs lm-evaluation-harness, which is not installed here: pip install lm-eval, or leave "
            "lm_eval_tasks out."
        ) from error
    # Reading the harness' 14,000 task files takes half a minute: not twice, and not for tasks given whole.
    known = TaskManager(include_defaults=any(isinstance(task, str) for task in tasks))
    found = []
    for context in (pretrained(model, base), nullcontext(model)):
        with context as chosen, _generators_kept():
            harness = HFLM(pretrained=chosen, tokenizer=tokenizer, batch_size=batch_size)
            found.append(
                lm_eval.simple_evaluate(model=harness, tasks=list(tasks), bootstrap_iters=0, task_manager=known)
            )
    before, after = found
    return {
        task: {key: _pair(before, after, task, key, resampling) for key in values if _is_measure(key, values[key])}
        for task, values in before["results"].items()
    }


def _is_measure(key: str, value: Any) -> bool:
    return "," in key and "_stderr," not in key and isinstance(value, float | int)


def _pair(before: Any, after: Any, task: str, key: str, resampling: dict[str, int]) -> Paired:
    values = [float(run["results"][task][key]) for run in (before, after)]
    columns = [_by_document(run["samples"].get(task, ()), key) for run in (before, after)]
    means = all(len(c) and abs(float(c.mean()) - v) < 1e-6 for c, v in zip(columns, values, strict=True))
    if means and len(columns[0]) == len(columns[1]):
        return paired(columns[0], columns[1], torch.ones(len(columns[0])), **resampling)
    return Paired(Estimate(values[0]), Estimate(values[1]), Estimate(values[1] - values[0]))


def _by_document(samples: Sequence[dict[str, Any]], key: str) -> Tensor:
    """Return one number per document, in their order; empty where a measure has none."""
    metric, _, name = key.partition(",")
    chosen = sorted((s for s in samples if s.get("filter") == name and metric in s), key=lambda s: s["doc_id"])
    values = [s[metric] for s in chosen]
    numbers = all(isinstance(value, float | int) for value in values)
    return torch.tensor(values if numbers else [], dtype=torch.float64)


@contextmanager
def _generators_kept() -> Iterator[None]:
    # The harness seeds the global generators, which a training run around us draws from.
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng():
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)

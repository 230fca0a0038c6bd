"""Many null spaces at once, overlapped."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..system.log import logger
from .null_space import NullSpace, null_space
from .overlapped import Key, Task, overlapped


def null_spaces(
    covariances: Iterable[tuple[Key, Tensor]] | Mapping[Key, Tensor],
    r: int,
    *,
    task: Mapping[Key, Tensor] | None = None,
    workers: int | None = None,
    progress: bool = True,
    **options: Any,
) -> Iterator[tuple[Key, NullSpace]]:
    """Solve many covariances, overlapping them where that helps.

    On the CPU each worker solves one matrix with its share of torch's threads; on CUDA each has its own stream, so
    that the host work of one solve hides behind the kernels of another. On the CPU matrices from ``d`` = 8192 on are
    solved one after another with all threads, unless ``workers`` is given. At most ``workers + 1`` matrices are in
    memory at a time, and ``covariances`` is read only as far as needed, in the calling thread.

    Args:
        covariances: :class:`lora_null.Covariances`, another mapping of keys to matrices, or pairs of a key and a
            matrix.
        r: As for :func:`null_space`.
        task: Covariances of the task's text under the same keys, in a mapping or :class:`lora_null.Covariances`.
        workers: Matrices solved at the same time; ``None`` means 2, or 1 where torch has one thread.
        progress: Show a progress bar.
        **options: Passed on to :func:`null_space`.

    Yields:
        ``(key, NullSpace)`` in the order of the input.

    Raises:
        TypeError: ``covariances`` or ``task`` is nothing of the kind, or an item is no pair.
        ValueError: ``task`` has no matrix for a key.
        TypeError, ValueError: as :func:`null_space` does, with the key of the matrix in front.
    """
    if workers is not None and workers < 1:
        raise ValueError(f"null_spaces: workers is {workers}; expected at least 1.")
    if not isinstance(covariances, Iterable):
        raise TypeError(
            f"null_spaces: covariances is a {type(covariances).__name__}; expected lora_null.Covariances, another "
            "mapping, or pairs of a key and a matrix."
        )
    if task is not None and not (hasattr(task, "__getitem__") and hasattr(task, "keys")):
        raise TypeError(
            f"null_spaces: task is a {type(task).__name__}; expected lora_null.Covariances or another mapping with the "
            "keys of covariances: each matrix has its own. Collect it with lora_null.calibrate on the task's text."
        )
    total = len(covariances) if isinstance(covariances, Sized) else None
    tasks = _tasks(covariances, r, task, options)
    found = overlapped(
        tasks, lambda space: [space.basis], what="null spaces", workers=workers, total=total, progress=progress
    )
    for key, space in found:
        logger.debug("null space of %s: %s", key, space.info)
        yield key, space


def _tasks(
    covariances: Iterable[Any], r: int, task: Mapping[Key, Tensor] | None, options: dict[str, Any]
) -> Iterator[Task[Key, NullSpace]]:
    pairs: Iterable[Any] = covariances.items() if hasattr(covariances, "items") else covariances
    for pair in pairs:
        if not isinstance(pair, tuple | list) or len(pair) != 2:
            raise TypeError(
                f"null_spaces: an item of covariances is a {type(pair).__name__}; expected pairs of a key and a "
                "matrix. For matrices without keys pass enumerate(matrices), for a single one call null_space."
            )
        key, C = pair
        own = options if task is None else {**options, "task": _task_of(task, key)}
        device, d = (C.device, C.shape[-1]) if isinstance(C, Tensor) and C.dim() else (torch.device("cpu"), 0)
        yield key, device, d, partial(null_space, C, r, **own)
        del C, pair, own


def _task_of(task: Mapping[Key, Tensor], key: Key) -> Tensor:
    try:
        return task[key]
    except KeyError:
        raise ValueError(
            f"{key}: null_spaces: task has no matrix for this key; expected one for each of covariances. Was the "
            "task's text run through another model, or did none of its tokens reach this layer?"
        ) from None

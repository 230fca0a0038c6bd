"""Many null spaces at once, overlapped."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sized
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

from ..system.log import logger
from .null_space import NullSpace, null_space

Key = TypeVar("Key", bound=Hashable)


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
    that the host work of one solve hides behind the kernels of another. At most ``workers + 1`` matrices are in
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
    threads = torch.get_num_threads()
    workers = (2 if threads > 1 else 1) if workers is None else workers
    if workers < 1:
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
    pending: deque[tuple[Key, Future[NullSpace]]] = deque()
    pool = ThreadPoolExecutor(workers, "null_space", torch.set_num_threads, (max(1, threads // workers),))
    bar = tqdm(total=total, desc="null spaces", unit="matrix", disable=not progress)
    pairs: Iterable[Any] = covariances.items() if hasattr(covariances, "items") else covariances
    try:
        for pair in pairs:
            if not isinstance(pair, tuple | list) or len(pair) != 2:
                raise TypeError(
                    f"null_spaces: an item of covariances is a {type(pair).__name__}; expected pairs of a key and a "
                    "matrix. For matrices without keys pass enumerate(matrices), for a single one call null_space."
                )
            key, C = pair
            caller = torch.cuda.current_stream(C.device) if isinstance(C, Tensor) and C.is_cuda else None
            own = options if task is None else {**options, "task": _task_of(task, key)}
            pending.append((key, pool.submit(_solve_one, key, C, r, own, caller)))
            del C, pair, own
            if len(pending) > workers:
                yield _next(pending, bar)
        while pending:
            yield _next(pending, bar)
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        # The workers' setting is also the default of threads that torch starts later.
        torch.set_num_threads(threads)


def _task_of(task: Mapping[Key, Tensor], key: Key) -> Tensor:
    try:
        return task[key]
    except KeyError:
        raise ValueError(
            f"{key}: null_spaces: task has no matrix for this key; expected one for each of covariances. Was the "
            "task's text run through another model, or did none of its tokens reach this layer?"
        ) from None


def _next(pending: deque[tuple[Key, Future[NullSpace]]], bar: tqdm) -> tuple[Key, NullSpace]:
    key, future = pending.popleft()
    result = future.result()
    bar.update()
    logger.debug("null space of %s: %s", key, result.info)
    return key, result


_streams = threading.local()


def _own_stream(device: torch.device) -> Any:
    # One per thread: freed memory is kept for the stream that it was allocated on, gigabytes for each solve.
    streams = _streams.__dict__.setdefault("by_device", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def _solve_one(key: Hashable, C: Tensor, r: int, options: dict[str, Any], caller: Any) -> NullSpace:
    try:
        if caller is None:
            return null_space(C, r, **options)
        stream = _own_stream(C.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            result = null_space(C, r, **options)
        # The caller uses the basis on its own stream, and may still do so when it has dropped it.
        stream.synchronize()
        result.basis.record_stream(caller)
        return result
    except (TypeError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from error

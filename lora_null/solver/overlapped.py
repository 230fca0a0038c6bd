"""Solves at the same time: threads on the CPU, streams on CUDA."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, TypeVar

import torch
from torch import Tensor
from tqdm.auto import tqdm

Key = TypeVar("Key", bound=Hashable)
Result = TypeVar("Result")
# A key, where the matrix lies and its side d, and the work.
Task = tuple[Key, torch.device, int, Callable[[], Result]]
# On the CPU a matrix of this side gets all threads. Two at a time would save 13 % (26 % at 4096, with two threads) for
# twice the largest workspace of all; and where one layer is solved after another there is no second one, and half of
# the threads would idle. It goes by d alone, so that a matrix gives the same bits whatever is solved beside it.
ALONE = 8192


def overlapped(
    tasks: Iterable[Task[Key, Result]],
    held: Callable[[Result], Iterable[Tensor]],
    *,
    what: str,
    workers: int | None = None,
    total: int | None = None,
    progress: bool = True,
) -> Iterator[tuple[Key, Result]]:
    """Do tasks in order, several at a time, and yield the key and result of each.

    On the CPU each worker has its share of torch's threads, and matrices of side ``ALONE`` or more are waited for and
    get all of them, unless ``workers`` is given; on CUDA each worker has its own stream, so that the host work of one
    hides behind the kernels of another. At most ``workers + 1`` tasks or their results are alive, and ``tasks`` is read
    only as far as needed, in the calling thread.

    Args:
        tasks: What to do.
        held: Returns the tensors of a result.
        what: Of the progress bar.
        workers: ``None`` means 2, or 1 where torch has one thread.
        total: How many tasks there are.
        progress: Show a progress bar.

    Raises:
        TypeError, ValueError: as a task does, with its key in front.
    """
    threads, chosen = torch.get_num_threads(), workers is not None
    workers = (2 if threads > 1 else 1) if workers is None else workers
    pending: deque[tuple[Key, Future[Result]]] = deque()
    pool = ThreadPoolExecutor(workers, "solver", torch.set_num_threads, (max(1, threads // workers),))
    bar = tqdm(total=total, desc=what, unit="matrix", disable=not progress)

    def first() -> tuple[Key, Result]:
        key, future = pending.popleft()
        result = future.result()
        bar.update()
        return key, result

    try:
        for key, device, d, work in tasks:
            if device.type == "cpu" and d >= ALONE and not chosen:
                while pending:
                    yield first()
                result = _do(key, work, held, None)
                del work
                bar.update()
                yield key, result
                continue
            caller = torch.cuda.current_stream(device) if device.type == "cuda" else None
            pending.append((key, pool.submit(_do, key, work, held, caller)))
            del work
            if len(pending) > workers:
                yield first()
        while pending:
            yield first()
    finally:
        pool.shutdown(cancel_futures=True)
        bar.close()
        # The workers' setting is also the default of threads that torch starts later.
        torch.set_num_threads(threads)


_streams = threading.local()


def _own_stream(device: torch.device) -> Any:
    # One per thread: freed memory is kept for the stream that it was allocated on, gigabytes for each solve.
    streams = _streams.__dict__.setdefault("by_device", {})
    if device not in streams:
        streams[device] = torch.cuda.Stream(device)
    return streams[device]


def _do(key: Hashable, work: Callable[[], Result], held: Callable[[Result], Iterable[Tensor]], caller: Any) -> Result:
    try:
        if caller is None:
            return work()
        stream = _own_stream(caller.device)
        stream.wait_stream(caller)
        with torch.cuda.stream(stream):
            result = work()
        # The caller uses the tensors on its own stream, and may still do so when it has dropped them.
        stream.synchronize()
        for tensor in held(result):
            tensor.record_stream(caller)
        return result
    except (TypeError, ValueError) as error:
        raise type(error)(f"{key}: {error}") from error

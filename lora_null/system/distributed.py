"""Several processes: each reads its share of the data, sums are added up, solves are divided."""

from __future__ import annotations

import atexit
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from itertools import islice
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


class OtherProcessFailed(RuntimeError):
    """Another process of the group has raised an error.

    Attributes:
        refused: It was a ValueError: the same arguments would be refused again.
    """

    def __init__(self, message: str, refused: bool = False):
        super().__init__(message)
        self.refused = refused


def rank_and_size() -> tuple[int, int]:
    """Return this process's rank and the number of processes; ``(0, 1)`` without ``torch.distributed``."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def share_of(items: Iterable[T]) -> Iterator[T]:
    """Yield every ``size``-th item, starting with the ``rank``-th: this process's share."""
    rank, size = rank_and_size()
    return islice(items, rank, None, size)


def is_shared_out(batches: Any) -> bool:
    """Tell whether a DataLoader gives each process its own part already."""
    from torch.utils.data.distributed import DistributedSampler

    samplers = (getattr(batches, "sampler", None), getattr(getattr(batches, "batch_sampler", None), "sampler", None))
    return any(isinstance(sampler, DistributedSampler) for sampler in samplers)


def exchange(value: Any, error: BaseException | None = None) -> list[Any]:
    """Give ``value`` to all processes and return everybody's, in rank order.

    A process that has failed takes part once with its ``error``; the others then raise instead of waiting for it
    for ever.

    Raises:
        OtherProcessFailed: Another process has failed; the message names it and its error.
    """
    size = rank_and_size()[1]
    if size == 1:
        return [value]
    failure = None if error is None else (f"{type(error).__name__}: {error}", isinstance(error, ValueError))
    answers: list[Any] = [None] * size
    dist.all_gather_object(answers, (value, failure))
    _outlive_threads()
    if error is None:
        for other, (_, failed) in enumerate(answers):
            if failed is not None:
                raise OtherProcessFailed(f"Stopped because process {other} failed with {failed[0]}", failed[1])
    return [answer for answer, _ in answers]


@cache
def _outlive_threads() -> None:
    """Give gloo's threads a tenth of a second at the end of the program to release the last exchange's tensors.

    One that does so after the interpreter has begun to shut down aborts the process, whose work is done: 7 of 144
    programs under FSDP2, which keeps the group alive, on a busy machine (torch 2.13, pytorch#179291).
    """
    atexit.register(time.sleep, 0.1)


@contextmanager
def announcing_failure() -> Iterator[None]:
    """Tell the other processes, which wait in :func:`exchange`, of an error raised in the block; once, if nested."""
    try:
        yield
    except OtherProcessFailed:
        raise
    except Exception as error:
        if not vars(error).get("announced"):
            vars(error)["announced"] = True
            exchange(None, error)
        raise


def in_first_process(work: Callable[[], Any]) -> None:
    """Do ``work`` in the first process only; all call this, and return when it is done or raise if it failed."""
    with announcing_failure():
        if rank_and_size()[0] == 0:
            work()
    exchange(None)


def require_lockstep(batches: int | None) -> None:
    """Refuse shares that differ: a sharded model runs in all processes at the same time, or waits for ever.

    Args:
        batches: How many batches this process has; ``None`` if it cannot know.

    Raises:
        ValueError: Not all processes have as many.
    """
    counts = exchange(batches)
    if len(counts) == 1:
        return
    if None in counts or len(set(counts)) > 1:
        raise ValueError(
            f"The model is sharded, and the processes have {counts} batches to run; expected the same known number in "
            "each, since all of them have to run the model together. Pass a list or DataLoader whose length is a "
            "multiple of the number of processes, or calibrate before sharding."
        )


def add_up(matrix: Tensor) -> Tensor:
    """Replace ``matrix`` in place by its sum over all processes."""
    if rank_and_size()[1] == 1:
        return matrix
    wanted = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")
    carried = matrix.to(wanted)
    dist.all_reduce(carried)
    return matrix if carried is matrix else matrix.copy_(carried)


def divide(costs: Mapping[str, float]) -> list[str]:
    """Choose this process's keys so that all processes have about equal cost.

    The costliest key goes to the least loaded process, and so on: deterministic, without communication.

    Args:
        costs: Key to cost, the same in all processes; an eigenproblem of size ``d`` costs ``d^3``.

    Returns:
        The keys of this process, in the order of ``costs``.
    """
    rank, size = rank_and_size()
    loads = [0.0] * size
    mine = set()
    for key in sorted(costs, key=lambda key: -costs[key]):
        least = loads.index(min(loads))
        loads[least] += costs[key]
        if least == rank:
            mine.add(key)
    return [key for key in costs if key in mine]


def gather(results: Mapping[str, T]) -> dict[str, T]:
    """Merge the results of all processes, each computed for the keys of its :func:`divide`.

    Tensors travel through the CPU.
    """
    merged: dict[str, T] = {}
    for part in exchange(dict(results)):
        merged.update(part)
    return merged

"""Several processes of one command, as ``torchrun`` starts them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def joined() -> Iterator[bool]:
    """Join the other processes, if there are any, for the length of the block; yields whether this is the first.

    They exchange sums through the CPU, over gloo. Where one fails, it says why, and the others end without a word.
    """
    import torch
    import torch.distributed as dist

    from ..system.distributed import OtherProcessFailed, rank_and_size
    from ..system.environment import launched

    rank, size = launched()
    starts = dist.is_available() and not dist.is_initialized() and size > 1
    if starts:
        if torch.cuda.is_available():
            torch.cuda.set_device(rank % torch.cuda.device_count())
        dist.init_process_group("gloo")
    try:
        yield rank_and_size()[0] == 0
    except OtherProcessFailed:
        sys.exit(2)
    finally:
        if starts:
            dist.destroy_process_group()

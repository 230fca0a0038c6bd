"""The options of a calibration, checked once and carried as one value."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import torch

from .accumulator import ACCUMULATORS, Placement
from .masks import MASK_RULES


@dataclass(frozen=True)
class Options:
    """What :func:`lora_null.calibrate` was asked for; its arguments of the same names are documented there.

    Raises:
        ValueError: One of them is out of range.
    """

    mask: str = "attention"
    checkpoint: str | os.PathLike | None = None
    checkpoint_every: int = 32
    device: str | torch.device | None = None
    offload: str | None = None
    low_memory: bool = False
    memory_limit: int | None = None
    queue_tokens: int = 4096
    accumulate: str = "fp32"
    share_inputs: bool = True
    shard: bool | None = None
    progress: bool = True

    def __post_init__(self) -> None:
        known = {"mask": MASK_RULES, "accumulate": tuple(ACCUMULATORS), "offload": (None, "cpu")}
        for name, values in known.items():
            if getattr(self, name) not in values:
                raise ValueError(f"{name} is {getattr(self, name)!r}; expected one of {values}.")
        for name in ("checkpoint_every", "queue_tokens"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} is {value!r}; expected a positive integer.")

    @property
    def checkpoint_path(self) -> Path | None:
        """The file for the sums in progress."""
        return None if self.checkpoint is None else Path(self.checkpoint)

    @property
    def hidden_device(self) -> torch.device | None:
        """Device for the hidden states between the passes of ``low_memory``; ``None``: where the layers leave them."""
        return torch.device("cpu") if self.offload == "cpu" else None

    def placement(self, queue: bool) -> Placement:
        """Say where and how each sum is kept; ``queue``: there are inputs too short for a launch of their own."""
        compute = None if self.device is None else torch.device(self.device)
        if compute == torch.device("cuda") and torch.cuda.is_available():
            # tensors name their device with its number
            compute = torch.device("cuda", torch.cuda.current_device())
        store = torch.device("cpu") if self.offload == "cpu" and not self.low_memory else None
        return Placement(ACCUMULATORS[self.accumulate], compute, store, self.queue_tokens, queue)

    def key(self) -> dict[str, str]:
        """Return what decides the bits of the sums, as readable strings: a checkpoint is continued under these only."""
        return {
            "mask": self.mask,
            "accumulate": self.accumulate,
            # an option that is gone; checkpoints written with it name its default
            "normalize": "None",
            "share_inputs": str(self.share_inputs),
            "queue_tokens": str(self.queue_tokens),
            "checkpoint_every": str(self.checkpoint_every),
            "low_memory": str(self.low_memory),
        }

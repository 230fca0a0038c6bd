"""What a run of the quickstart is made of; the command line has a flag for each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..config import helped
from ..models.settings import Loading


@dataclass(frozen=True)
class Settings(Loading):
    """The settings of :func:`lora_null.quickstart.run.run`, with the help of their flags.

    ``output`` keeps the results of one run, the newest. ``seed`` is that of the adapters' random start, of the training
    problems and of their order. The held-out questions asked are evenly spread over countries and kinds.
    """

    model: str | None = helped("Your own model; default: SmolLM2-135M-Instruct, from PyPI.", None)
    data: Path | None = helped("Your own calibration text; default: questions on countries.", None)
    output: Path = helped("Folder for adapter and results.", Path(".quickstart"))
    r: int = helped("Rank of the adapters.", 32)
    steps: int = helped("Optimiser steps of each training run.", 32)
    batch_size: int = helped("Word problems per step.", 6)
    learning_rate: float = helped("Peak learning rate of both methods.", 3e-3)
    questions: int = helped("Held-out questions asked.", 400)
    seed: int = helped("Seed of every random choice.", 0)
    dtype: str = helped("auto: float32 on a CPU, bfloat16 on a GPU.", "auto")
    progress: bool = helped("Show progress bars.", True)

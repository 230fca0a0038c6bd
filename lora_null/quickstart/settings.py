"""What a run of the quickstart is made of; the command line has a flag for each."""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from .._cli_options import Device, Progress, Rank, Seed


@dataclass(frozen=True)
class Settings:
    """The settings of :func:`lora_null.quickstart.run.run`, with the help of their flags.

    ``output`` keeps the results of one run, the newest. ``seed`` is that of the adapters' random start, of the training
    problems and of their order. The held-out questions asked are evenly spread over countries and kinds.
    """

    model: Annotated[str | None, typer.Option(help="Your own model; default: SmolLM2-135M-Instruct, from PyPI.")] = None
    data: Annotated[Path | None, typer.Option(help="Your own calibration text; default: questions on countries.")] = (
        None
    )
    output: Annotated[Path, typer.Option(help="Folder for adapter and results.")] = Path(".quickstart")
    r: Rank = 32
    steps: Annotated[int, typer.Option(help="Optimiser steps of each training run.")] = 32
    batch_size: Annotated[int, typer.Option(help="Word problems per step.")] = 6
    learning_rate: Annotated[float, typer.Option(help="Peak learning rate of both methods.")] = 3e-3
    questions: Annotated[int, typer.Option(help="Held-out questions asked.")] = 400
    seed: Seed = 0
    device: Device = "auto"
    dtype: Annotated[str, typer.Option(help="auto: float32 on a CPU, bfloat16 on a GPU.")] = "auto"
    progress: Progress = True

"""Every question by its name, most valuable first."""

from __future__ import annotations

from ..harness import Question


def registry(device: str = "cpu") -> dict[str, Question]:
    """Return the known questions in the order that suits the device."""
    from .covariance import Covariance
    from .factorize import Factorize
    from .growth import Growth
    from .initialization import Initialization
    from .layer import DecoderLayer
    from .linear import Linear
    from .linear_group import LinearGroup
    from .null_space import NullSpaces
    from .training import TrainingStep

    on_gpu = (
        Linear(),
        Covariance(),
        TrainingStep(),
        NullSpaces(),
        Initialization(),
        LinearGroup(),
        DecoderLayer(),
        Factorize(),
        Growth(),
    )
    # A CPU is where null spaces are solved today, and where models are only cut-down ones.
    on_cpu = ("null-space", "covariance", "factorize", "linear-group", "linear", "initialization", "training", "layer")
    named = {question.name: question for question in on_gpu}
    first = () if device == "cuda" else on_cpu
    return {name: named[name] for name in dict.fromkeys((*first, *named))}

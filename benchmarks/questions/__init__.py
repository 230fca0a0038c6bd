"""Every question by its name, most valuable first."""

from __future__ import annotations

from ..harness import Question


def registry() -> dict[str, Question]:
    """Return the known questions."""
    from .covariance import Covariance
    from .factorize import Factorize
    from .growth import Growth
    from .initialization import Initialization
    from .layer import DecoderLayer
    from .linear import Linear
    from .linear_group import LinearGroup
    from .null_space import NullSpaces
    from .training import TrainingStep

    questions = (
        Linear(),
        TrainingStep(),
        Initialization(),
        Covariance(),
        NullSpaces(),
        LinearGroup(),
        DecoderLayer(),
        Factorize(),
        Growth(),
    )
    return {question.name: question for question in questions}

"""What a model does not know after fine-tuning: posteriors over LoRA adapters, and honest probabilities from them.

After training, for any adapter, ours or plain PEFT: :func:`tfb` and :func:`laplace` return a :class:`Posterior`. In
training: :func:`inducing` or :func:`blob` before, :func:`added_loss` during, :func:`collect` after it.
"""

from ..evaluation.metrics import Bin, Scores, calibration_error, reliability, scores
from .laplace import laplace
from .objective import added_loss, trainer_loss
from .posterior import Posterior
from .tfb import tfb
from .training import blob, collect, inducing

__all__ = [
    "Bin",
    "Posterior",
    "Scores",
    "added_loss",
    "blob",
    "calibration_error",
    "collect",
    "inducing",
    "laplace",
    "reliability",
    "scores",
    "tfb",
    "trainer_loss",
]

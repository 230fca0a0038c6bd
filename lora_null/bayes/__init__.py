"""What a model does not know after fine-tuning: posteriors over LoRA adapters, and honest probabilities from them.

After training, for any adapter, ours or plain PEFT: :func:`tfb` and :func:`laplace` return a :class:`Posterior`.
"""

from ..evaluation.metrics import Bin, Scores, calibration_error, reliability, scores
from .laplace import laplace
from .posterior import Posterior
from .tfb import tfb

__all__ = [
    "Bin",
    "Posterior",
    "Scores",
    "calibration_error",
    "laplace",
    "reliability",
    "scores",
    "tfb",
]

"""From texts to covariances: the model runs over batches, and the inputs of its layers are summed."""

from .calibrate import calibrate
from .memory_plan import memory_plan
from .own_text import own_text
from .texts import text_batches

__all__ = ["calibrate", "memory_plan", "own_text", "text_batches"]

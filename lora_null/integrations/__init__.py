"""For other people's training programs: callbacks for transformers' trainers, a plugin for axolotl."""

from .callback import KeepFrozen
from .retention import RetentionCallback

__all__ = ["KeepFrozen", "RetentionCallback"]

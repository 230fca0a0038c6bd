"""For other people's training programs: a callback for transformers' trainers, a plugin for axolotl."""

from .callback import KeepFrozen

__all__ = ["KeepFrozen"]

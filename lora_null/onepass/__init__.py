"""From a model on disk to an adapter, one decoder layer at a time: calibrated, solved and dropped."""

from .initialize import initialize_streaming

__all__ = ["initialize_streaming"]

"""Adapted layers, and adapters from their start to their files: initialize, save, load, merge, export."""

from .export import export_adapter
from .initialize import initialize
from .layer import LoraNullLinear
from .load import load_adapter
from .merge import merge
from .save import save_adapter

__all__ = ["LoraNullLinear", "export_adapter", "initialize", "load_adapter", "merge", "save_adapter"]

"""The version, in a file that imports nothing: setup.py reads it as text."""

__version__ = "0.1.0"

"""Covariances of layer inputs, in memory and in files: all that passes from calibration to adapters."""

from .covariances import Covariances

__all__ = ["Covariances"]

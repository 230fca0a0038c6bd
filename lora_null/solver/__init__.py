"""From a covariance to its null space and to the factors of an adapter."""

from .factorize import factorize
from .null_basis import NullBasis, null_basis
from .null_space import NullSpace, null_space
from .null_spaces import null_spaces

__all__ = ["NullBasis", "NullSpace", "factorize", "null_basis", "null_space", "null_spaces"]

"""Operations on tensors, their plain-torch references and the choice between implementations."""

from .covariance import covariance_backend, covariance_update, covariance_update_reference, symmetrize_

__all__ = ["covariance_backend", "covariance_update", "covariance_update_reference", "symmetrize_"]

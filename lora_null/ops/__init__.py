"""Operations on tensors, their plain-torch references and the choice between implementations."""

from .covariance import covariance_update, symmetrize_
from .dispatch import covariance_backend, explain
from .linear import lora_linear, lora_linear_and_projection, lora_up_linear
from .reference import covariance_update_reference
from .reference import lora_linear as lora_linear_reference
from .reference import lora_up_linear as lora_up_linear_reference

__all__ = [
    "covariance_backend",
    "covariance_update",
    "covariance_update_reference",
    "explain",
    "lora_linear",
    "lora_linear_and_projection",
    "lora_linear_reference",
    "lora_up_linear",
    "lora_up_linear_reference",
    "symmetrize_",
]

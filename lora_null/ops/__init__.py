"""Differentiable operations on tensors, their plain-torch references and the choice between implementations."""

"""How negative the least eigenvalue of a singular sum in fp32 gets."""

import torch

from . import Found

SOURCE = "lora_null/solver/checks.py"
QUOTE = "A float32 sum of activations has eigenvalues down to about -1e-7 of the largest"
TIMED = False


def measure() -> Found:
    """Sum over 1e5 tokens whose 512 features follow from 64."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(64, 512, generator=generator)
    C = torch.zeros(512, 512)
    for _ in range(100):
        x = torch.randn(1000, 64, generator=generator) @ mixing
        C += x.T @ x
    values = torch.linalg.eigvalsh(C.double())
    return {"least eigenvalue over the largest": (-1e-7, float(values[0] / values[-1]))}

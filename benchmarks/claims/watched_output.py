"""The cosine between what a layer returns and ``x W^T``."""

import torch

from . import Found

SOURCE = "lora_null/calibration/watching.py"
QUOTE = "as in BitNet, leave 0.9 (of normal ones), a softmax of the product 0.3 to 0.6"
TIMED = False


def measure() -> Found:
    """Compute both from random weights and inputs, softmax at two sizes of the product."""
    generator = torch.Generator().manual_seed(0)
    x, W = torch.randn(64, 512, generator=generator), torch.randn(512, 512, generator=generator) * 512**-0.5
    y = x @ W.T
    scale = W.abs().mean()
    outputs = {"three values": (0.9, x @ ((W / scale).round().clamp(-1, 1) * scale).T)}
    outputs |= {f"softmax of std {std}": (claimed, (std * y).softmax(-1)) for std, claimed in ((0.3, 0.3), (1.0, 0.6))}
    cosine = torch.nn.functional.cosine_similarity
    return {name: (claimed, float(cosine(z.flatten(), y.flatten(), dim=0))) for name, (claimed, z) in outputs.items()}

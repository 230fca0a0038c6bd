"""What a training step costs where A learns within its free directions, beside one where A learns freely."""

import torch
from torch import nn

from . import Found, milliseconds

SOURCE = "lora_null/adapters/basis.py"
QUOTE = "a step of 1.03 times one in"
TIMED = True

# Inputs, outputs and how many layers read the same, of llama-3.2-1b; a third of the directions is free.
SHAPES = {"q, k, v": (2048, (2048, 512, 512)), "gate, up": (2048, (8192, 8192)), "down": (8192, (2048,))}
TOKENS, R = 512, 32


def measure() -> Found:
    """Time forward, backward and a step of AdamW for each group of layers, in fp32."""
    from lora_null.adapters.basis import BasisFactor, FreeDirections
    from lora_null.adapters.layer import attach_adapter
    from lora_null.solver.null_basis import NullBasis

    found: Found = {}
    sums = {"ab": 0.0, "b_in_basis": 0.0}
    for name, (d, outs) in SHAPES.items():
        k = d // 3
        # Any orthonormal columns cost the same.
        N = torch.linalg.qr(torch.randn(d, k))[0]
        free = FreeDirections(NullBasis(N, None, k, torch.zeros(d), 0.0))
        steps = {}
        for kind in ("ab", "b_in_basis"):
            layers = []
            for m in outs:
                A, B = torch.randn(R, k) @ N.mT, 0.01 * torch.randn(m, R)
                factor = BasisFactor(A, free) if kind == "b_in_basis" else A
                layers.append(attach_adapter(nn.Linear(d, m, bias=False), factor, B, train_a=True))
            steps[kind] = _step(layers, torch.randn(TOKENS, d, requires_grad=True))
        times = milliseconds(steps)
        found[name] = 1.10 if name == "down" else 1.03, times["b_in_basis"] / times["ab"]
        sums = {kind: sums[kind] + times[kind] for kind in sums}
    found["all of them"] = 1.03, sums["b_in_basis"] / sums["ab"]
    return found


def _step(layers: list, x: torch.Tensor):
    optimizer = torch.optim.AdamW([p for layer in layers for p in layer.parameters() if p.requires_grad], lr=1e-4)

    def step() -> None:
        sum(layer(x).sum() for layer in layers).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step

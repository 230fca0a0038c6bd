"""What one rounded factor for several layers costs, and how far from orthogonal random rows are."""

import torch

from . import Found

SOURCE = "lora_null/adapters/projection.py"
QUOTE = "it puts 100 times a layer's own error into its output if they are 100 times larger"
TIMED = False


def measure() -> Found:
    """Project activations that are 100 times larger outside of the rows of A; r = d / 16 for the condition number."""
    generator = torch.Generator().manual_seed(0)
    d, r = 512, 32
    Q, _ = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64))
    basis = Q[:, :r].T
    M = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64))[0]
    scales = torch.ones(d, dtype=torch.float64)
    scales[r:] = 100.0
    x = torch.randn(1024, d, generator=generator, dtype=torch.float64) * scales @ Q.T
    first, own = basis.bfloat16().double(), (M @ basis).bfloat16().double()
    # the layer's own: what the rounding of P and of y to bf16 does where A is exact
    P = x @ own.T
    own_error = (P.bfloat16().double() - P).norm()
    return {
        "error of M A_1 over that of rounding": (100.0, float((x @ (M @ first - own).T).norm() / own_error)),
        "condition of random rows": (1.7, float(torch.linalg.cond(torch.randn(64, 1024, generator=generator)))),
    }

"""Inputs of an adapted linear, and the rule that its results are held to."""

import torch

NAMES = ("x", "weight", "lora_A", "lora_B", "bias")


def case(lead, d, m, r, dtype, *, factor_dtype=None, seed=0, grad=NAMES):
    """Inputs of an adapted linear with activation-like scales, by argument name."""
    g = torch.Generator().manual_seed(seed)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=g, dtype=torch.float64) * scale

    tensors = {
        "x": normal(*lead, d).to(dtype),
        "weight": normal(m, d, scale=d**-0.5).to(dtype),
        "lora_A": normal(r, d, scale=d**-0.5).to(factor_dtype or dtype),
        "lora_B": normal(m, r, scale=r**-0.5).to(factor_dtype or dtype),
        "bias": normal(m).to(dtype),
    }
    return {name: t.requires_grad_(name in grad) for name, t in tensors.items()}


def run(function, tensors, dy, **options):
    """Return y and the gradient of every tensor that wants one, as float64."""
    leaves = {name: t.detach().requires_grad_(t.requires_grad) for name, t in tensors.items()}
    y = function(**leaves, **options)
    y.backward(dy.to(y.dtype))
    found = {"y": y.detach()} | {name: t.grad for name, t in leaves.items() if t.requires_grad}
    for name, t in found.items():
        assert t is not None, f"no gradient for {name}"
        assert t.dtype == (leaves["x"] if name == "y" else leaves[name]).dtype, name
    return {name: t.double() for name, t in found.items()}


def plain_torch(x, weight, lora_A, lora_B, bias, scaling=1.0):
    """The eager layer that everybody writes: the yardstick for errors in the same dtype."""
    low_rank = x @ lora_A.to(x.dtype).t() @ lora_B.to(x.dtype).t()
    return torch.nn.functional.linear(x, weight, bias) + scaling * low_rank


def assert_as_good_as_torch(got, own, truth, slack):
    for name, want in truth.items():
        size = want.norm().clamp_min(1e-300)
        error, torch_error = ((result[name] - want).norm() / size for result in (got, own))
        assert torch.isfinite(got[name]).all(), f"{name} holds NaN or infinity"
        assert error <= 2 * torch_error + slack, f"{name}: error {error:.3g}, torch's own {torch_error:.3g}"

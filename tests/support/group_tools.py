"""A layer whose linears share an input, without and with a shared projection: what its tests have in common."""

import copy

import torch
from torch import nn

from lora_null.adapters.layer import attach_adapter
from lora_null.adapters.sharing import share_projections

D, M, R = 24, 20, 4


class Attention(nn.Module):
    """q, k and v read x; o reads something else."""

    def __init__(self, dtype=torch.float64):
        super().__init__()
        for name, m in (("q", M), ("k", 12), ("v", 12)):
            setattr(self, name, nn.Linear(D, m, bias=name == "q", dtype=dtype))
        self.o = nn.Linear(M, D, bias=False, dtype=dtype)

    def forward(self, x):
        q, k, v = self.q(x), self.k(x), self.v(x)
        return x + self.o(q * torch.cat([k, v[..., : M - 12]], -1))


def null_space_adapters(model, dtype=None, dropout=0.0, seed=0):
    """Frozen factors of the form that the initialisation gives: ``A_i = sqrt(D_i) R_i^T U^T`` per parent module."""
    g = torch.Generator().manual_seed(seed)
    for parent in [m for m in model.modules() if isinstance(m, Attention)]:
        shared = torch.linalg.qr(torch.randn(D, R, generator=g, dtype=torch.float64))[0]
        for name in "qkvo":
            linear = getattr(parent, name)
            basis = shared
            if name == "o":
                basis = torch.linalg.qr(torch.randn(M, R, generator=g, dtype=torch.float64))[0]
            rotation = torch.linalg.qr(torch.randn(R, R, generator=g, dtype=torch.float64))[0]
            lengths = torch.logspace(0, -4, R, dtype=torch.float64).sqrt()
            lora_A = lengths[:, None] * (rotation @ basis.t())
            lora_B = torch.randn(linear.out_features, R, generator=g, dtype=torch.float64)
            kind = dtype or linear.weight.dtype
            attach_adapter(linear, lora_A.to(kind), lora_B.to(kind), scaling=0.5, lora_dropout=dropout)
    return model


def pair(layers=1, dtype=torch.float64, factor_dtype=None, **options):
    """The same model without and with sharing."""
    torch.manual_seed(0)
    model = nn.Sequential(*[Attention(dtype) for _ in range(layers)])
    plain = null_space_adapters(model, factor_dtype, **options)
    shared = copy.deepcopy(plain)
    assert share_projections(shared) == layers
    return plain, shared


def tokens(*lead, dtype=torch.float64, grad=True):
    x = torch.randn(*lead, D, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return x.to(dtype).requires_grad_(grad)


def gradients(model, x, forward=None):
    model.zero_grad()
    leaf = x.detach().requires_grad_(x.requires_grad)
    y = (forward or model)(leaf)
    y.square().sum().backward()
    found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": leaf.grad} | found


def assert_same(got, want, **tolerance):
    assert set(got) == set(want)
    for name, value in want.items():
        if value is not None:
            torch.testing.assert_close(got[name], value, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


def group_of(model):
    return model[0].q.projection_group

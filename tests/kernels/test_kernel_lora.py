"""Every launcher of `lora_null.kernels.lora` against float64, on ugly shapes and NaN-filled outputs.

Where they run is said in ``kernel_tools.py``.
"""

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, INTERPRETED, needs_device, truncation, wide_product
from lora_null.kernels import config, lora, runtime, syrk

pytestmark = [needs_device, pytest.mark.usefixtures("poisoned_memory")]
# (T, d, m, r)
SHAPES = [
    (63, 100, 72, 1),
    (65, 72, 500, 3),
    (130, 500, 63, 16),
    (40, 160, 736, 48),
    (17, 64, 33, 64),
    (70, 96, 130, 128),
]
if not INTERPRETED:
    SHAPES += [(2048, 1504, 736, 16), (4096, 4096, 1024, 128), (1000, 2048, 2048, 512)]


@pytest.fixture(params=[1, 64], ids=["whole", "split"])
def multiprocessors(request, monkeypatch):
    """Many multiprocessors make small sums split, one keeps them whole."""
    if INTERPRETED:
        monkeypatch.setattr(runtime, "multiprocessors", lambda device: request.param)


class Case:
    """Operands of one call, non-contiguous x and dy, fp32 adapters as PEFT makes them."""

    def __init__(self, T, d, m, r, dtype, seed=0):
        generator = torch.Generator().manual_seed(seed)

        def draw(rows, columns, scale=1.0):
            return torch.randn(rows, columns, generator=generator) * scale

        self.x = draw(T, 2 * d + 8).to(DEVICE, dtype)[:, 8 : 8 + d]
        self.dy = draw(T, m + 24).to(DEVICE, dtype)[:, 16 : 16 + m]
        self.weight = draw(m, d, d**-0.5).to(DEVICE, dtype)
        self.A = draw(r, d, d**-0.5).to(DEVICE)
        self.B = draw(m, r).to(DEVICE)
        self.S = draw(T, r).to(DEVICE, dtype)
        self.dS = draw(T, r).to(DEVICE, dtype)
        self.bias = draw(1, m)[0].to(DEVICE, dtype)
        self.dtype = dtype

    def like(self, dtype, *names):
        """Return operands as the kernel sees them, that is rounded to x's type, in ``dtype``."""
        return [getattr(self, name).to(self.dtype).to(dtype) for name in names]


def close(name, got, truth, own, floor=2e-7):
    """Require an error against float64 of at most twice torch's own in the same type."""
    assert got.shape == truth.shape, f"{name}: shape {tuple(got.shape)}, expected {tuple(truth.shape)}"
    assert torch.isfinite(got).all(), f"{name}: {(~torch.isfinite(got)).sum()} elements were not written"
    scale = truth.norm().clamp_min(1e-30)
    error, allowed = ((t.double() - truth).norm() / scale for t in (got, own))
    assert error <= 2 * allowed + floor, f"{name}: relative error {error:.3g}, torch's own {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))
def test_forward_and_gradients(shape, dtype, multiprocessors):
    c = Case(*shape, dtype)
    short = 2e-7 + truncation(c.x, shape[0])

    S = lora.project(c.x, c.A)
    x, A = c.like(torch.float64, "x", "A")
    close("S", S, x @ A.t(), c.x @ c.A.to(dtype).t())

    y = lora.forward(c.x, c.weight, c.S, c.B, scaling=0.7, bias=c.bias)
    x, w, s, b, bias = c.like(torch.float64, "x", "weight", "S", "B", "bias")
    x_, w_, s_, b_, bias_ = c.like(dtype, "x", "weight", "S", "B", "bias")
    close("y", y, x @ w.t() + 0.7 * s @ b.t() + bias, x_ @ w_.t() + bias_ + 0.7 * (s_ @ b_.t()))

    dS, dB = lora.backward_dy(c.dy, c.S, c.B, scaling=0.7)
    dy, s, b = c.like(torch.float64, "dy", "S", "B")
    dy_, s_, b_ = c.like(dtype, "dy", "S", "B")
    close("dS", dS, 0.7 * dy @ b, 0.7 * (dy_ @ b_))
    close("dB", dB, 0.7 * dy.t() @ s, 0.7 * wide_product(dy_.t(), s_), short)
    assert dB.dtype == torch.float32
    close("dS alone", lora.backward_dy(c.dy, None, c.B, scaling=0.7, need_dB=False)[0], 0.7 * dy @ b, 0.7 * (dy_ @ b_))
    alone = lora.backward_dy(c.dy, c.S, None, scaling=0.7, need_dS=False)[1]
    close("dB alone", alone, 0.7 * dy.t() @ s, 0.7 * wide_product(dy_.t(), s_), short)

    dx = lora.backward_dx(c.dy, c.weight, c.dS, c.A)
    dy, w, ds, a = c.like(torch.float64, "dy", "weight", "dS", "A")
    dy_, w_, ds_, a_ = c.like(dtype, "dy", "weight", "dS", "A")
    close("dx", dx, dy @ w + ds @ a, dy_ @ w_ + ds_ @ a_)

    dA = lora.backward_dA(c.dS, c.x)
    x, ds = c.like(torch.float64, "x", "dS")
    close("dA", dA, ds.t() @ x, wide_product(c.dS.t(), c.x), short)
    assert dA.dtype == torch.float32


@pytest.mark.parametrize("p", [0.1, 0.75])
def test_dropout_is_one_mask_in_forward_and_backward(p, multiprocessors):
    dtype = torch.float32
    c = Case(65, 130, 72, 16, dtype)
    drop = dict(dropout=p, seed=1234567890123)
    keep = lora.keep_mask(65, 130, **drop, device=DEVICE)
    kept = keep / (1 - p)
    dropped = c.x * kept
    S = lora.project(c.x, c.A, **drop)
    close("S", S, (c.x.double() * kept) @ c.A.double().t(), dropped @ c.A.t())
    dx = lora.backward_dx(c.dy, c.weight, c.dS, c.A, **drop)
    truth = c.dy.double() @ c.weight.double() + kept * (c.dS.double() @ c.A.double())
    close("dx", dx, truth, c.dy @ c.weight + kept * (c.dS @ c.A))
    dA = lora.backward_dA(c.dS, c.x, **drop)
    close("dA", dA, c.dS.double().t() @ (c.x.double() * kept), c.dS.t() @ dropped)


@pytest.mark.parametrize("one_loop", [False, True])
@pytest.mark.parametrize("scaling, p", [(0.7, 0.3), (1.0, 0.0)])
@pytest.mark.parametrize("T, d, m, r", [(63, 104, 136, 8), (130, 72, 264, 48), (65, 40, 72, 32)])
def test_linear_through_descriptors(monkeypatch, T, d, m, r, scaling, p, one_loop):
    if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA")
    entry = {"TMA": True, "OCCUPANCY": 1, "BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_R": 32, "GROUP": 2}
    entry |= {"ONE_LOOP": one_loop, "num_warps": 4, "num_stages": 2}
    monkeypatch.setattr(config, "launch_config", lambda kind, *a, **k: kind(**entry))
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 3)
    launch, taken = runtime.launch, []
    monkeypatch.setattr(runtime, "launch", lambda *a, **k: (taken.append(k["ONE_LOOP"]), launch(*a, **k)))
    dtype = torch.float16
    c = Case(T, d, m, r, dtype)
    assert all(runtime.aligned(t) for t in (c.x, c.dy, c.weight, c.S))
    y = lora.forward(c.x, c.weight, c.S, c.B, scaling=scaling, bias=c.bias)
    x, w, s, b, bias = c.like(torch.float64, "x", "weight", "S", "B", "bias")
    own = (c.x @ c.weight.t() + c.bias) + scaling * (c.S @ c.B.half().t())
    close("y", y, x @ w.t() + scaling * s @ b.t() + bias, own)
    dx = lora.backward_dx(c.dy, c.weight, c.dS, c.A, dropout=p, seed=11)
    assert taken == [one_loop and r <= 32 and scaling == 1.0, one_loop and r <= 32 and p == 0.0]
    kept = lora.keep_mask(T, d, dropout=p, seed=11, device=DEVICE) / (1 - p)
    dy, w, ds, a = c.like(torch.float64, "dy", "weight", "dS", "A")
    own = c.dy @ c.weight + (kept * (c.dS @ c.A.half())).half()
    close("dx", dx, dy @ w + kept * (ds @ a), own)


def test_no_tokens(multiprocessors):
    c = Case(0, 64, 48, 8, torch.float32)
    assert lora.project(c.x, c.A).shape == (0, 8)
    assert lora.forward(c.x, c.weight, c.S, c.B, scaling=1.0).shape == (0, 48)
    dS, dB = lora.backward_dy(c.dy, c.S, c.B, scaling=1.0)
    assert dS.shape == (0, 8) and torch.equal(dB, torch.zeros_like(dB))
    assert lora.backward_dx(c.dy, c.weight, c.dS, c.A).shape == (0, 64)
    assert torch.equal(lora.backward_dA(c.dS, c.x), torch.zeros(8, 64, device=DEVICE))


def test_same_call_same_bits(multiprocessors):
    c = Case(200, 136, 264, 16, torch.float32)
    first, second = (lora.backward_dy(c.dy, c.S, c.B, scaling=0.5) for _ in range(2))
    assert torch.equal(first[0], second[0]) and torch.equal(first[1], second[1])


def test_padding_rows_and_columns_do_not_leak():
    """Infinities beside the operands, inside the same storage, must not reach the result."""
    c = Case(63, 100, 72, 16, torch.float32)
    wide = torch.full((66, 140), float("inf"), device=DEVICE)
    wide[:63, :100] = c.x
    x = wide[:63, :100]
    weight = torch.full((80, 140), float("inf"), device=DEVICE)
    weight[:72, :100] = c.weight
    plain = lora.forward(c.x, c.weight, c.S, c.B, scaling=1.0)
    assert torch.equal(lora.forward(x, weight[:72, :100], c.S, c.B, scaling=1.0), plain)
    assert torch.equal(lora.project(x, c.A), lora.project(c.x, c.A))
    assert torch.equal(lora.backward_dA(c.dS, x), lora.backward_dA(c.dS, c.x))


def test_matrices_beyond_32_bit_offsets():
    """x and dy with 2^31 elements between their first and last row; only the pages that are used exist."""
    T, d, m, r, stride = 1040, 24, 40, 4, 1 << 21
    c = Case(T, d, m, r, torch.float16)
    # never written to as a whole, so not even the pages between the rows are there
    storage = torch.UntypedStorage(T * stride * 2, device=DEVICE)
    x, dy = (torch.tensor([], dtype=torch.float16, device=DEVICE) for _ in range(2))
    x.set_(storage, 0, (T, d), (stride, 1)).copy_(c.x)
    dy.set_(storage, 64, (T, m), (stride, 1)).copy_(c.dy)
    assert (T - 1) * stride > 2**31
    assert torch.equal(lora.project(x, c.A), lora.project(c.x, c.A))
    y, near = (lora.forward(t, c.weight, c.S, c.B, scaling=1.0) for t in (x, c.x))
    assert torch.equal(y, near)
    for got, expected in zip(
        lora.backward_dy(dy, c.S, c.B, scaling=1.0), lora.backward_dy(c.dy, c.S, c.B, scaling=1.0), strict=True
    ):
        assert torch.equal(got, expected)
    assert torch.equal(lora.backward_dA(c.dS, x), lora.backward_dA(c.dS, c.x))
    sums = [torch.zeros(d, d, device=DEVICE) for _ in range(2)]
    syrk.covariance_update(sums[0], x)
    syrk.covariance_update(sums[1], c.x)
    assert torch.equal(sums[0].tril(), sums[1].tril())

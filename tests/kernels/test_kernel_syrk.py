"""The symmetric kernel against float64: tile order, ragged sizes, masks, splits, strides, both variants.

Where they run is said in ``kernel_tools.py``.
"""

import pytest
import torch
from kernel_tools import DEVICE, DTYPES, INTERPRETED, needs_device, truncation, wide_product
from lora_null.kernels import config, runtime, syrk

triton = pytest.importorskip("triton")
tl = triton.language
triangle_tile = pytest.importorskip("lora_null.kernels.syrk_kernels").triangle_tile

pytestmark = [needs_device, pytest.mark.usefixtures("poisoned_memory")]
SMALL = {"ATOMIC": False, "GROUP": 2, "SLICE_STEPS": 1, "num_warps": 4, "num_stages": 2}
VARIANTS = {
    "square": {"BLOCK_M": 32, "BLOCK_N": 32, "BLOCK_T": 16, **SMALL},
    "tall": {"BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_T": 16, **SMALL},
    "wide": {"BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_T": 16, **SMALL},
    "tma": {
        "BLOCK_M": 64, "BLOCK_N": 32, "BLOCK_T": 16, **SMALL, "TMA": True, "OCCUPANCY": 1, "ATOMIC": True,
    },
    "wide tma": {
        "BLOCK_M": 32, "BLOCK_N": 64, "BLOCK_T": 16, **SMALL, "TMA": True, "OCCUPANCY": 1, "ATOMIC": True,
    },
}  # fmt: skip


def use(monkeypatch, variant, multiprocessors=1):
    """Run the launcher with one configuration, on a device of so many multiprocessors."""
    monkeypatch.setattr(config, "launch_config", lambda kind, *args, **kwargs: kind(**VARIANTS[variant]))
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: multiprocessors)


def draw(T, d, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(T, d, generator=generator) + 0.3).to(DEVICE, dtype)


def check(C, start, x):
    truth = (start.double() + x.double().t() @ x.double()).tril()
    own = (start.float() + wide_product(x.t(), x)).double().tril()
    got = C.double().tril()
    assert torch.isfinite(got).all(), f"{(~torch.isfinite(got)).sum()} elements were not written"
    error, allowed = ((t - truth).norm() / truth.norm() for t in (got, own))
    most = 2 * allowed + 1e-7 + truncation(x, x.shape[0])
    assert error <= most, f"relative error {error:.3g}, torch's own {allowed:.3g}"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, d", [(1, 1), (63, 100), (130, 72), (17, 160)], ids=lambda n: str(n))
@pytest.mark.parametrize("variant", ["square", "tall", "wide"])
@pytest.mark.parametrize("multiprocessors", [1, 40], ids=["whole", "split"])
def test_update(monkeypatch, variant, multiprocessors, T, d, dtype):
    use(monkeypatch, variant, multiprocessors)
    x, start = draw(T, d, dtype), draw(d, d, torch.float32, 1)
    C = start.clone()
    syrk.covariance_update(C, x)
    check(C, start, x)
    again = start.clone()
    syrk.covariance_update(again, x)
    assert torch.equal(C, again), "the same call gave other bits"


@pytest.mark.parametrize("T, d", [(63, 104), (130, 72)], ids=lambda n: str(n))
@pytest.mark.parametrize("variant", ["tma", "wide tma"])
@pytest.mark.parametrize("multiprocessors", [3, 40], ids=["whole", "split"])
def test_update_through_descriptors(monkeypatch, variant, multiprocessors, T, d):
    if not INTERPRETED and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("no TMA")
    use(monkeypatch, variant, multiprocessors)
    x, start = draw(T, d, torch.float16), draw(d, d, torch.float32, 1)
    C = start.clone()
    syrk.covariance_update(C, x)
    check(C, start, x)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("T, d", [(63, 500), (500, 63)] + [(1504, 736), (4096, 2048)] * (not INTERPRETED))
def test_shipped_configuration(dtype, T, d):
    x, start = draw(T, d, dtype), draw(d, d, torch.float32, 1)
    C = start.clone()
    syrk.covariance_update(C, x)
    check(C, start, x)


@pytest.mark.parametrize("multiprocessors", [1, 40], ids=["whole", "split"])
def test_masked_rows_are_not_read(monkeypatch, multiprocessors):
    use(monkeypatch, "tall", multiprocessors)
    x = draw(100, 72, torch.float32)
    mask = torch.arange(100, device=DEVICE) % 3 != 1
    poisoned = torch.where(mask[:, None], x, float("nan"))
    C = torch.zeros(72, 72, device=DEVICE)
    syrk.covariance_update(C, poisoned, mask)
    check(C, torch.zeros(72, 72, device=DEVICE), x[mask])


def test_strided_rows_and_a_slice_of_C(monkeypatch):
    use(monkeypatch, "square")
    wide = draw(50, 200, torch.float32)
    buffer = torch.full((72, 100), float("inf"), device=DEVICE)
    for x in (wide[::2, 8:80], wide[:, :144:2]):
        C = buffer[:, :72].zero_()
        syrk.covariance_update(C, x)
        check(C, torch.zeros(72, 72, device=DEVICE), x)
    assert buffer[:, 72:].isinf().all()


def test_fp64_is_flushed_in_pieces(monkeypatch):
    use(monkeypatch, "square")
    monkeypatch.setattr(syrk, "FLUSH", 16)
    x = draw(130, 40, torch.float32) * torch.logspace(0, 3, 130, device=DEVICE)[:, None]
    C, plain = (torch.zeros(40, 40, device=DEVICE, dtype=t) for t in (torch.float64, torch.float32))
    syrk.covariance_update(C, x)
    for piece in x.split(16):
        syrk.covariance_update(plain, piece)
    truth = (x.double().t() @ x.double()).tril()
    error, fp32 = (((t.double().tril() - truth).norm() / truth.norm()).item() for t in (C, plain))
    assert error < fp32, f"fp64 flush {error:.3g} is no better than fp32 {fp32:.3g}"


@triton.jit
def write_tile(out_ptr, d, GROUP: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr):
    m0, n0 = triangle_tile(tl.program_id(0), d, GROUP, BLOCK_M, BLOCK_N)
    tl.store(out_ptr + tl.program_id(0) * 2, m0)
    tl.store(out_ptr + tl.program_id(0) * 2 + 1, n0)


@pytest.mark.parametrize("GROUP, m, n", [(1, 16, 16), (3, 16, 16), (8, 32, 16), (8, 16, 32), (2, 16, 64)])
def test_tiles_cover_the_triangle_exactly_once(GROUP, m, n):
    side = max(m, n)
    for d in (1, side, side + 1, 7 * side, 12 * side - 3):
        squares = -(-d // side)
        tiles = squares * (squares + 1) // 2 * (side // min(m, n))
        out = torch.full((tiles, 2), -1, dtype=torch.int32, device=DEVICE)
        write_tile[(tiles,)](out, d, GROUP=GROUP, BLOCK_M=m, BLOCK_N=n)
        covered = torch.zeros(squares * side, squares * side, dtype=torch.int32)
        for m0, n0 in out.tolist():
            covered[m0 : m0 + m, n0 : n0 + n] += 1
        assert covered.max() == 1 and bool((covered.tril() == torch.ones_like(covered).tril()).all())

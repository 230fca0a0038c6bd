"""No kernel touches memory beside its tensors or stores an element twice: the interpreter is made to refuse it.

Every numerical test of a kernel is held to it; here are shapes that leave most of a tile outside, and planted errors.
"""

import pytest
import torch
from kernel_tools import INTERPRETED
from lora_null.kernels import lora, runtime, syrk

pytestmark = [
    pytest.mark.skipif(not INTERPRETED, reason="needs TRITON_INTERPRET=1"),
    pytest.mark.usefixtures("poisoned_memory"),
]


def padded(rows, columns, dtype=torch.float16):
    """A matrix inside of a wider one."""
    return torch.randn(rows + 2, columns + 5).to(dtype)[1 : rows + 1, 3 : columns + 3]


@pytest.mark.parametrize("processors", [1, 64])
@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("T, d, m, r", [(1, 1, 1, 1), (65, 129, 130, 17), (129, 65, 257, 65)])
def test_nothing_beside_the_tensors(monkeypatch, T, d, m, r, p, processors):
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: processors)
    drop = {"dropout": p, "seed": 3}
    x, dy, weight, A, B, S = (padded(*s) for s in ((T, d), (T, m), (m, d), (r, d), (m, r), (T, r)))
    lora.project(x, A, **drop)
    lora.forward(x, weight, S, B, scaling=0.5, bias=torch.randn(m).half())
    lora.backward_dy(dy, S, B, scaling=0.5)
    lora.backward_dx(dy, weight, S, A, **drop)
    lora.backward_dA(S, x, **drop)
    for C in (torch.zeros(d + 3, d + 5)[:d, :d], torch.zeros(d, d, dtype=torch.float64)):
        syrk.covariance_update(C, x)
        syrk.covariance_update(C, x, torch.rand(T) < 0.5)


def planted():
    import triton
    import triton.language as tl

    @triton.jit
    def copy(x_ptr, y_ptr, n, shift, BLOCK: tl.constexpr):
        at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        value = tl.load(x_ptr + at, mask=at < n, other=0.0)
        tl.store(y_ptr + at - tl.program_id(0) * shift, value, mask=at < 8)

    return copy


@pytest.mark.parametrize(
    "n, shift, complaint",
    [
        (8, 0, None),
        (9, 0, "load of 1 elements beside"),
        (8, 5, "stored to twice"),
        (8, -1, "store of 1 elements beside"),
    ],
)
def test_planted_errors_are_found(n, shift, complaint):
    x, y = torch.randn(16)[:8], torch.zeros(16)[:8]

    def run():
        runtime.launch(planted(), (3,), x.device, x, y, n, shift, BLOCK=4)

    if complaint is None:
        run()
        assert torch.equal(x, y)
        return
    with pytest.raises(Exception, match=complaint):
        run()


def test_padding_between_rows_is_beside():
    wide = torch.randn(4, 8)
    x, y = wide[:, :4], torch.zeros(16)
    with pytest.raises(Exception, match="beside the tensors"):
        runtime.launch(planted(), (2,), x.device, x, y, 8, 0, BLOCK=4)

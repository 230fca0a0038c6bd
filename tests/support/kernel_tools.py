"""Where the numerical tests of the kernels run: on a CUDA device, or in Triton's interpreter.

The interpreter needs TRITON_INTERPRET=1 from the start of the process (``test_kernel_interpreter.py`` gives it one).
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or TRITON_INTERPRET=1"
)


def _interpret_16_bit():
    """Make the interpreter multiply and round as a GPU does.

    It keeps bf16 as bits, multiplies them as integers and cuts off what a conversion to bf16 should round. fp16 is
    multiplied in fp32 as well: the same values, ten times as fast as NumPy's own loop.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, source, kind):
        types = source.dtype.scalar, kind.scalar
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(source.data).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, kind)

    def wide_dot(self, left, right, *rest):
        left, right = (self.cast_impl(t, tl.float32) if t.dtype.primitive_bitwidth == 16 else t for t in (left, right))
        return dot(self, left, right, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, wide_dot


if INTERPRETED:
    _interpret_16_bit()


def wide_product(left, right):
    """Return torch's own ``left @ right`` of 16-bit operands in fp32.

    On a GPU by the matrix units, as the kernels do it; see `truncation`.
    """
    if truncation(left):
        return torch.mm(left, right, out_dtype=torch.float32)
    return left.float() @ right.float()


def truncation(operand, terms=1):
    """Return what matrix units may lose of a sum of ``terms`` products, relative; 0 where none are used.

    They truncate every partial sum, one for 16 terms, instead of rounding it: a sum of 8192 positive products is 1e-5
    short, sixty times what rounding leaves. How a library splits the sum decides how much of that it shows.
    """
    return terms * 2.0**-28 if operand.is_cuda and operand.dtype in (torch.bfloat16, torch.float16) else 0.0

"""Where the numerical tests of the kernels run: on a CUDA device, or in Triton's interpreter.

The interpreter needs TRITON_INTERPRET=1 from the start of the process (``test_kernel_interpreter.py`` gives it one); it
multiplies bf16 wrongly, so there it is fp16 and fp32.
"""

import os

import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.float16, torch.float32] if INTERPRETED else [torch.bfloat16, torch.float16, torch.float32]
needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or TRITON_INTERPRET=1"
)


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

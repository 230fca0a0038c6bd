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

"""Run the numerical kernel tests in Triton's interpreter.

TRITON_INTERPRET is read when Triton is first imported, so it needs a process of its own.
"""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest


@pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="already interpreting")
@pytest.mark.parametrize(
    "name, least",
    [
        ("test_kernel_lora.py", 30),
        ("test_kernel_syrk.py", 40),
        ("test_linear_kernels.py", 12),
        ("test_kernel_memory.py", 16),
    ],
)
def test_interpreted(name, least):
    command = [sys.executable, "-m", "pytest", "-x", "-p", "no:cacheprovider", str(Path(__file__).with_name(name))]
    run = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    if "only 0-dimensional arrays can be converted" in run.stdout:
        pytest.skip("the interpreter of Triton 3.6 does not work with NumPy 2.4 or later")
    assert run.returncode == 0, run.stdout[-5000:] + run.stderr[-2000:]
    passed = re.search(r"(\d+) passed", run.stdout)
    assert passed and int(passed[1]) >= least, run.stdout[-2000:]

"""Tokens that the C++ covariance packs at a time, and its time."""

from functools import partial

import torch

from . import Found, compiled_with, milliseconds

SOURCE = "csrc/covariance.cpp"
QUOTE = "bf16, d = T = 4096: 192 ms with 1024 or 2048 tokens, up to 240 ms with 512"
TIMED = True


def measure() -> Found:
    """Time an update with each number of tokens."""
    x, C = torch.randn(4096, 4096).bfloat16(), torch.zeros(4096, 4096)
    modules = {tokens: compiled_with(kFewest=str(tokens), kMost=str(tokens)) for tokens in (512, 1024, 2048)}
    times = milliseconds({str(tokens): partial(module.covariance_update, C, x) for tokens, module in modules.items()})
    return {f"{tokens} tokens (ms)": (240.0 if tokens == 512 else 192.0, times[str(tokens)]) for tokens in modules}

"""What four samples of a layer cost beside one forward of it, where they share its input."""

from functools import partial
from statistics import quantiles

import torch
from torch import nn

from .. import timing
from . import Found

SOURCE = "lora_null/bayes/sampling.py"
QUOTE = "at most 1.15 times a plain forward"
TIMED = True

R, SAMPLES, TOKENS = 8, 4, 512


def measure() -> Found:
    """Time a layer and ``on_shared_input`` in turns: medians of the ratios of neighbouring samples, and quartiles."""
    from lora_null.adapters.layer import attach_adapter
    from lora_null.bayes.layers import adapted_layers
    from lora_null.bayes.sampling import on_shared_input

    found: Found = {}
    for dtype in (torch.float32, torch.bfloat16):
        for d in (2048, 4096):
            linear, x = nn.Linear(d, d, bias=False, dtype=dtype), torch.randn(TOKENS, d, dtype=dtype)
            attach_adapter(linear, torch.randn(R, d, dtype=dtype), torch.randn(d, R, dtype=dtype))
            layer = adapted_layers(nn.Sequential(linear))["0"]
            shapes = {"lora_A": (SAMPLES, R, d), "lora_B": (SAMPLES, d, R)}
            both = {name: torch.randn(shape, dtype=dtype) for name, shape in shapes.items()}
            for random in ("lora_A", "lora_B", "lora_A and lora_B"):
                deviations = {name: value for name, value in both.items() if name in random}
                calls = {
                    "plain": timing.Timed(partial(linear, x)),
                    "samples": timing.Timed(partial(on_shared_input, layer, x, deviations)),
                }
                with torch.no_grad():
                    for call in calls.values():
                        call()
                    times = timing.interleave(calls, timing.clock("cpu"), seconds=4)
                ratios = [b / a for a, b in zip(times["plain"], times["samples"], strict=False)]
                low, middle, high = quantiles(ratios, n=4)
                name = f"{str(dtype).removeprefix('torch.')} d={d} {random} ({low:.2f} to {high:.2f})"
                found[name] = 1.15, middle
    return found

"""A small timing of one layer shape on this machine; the full suite is ``make bench`` in the source tree."""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import quantiles
from typing import Any

import torch
from tqdm.auto import tqdm

from ..calibration.memory import Item, MemoryPlan
from ..ops import covariance_update, lora_linear, lora_linear_reference
from ..solver.factorize import factorize
from ..solver.null_space import null_space


def measure(
    d: int, m: int, r: int, tokens: int, *, dtype: torch.dtype, device: str, repeats: int = 7
) -> list[dict[str, Any]]:
    """Time each operation ``repeats`` times after one call that does not count.

    Returns:
        One entry per operation: ``operation``, and ``ms``, ``ms_20``, ``ms_80``: median and quantiles.

    Raises:
        ValueError: A size is not positive, the rank is too large, or there is too little memory.
    """
    if min(d, m, r, tokens) < 1 or repeats < 2 or r > min(d, m):
        raise ValueError(
            f"d={d}, m={m}, r={r}, tokens={tokens}, repeats={repeats}; expected positive sizes, r <= min(d, m) and "
            "at least 2 repeats."
        )
    size = dtype.itemsize * (3 * tokens * (d + m) + 2 * m * d) + 4 * tokens * d + 64 * d * d
    items = (Item("tensors and spectra", torch.device(device), size),)
    MemoryPlan(f"bench of d={d}, m={m}, tokens={tokens}", items).check(None, "Choose smaller sizes.")
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    x, weight, dy = randn(tokens, d), randn(m, d) / d**0.5, randn(tokens, m)
    C = torch.zeros(d, d, device=device)
    # A plausible spectrum: directions of falling strength, so that the solver has what it has in a real layer.
    decay = torch.logspace(0, -4, d, device=device)
    sample = torch.randn(2 * d, d, generator=generator).to(device) * decay
    spectrum = sample.T @ sample
    basis = null_space(spectrum, r).basis
    lora_A, _ = factorize(weight, basis)
    lora_A = lora_A.to(device)
    lora_B = torch.zeros(m, r, device=device)

    def layer(apply: Callable[..., torch.Tensor], train_a: bool) -> Callable[[], None]:
        inputs = x.clone().requires_grad_(True)
        factors = lora_A.clone().requires_grad_(train_a), lora_B.clone().requires_grad_(True)

        def step() -> None:
            apply(inputs, weight, *factors).backward(dy)
            inputs.grad = factors[0].grad = factors[1].grad = None

        return step

    def base(inputs: torch.Tensor, weight: torch.Tensor, *_: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(inputs, weight)

    def plain_covariance() -> None:
        C.addmm_(x.float().T, x.float())

    operations: dict[str, Callable[[], Any]] = {
        "frozen linear layer, forward + backward": layer(base, False),
        "LoRA in plain torch, A trained": layer(lora_linear_reference, True),
        "lora_linear, A trained": layer(lora_linear, True),
        "lora_linear, A frozen": layer(lora_linear, False),
        "C += x^T x in plain torch (fp32)": plain_covariance,
        "covariance_update": lambda: covariance_update(C, x),
        "torch.linalg.eigh (fp64)": lambda: torch.linalg.eigh(spectrum.double()),
        "null_space": lambda: null_space(spectrum, r),
    }
    return [
        {"operation": name, **_time(call, repeats, device)}
        for name, call in tqdm(operations.items(), "bench", unit="operation", disable=None)
    ]


def _time(call: Callable[[], Any], repeats: int, device: str) -> dict[str, float]:
    def wait() -> None:
        if device.startswith("cuda"):
            torch.cuda.synchronize(device)  # which need not be the current one

    call()
    milliseconds = []
    for _ in range(repeats):
        wait()
        start = time.perf_counter()
        call()
        wait()
        milliseconds.append(1e3 * (time.perf_counter() - start))
    cuts = quantiles(milliseconds, n=10, method="inclusive")
    return {"ms": cuts[4], "ms_20": cuts[1], "ms_80": cuts[7]}

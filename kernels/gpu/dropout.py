"""Dropout without a stored mask: element ``(t, i)`` is kept or not by a hash of the seed, ``t`` and ``i``.

The seed becomes two 32-bit keys by one SplitMix64 step. Row ``t`` gets two words, ``a = h(t ^ key0)`` and
``b = h(t ^ key1) | 1``, and element ``(t, i)`` the value ``h(a + i b)``, all modulo 2^32; it is kept where that
value is at least ``round(p 2^32)``. ``h`` is the 32-bit finaliser "lowbias32" of C. Wellons' hash prospector
(bias 0.17). One hash an element is about ten integer operations; Philox would be about eighty, several times
the cost of reading x.
"""

from typing import NamedTuple

import torch
from torch import Tensor

__all__ = ["Dropout", "keep_mask"]

_WORD = 0xFFFFFFFF


class Dropout(NamedTuple):
    """What a kernel needs to regenerate a mask: two keys and the threshold as signed 32-bit words, the scale."""

    key0: int
    key1: int
    threshold: int
    scale: float

    @classmethod
    def of(cls, p: float, seed: int) -> "Dropout":
        """Return the words for probability ``p`` in [0, 1] and any integer seed (taken modulo 2^64)."""
        if not 0.0 <= p <= 1.0:
            raise ValueError(f"dropout={p} is not a probability; expected a number from 0 to 1")
        z = (seed + 0x9E3779B97F4A7C15) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & 0xFFFFFFFFFFFFFFFF
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & 0xFFFFFFFFFFFFFFFF
        z ^= z >> 31
        threshold = min(round(p * 2**32), _WORD)
        return cls(_signed(z & _WORD), _signed(z >> 32), _signed(threshold), 0.0 if p == 1.0 else 1.0 / (1.0 - p))


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word


def _hash_(x: Tensor) -> Tensor:
    """Hash int64 values below 2^32 in place; with temporaries instead, this takes 1.3 to 4 times as long."""
    shifted = x >> 16
    x.bitwise_xor_(shifted).mul_(0x7FEB352D).bitwise_and_(_WORD)
    torch.bitwise_right_shift(x, 15, out=shifted)
    x.bitwise_xor_(shifted).mul_(0x846CA68B).bitwise_and_(_WORD)
    torch.bitwise_right_shift(x, 16, out=shifted)
    return x.bitwise_xor_(shifted)


def keep_mask(T: int, d: int, *, dropout: float, seed: int, device: torch.device | str) -> Tensor:
    """Return the mask ``(T, d)`` that the kernels apply, bool, True = kept; a kept element is scaled by 1/(1-p).

    Plain torch on any device, the same bits everywhere. Rows are made in blocks, in at most 2 MiB of scratch
    memory on a CPU (a cache's worth) and 1 GiB on a GPU.
    """
    words = Dropout.of(dropout, seed)
    rows = torch.arange(T, device=device, dtype=torch.int64)
    a = _hash_(rows ^ (words.key0 & _WORD))
    b = _hash_(rows ^ (words.key1 & _WORD)) | 1
    columns = torch.arange(d, device=device, dtype=torch.int64)
    keep = torch.empty((T, d), device=device, dtype=torch.bool)
    block = max(1, (1 << 17 if keep.device.type == "cpu" else 1 << 26) // max(d, 1))
    for first in range(0, T, block):
        here = slice(first, first + block)
        values = torch.addcmul(a[here, None], columns, b[here, None]).bitwise_and_(_WORD)
        torch.ge(_hash_(values), words.threshold & _WORD, out=keep[here])
    return keep

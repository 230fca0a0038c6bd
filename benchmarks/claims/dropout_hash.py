"""The hash of the dropout mask, in place and with temporaries."""

import torch

from . import Found, milliseconds

SOURCE = "kernels/gpu/dropout.py"
QUOTE = "with temporaries instead, this takes 1.3 to 4 times as long"
TIMED = True


def measure() -> Found:
    """Time both on a block of the size that a CPU makes at a time."""
    from lora_null.kernels.dropout import _WORD, _hash_

    x = torch.randint(2**32, (1 << 17,))

    def temporaries() -> torch.Tensor:
        y = ((x ^ (x >> 16)) * 0x7FEB352D) & _WORD
        y = ((y ^ (y >> 15)) * 0x846CA68B) & _WORD
        return y ^ (y >> 16)

    times = milliseconds({"in_place": lambda: _hash_(x), "temporaries": temporaries})
    return {"temporaries over in place": (4.0, times["temporaries"] / times["in_place"])}

"""Tensors as bytes and in files, and which subclasses are plain."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from .files import require_regular

# What safetensors calls the types that weights are computed in. Others, such as integers and 8-bit floats, mean
# nothing without a scale.
FLOATING = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32, "F64": torch.float64}


@contextmanager
def opened(path: Path, expected: str) -> Iterator[Any]:
    """Open a safetensors file; nothing is ever unpickled. What is wrong with it, in the block too, is a ValueError.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no regular file, damaged, or of another format.
    """
    from safetensors import SafetensorError, safe_open

    require_regular(path, expected)
    try:
        with safe_open(str(path), framework="pt") as file:
            yield file
    except (SafetensorError, OSError) as error:
        raise ValueError(
            f"{path} is not a readable safetensors file ({error}); expected {expected}. It is damaged, or of another "
            "kind; pickled checkpoints (.bin, .pt) are never loaded. Save or download it again."
        ) from None


def read_floating(file: Any, path: Path, name: str) -> Tensor:
    """Read one tensor of a file that is :func:`opened`; ValueError unless it is of 16, 32 or 64 floating bits."""
    code = file.get_slice(name).get_dtype()
    if code not in FLOATING:
        raise ValueError(
            f"{path} holds {name} as {code}; expected one of {', '.join(sorted(FLOATING))}. It is damaged, or "
            "quantised by another program; save it in floating point."
        )
    return file.get_tensor(name)


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a CPU tensor of any dtype."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


# torchao and optimum-quanto quantise by a subclass that reports the dtype and shape of the original.
PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)

"""Bytes of tensors, and which subclasses are plain."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor


def bytes_of(tensor: Tensor) -> memoryview:
    """Return the memory of a CPU tensor of any dtype."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().data


# torchao and optimum-quanto quantise by a subclass that reports the dtype and shape of the original.
PLAIN_TENSORS = (Tensor, nn.Parameter, nn.Buffer, FakeTensor)

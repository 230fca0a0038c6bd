"""Where the numerical tests of the kernels run: on a CUDA device, or in Triton's interpreter.

The interpreter needs TRITON_INTERPRET=1 from the start of the process (``test_kernel_interpreter.py`` gives it one). It
is made to compute as a GPU does, and to refuse what a GPU would do without a word.
"""

import os

import numpy as np
import pytest
import torch

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
needs_device = pytest.mark.skipif(
    not INTERPRETED and not torch.cuda.is_available(), reason="needs a CUDA device or TRITON_INTERPRET=1"
)


def _interpret_16_bit():
    """Make the interpreter multiply and round as a GPU does.

    It keeps bf16 as bits, multiplies them as integers and cuts off what a conversion to bf16 should round. fp16 is
    multiplied in fp32 as well: the same values, ten times as fast as NumPy's own loop.
    """
    from triton import language as tl
    from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

    cast, dot = InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot

    def rounding_cast(self, source, kind):
        types = source.dtype.scalar, kind.scalar
        if types == (tl.bfloat16, tl.float32):
            return TensorHandle((source.data.astype(np.uint32) << 16).view(np.float32), tl.float32)
        if types == (tl.float32, tl.bfloat16):
            rounded = torch.tensor(source.data).bfloat16()
            return TensorHandle(rounded.view(torch.int16).numpy().view(np.uint16), tl.bfloat16)
        return cast(self, source, kind)

    def wide_dot(self, left, right, *rest):
        left, right = (self.cast_impl(t, tl.float32) if t.dtype.primitive_bitwidth == 16 else t for t in (left, right))
        return dot(self, left, right, *rest)

    InterpreterBuilder.cast_impl, InterpreterBuilder.create_dot = rounding_cast, wide_dot


class Memory:
    """The elements of one tensor: which addresses are theirs, and which were stored to."""

    def __init__(self, tensor):
        self.base, self.itemsize = tensor.data_ptr(), tensor.element_size()
        sides = sorted(((stride, size) for stride, size in zip(tensor.stride(), tensor.shape, strict=True) if size > 1))
        self.sides = sides[::-1]
        self.stored = set()

    def offsets(self, addresses):
        """Return elements from the base, and which of the addresses are elements of the tensor."""
        offsets = addresses.astype(np.int64) - self.base
        inside = (offsets >= 0) & (offsets % self.itemsize == 0)
        rest = offsets // self.itemsize
        for stride, size in self.sides:
            inside &= rest // stride < size
            rest = rest % stride
        return offsets // self.itemsize, inside & (rest == 0)


def _watch_addresses():
    """Let the interpreter refuse loads and stores beside a launch's tensors, and two stores to one element.

    An element of a row's padding is beside, even where memory is there: a GPU would not complain about it either.
    """
    from lora_null.kernels import runtime
    from triton.runtime.interpreter import InterpreterBuilder as Builder

    load, store, add = Builder.create_masked_load, Builder.create_masked_store, Builder.create_atomic_rmw
    plain_launch, arguments = runtime.launch, []

    def check(what, pointers, mask, once=False):
        if not arguments:
            return  # a kernel of a test, launched by hand
        addresses = pointers.data[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)]
        for memory in arguments:
            offsets, inside = memory.offsets(addresses)
            if once and inside.any():
                found = set(offsets[inside].tolist())
                if len(found) < inside.sum() or found & memory.stored:
                    raise IndexError(f"{what}: an element is stored to twice, in no order that is known")
                memory.stored |= found
            addresses = addresses[~inside]
        if addresses.size:
            raise IndexError(f"{what} of {addresses.size} elements beside the tensors, the first at {addresses[0]:#x}")

    def checked_load(self, pointers, mask, *rest, **options):
        check("load", pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def checked_store(self, pointers, value, mask, *rest, **options):
        check("store", pointers, mask, once=True)
        return store(self, pointers, value, mask, *rest, **options)

    def checked_add(self, operation, pointers, value, mask, *rest, **options):
        check("atomic addition", pointers, mask, once=True)  # one to each element: nothing depends on an order
        return add(self, operation, pointers, value, mask, *rest, **options)

    def launch(kernel, grid, device, *args, **options):
        tensors = [getattr(argument, "base", argument) for argument in args]
        found = {(t.data_ptr(), t.shape, t.stride()): t for t in tensors if isinstance(t, torch.Tensor)}
        arguments[:] = [Memory(tensor) for tensor in found.values()]
        try:
            plain_launch(kernel, grid, device, *args, **options)
        finally:
            arguments.clear()

    Builder.create_masked_load, Builder.create_masked_store = checked_load, checked_store
    Builder.create_atomic_rmw, runtime.launch = checked_add, launch


if INTERPRETED:
    _interpret_16_bit()
    _watch_addresses()


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

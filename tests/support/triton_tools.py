"""Compile the package's Triton kernels for a GPU that is not there, and read what the compiler says.

A launcher is called on meta tensors with its launch intercepted; the kernel, the types of its arguments and the
constants go through ``triton.compile`` for the wanted target. cuobjdump, which comes with Triton, reports
registers, spills and stack of the binary.
"""

import os
import re
import subprocess
import tempfile
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from lora_null.kernels import config, runtime

# Bytes of shared memory that one block may use.
SHARED_MEMORY = {"sm_80": 166912, "sm_89": 101376, "sm_90": 232448, "sm_100": 232448, "default": 65536}
_TRITON_TYPES = {
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float32: "fp32",
    torch.float64: "fp64",
    torch.bool: "i1",
    torch.uint8: "u8",
    torch.int32: "i32",
}


@dataclass(frozen=True)
class Launch:
    """One intercepted launch: everything that ``triton.compile`` and a reader need."""

    kernel: Any
    grid: tuple[int, ...]
    args: tuple[Any, ...]
    options: dict[str, Any]

    def source(self) -> tuple[Any, dict[str, int]]:
        """Return the ASTSource and the compiler's options."""
        from triton.compiler import ASTSource

        given = dict(self.options)
        compiler = {name: given.pop(name) for name in ("num_warps", "num_stages") if name in given}
        compiler["enable_fp_fusion"] = True
        values = {**dict(zip(self.kernel.arg_names, self.args, strict=False)), **given}
        signature, constants, attributes = {}, {}, {}
        for index, parameter in enumerate(self.kernel.params):
            value = values[parameter.name]
            free = parameter.do_not_specialize
            if parameter.is_constexpr or value is None or (type(value) is int and value == 1 and not free):
                signature[parameter.name] = "constexpr"
                constants[(index,)] = value
                continue
            signature[parameter.name] = _type(value)
            address = value.data_ptr() if isinstance(value, torch.Tensor) else value
            if type(address) is int and not free and address % 16 == 0:
                attributes[(index,)] = [["tt.divisibility", 16]]
        return ASTSource(self.kernel, signature, constants, attributes), compiler

    def key(self) -> str:
        """Return what tells this compilation from others."""
        source, compiler = self.source()
        return f"{self.kernel.fn.__name__} {source.signature} {source.constants} {source.attrs} {compiler}"


def _type(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return "*" + _TRITON_TYPES[value.dtype]
    if isinstance(value, float):
        return "fp32"
    if isinstance(value, int):
        return "i32" if -(2**31) <= value < 2**31 else "i64"
    block = ",".join(str(side) for side in value.block_shape)
    return f"tensordesc<{_TRITON_TYPES[value.base.dtype]}[{block}]>"


@contextmanager
def intercepted(monkeypatch: Any, arch: str, multiprocessors: int = 132):
    """Within this context launchers append to the yielded list instead of launching, with ``arch``'s data."""
    launches: list[Launch] = []

    def record(kernel, grid, device, *args, **options):
        launches.append(Launch(kernel, grid, args, options))

    with monkeypatch.context() as patch:
        patch.setattr(runtime, "launch", record)
        patch.setattr(runtime, "multiprocessors", lambda device: multiprocessors)
        patch.setattr(config, "architecture", lambda device: arch)
        patch.setattr(config, "table", config.shipped)
        yield launches


def target(arch: str) -> Any:
    from triton.backends.compiler import GPUTarget

    if arch.startswith("gfx"):
        return GPUTarget("hip", arch, 64)
    return GPUTarget("cuda", 80 if arch == "default" else int(arch.removeprefix("sm_")), 32)


def compile_for(launch: Launch, arch: str) -> Any:
    """Return the compiled kernel for ``arch``."""
    import triton

    source, options = launch.source()
    return triton.compile(source, target=target(arch), options=options)


def register_operands(ptx: str) -> list[str]:
    """Return the wgmma of ``ptx`` whose left operand lies in registers, which nothing may write while they run."""
    return re.findall(r"wgmma\.mma_async\S+ \{[^}]*\}, \{[^}]*\}", ptx)


def resources(compiled: Any) -> dict[str, int]:
    """Return ``registers``, ``stack`` and ``spills`` (bytes a thread) and ``shared`` (bytes a block)."""
    text = _tool("cuobjdump", "--dump-resource-usage", compiled.asm["cubin"])
    found = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", text)}
    return {
        "registers": found["REG"],
        "stack": found["STACK"],
        "spills": found["LOCAL"],
        "shared": compiled.metadata.shared,
    }


def sass(compiled: Any) -> str:
    """Return the machine code as text."""
    return _tool("cuobjdump", "--dump-sass", compiled.asm["cubin"])


def serialised(compiled: Any) -> bool:
    """Say whether ptxas puts a wait after every wgmma, because it cannot tell their registers apart."""
    from triton.backends.nvidia.compiler import get_ptxas

    path = get_ptxas(90).path
    return "serialized" in _tool(path, "-v", compiled.asm["ptx"].encode(), "--gpu-name=sm_90a", "-o", os.devnull)


def _tool(name: str, option: str, content: bytes, *more: str) -> str:
    """Run one of the tools that come with Triton on a file of this content; return all that it says."""
    import triton

    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile() as file:
        file.write(content)
        file.flush()
        done = subprocess.run([path, option, *more, file.name], capture_output=True, text=True, check=True)
    return done.stdout + done.stderr

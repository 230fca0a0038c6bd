"""Compile every configuration that ships for every architecture, without a GPU, and read the result.

No register spilled, no more shared memory than a block of that architecture has, wgmma in the sm_90 code that do not
wait for each other and whose registers nothing overwrites, and cp.async.bulk.tensor where a configuration promises
descriptors. The same for what tuning tries, and for other versions of Triton: ``make test-kernels``.
"""

import os

import pytest
import torch
from lora_null.kernels import config, lora, runtime, syrk, tune

pytest.importorskip("triton")
import wgmma
from triton_tools import SHARED_MEMORY, compile_for, intercepted, register_operands, resources, sass, serialised, target

pytestmark = pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="the interpreter does not compile")


def empty(*shape, dtype):
    return torch.empty(shape, dtype=dtype, device="meta")


def linear_calls(dtype, T, d, m, r, dropout, scaling=0.5):
    x, dy, weight = (empty(*s, dtype=dtype) for s in ((T, d), (T, m), (m, d)))
    S, A, B, bias = (empty(*s, dtype=dtype) for s in ((T, r), (r, d), (m, r), (m,)))
    lora.forward(x, weight, S, B, scaling=scaling, bias=bias)
    lora.backward_dx(dy, weight, S, A, dropout=dropout)


def calls(dtype, T, d, m, r, dropout):
    """Call every launcher, as one layer's forward, backward and calibration would."""
    linear_calls(dtype, T, d, m, r, dropout)
    x, S, A, B = (empty(*s, dtype=dtype) for s in ((T, d), (T, r), (r, d), (m, r)))
    lora.project(x, A, dropout=dropout)
    lora.backward_dA(S, x, dropout=dropout)
    syrk.covariance_update(empty(d, d, dtype=torch.float32), x, empty(T, dtype=torch.bool) if dropout else None)
    if not dropout:
        lora.backward_dy(empty(T, m, dtype=dtype), S, B, scaling=0.5)


def launches(monkeypatch, arch, dtype):
    """Return every distinct launch of representative layers and the table entries that they used."""
    used = []
    chosen = config._first

    def first(entries, sizes):
        used.append(chosen(entries, sizes))
        return used[-1]

    monkeypatch.setattr(config, "_first", first)
    with intercepted(monkeypatch, arch) as recorded:
        if dtype == torch.bfloat16:
            calls(dtype, 8192, 8192, 8192, 128, 0.0)
            calls(dtype, 512, 1024, 512, 16, 0.1)
            linear_calls(dtype, 8192, 4096, 4096, 32, 0.0, scaling=1.0)
            linear_calls(dtype, 8192, 4096, 4096, 64, 0.0, scaling=1.0)
            lora.project(empty(8192, 4096, dtype=dtype), empty(256, 4096, dtype=dtype))
            syrk.covariance_update(empty(2048, 2048, dtype=torch.float32), empty(8192, 2048, dtype=dtype))
            syrk.covariance_update(empty(8192, 8192, dtype=torch.float64), empty(8192, 8192, dtype=dtype))
            # rows that are no multiple of 16 bytes
            linear_calls(dtype, 8192, 4100, 1020, 12, 0.1)
            syrk.covariance_update(empty(4100, 4100, dtype=torch.float32), empty(8192, 4100, dtype=dtype))
            lora.project(empty(8192, 4100, dtype=dtype), empty(128, 4100, dtype=dtype), dropout=0.1)
        else:
            calls(dtype, 8192, 4096, 4096, 64, 0.0)
            monkeypatch.setattr(runtime, "precision", lambda x: "tf32")
            linear_calls(dtype, 512, 1024, 512, 16, 0.1)
    return {launch.key(): launch for launch in recorded}, used


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["16-bit", "32-bit"])
@pytest.mark.parametrize("arch", list(SHARED_MEMORY))
def test_shipped_configurations(monkeypatch, arch, dtype):
    if dtype == torch.float32 and arch in ("sm_89", "sm_100"):
        pytest.skip("the 32-bit tables are common to all; sm_80 and sm_90 stand for them")
    distinct, used = launches(monkeypatch, arch, dtype)
    bits = "16" if dtype == torch.bfloat16 else "32"
    for kernel, sizes in config.shipped(arch)["kernels"].items():
        for entry in sizes[bits]:
            assert entry in used, f"{arch}: no call of this test uses {kernel} {entry}; add one"
    limit = config.shipped(arch)["shared_memory"]
    assert limit == SHARED_MEMORY[arch]
    complaints = []
    for launch in distinct.values():
        compiled = compile_for(launch, arch)
        found = resources(compiled)
        name = f"{launch.kernel.fn.__name__} {launch.options}"
        if found["stack"]:
            complaints.append(f"{name} spills: {found}")
        if found["shared"] > limit:
            complaints.append(f"{name} needs {found['shared']} bytes of shared memory, {arch} has {limit}")
        ptx = compiled.asm["ptx"]
        # a rank below 64 is too short for the left side of a wgmma, where dropout has it: the masked operand is right
        thin = "project" in name or "outer" in name
        plain = "reduce" in name or (thin and launch.options["DROPOUT"])
        if arch == "sm_90" and bits == "16" and not plain and "wgmma" not in ptx:
            complaints.append(f"{name} has no wgmma")
        if arch == "sm_90" and "wgmma" in ptx:
            complaints += [f"{name}: {line}" for line in wgmma.hazards(sass(compiled))]
            complaints += [f"{name}: every wgmma waits for the one before"] * serialised(compiled)
        if "tma" in launch.kernel.fn.__name__ and "cp.async.bulk.tensor" not in ptx:
            complaints.append(f"{name} has no bulk tensor copy")
    assert not complaints, "\n".join(complaints)


@pytest.mark.parametrize("r, scaling, stages", [(32, 1.0, 4), (64, 1.0, 3), (16, 0.5, 4)])
def test_the_next_tile_is_loaded_while_this_one_is_stored(monkeypatch, r, scaling, stages):
    """Where neither scaling nor dropout follows the low-rank product: one loop, in which the copies come first."""
    with intercepted(monkeypatch, "sm_90") as recorded:
        linear_calls(torch.bfloat16, 8192, 4096, 4096, r, 0.1, scaling)
        linear_calls(torch.bfloat16, 8192, 4096, 4096, r, 0.0, scaling)
    forward, masked, again, dx = recorded
    assert forward.options == again.options and forward.options["num_stages"] == stages
    assert not masked.options["ONE_LOOP"] and dx.options["ONE_LOOP"]
    for launch in (forward, dx):
        text = compile_for(launch, "sm_90").asm["ttgir"]
        loops = [part.partition("tt.store") for part in text.split("scf.for")[1:]]
        if launch.options["ONE_LOOP"]:
            (before, store, after), copy = loops.pop(), "async_tma_copy_global_to_local"
            assert store and before.count(copy) == 4 and copy not in after
            assert before.index(copy) < before.index("scf.if", before.index(copy))  # each time, not only at the end
            assert not loops
        else:
            assert scaling != 1.0 and len(loops) == 3


@pytest.mark.parametrize("d, r", [(4096, 16), (4096, 128), (4096, 256), (4100, 128)])
def test_masked_operands_of_wgmma_lie_in_shared_memory(monkeypatch, d, r):
    """In registers, Triton 3.6 and 3.8 overwrite them while the wgmma of the step before still reads them."""
    with intercepted(monkeypatch, "sm_90") as recorded:
        x, A, S = (empty(*shape, dtype=torch.bfloat16) for shape in ((8192, d), (r, d), (8192, r)))
        lora.project(x, A, dropout=0.1)
        lora.backward_dA(S, x, dropout=0.1)
    for launch in (launch for launch in recorded if "reduce" not in launch.kernel.fn.__name__):
        assert launch.options["DROPOUT"]
        ptx = compile_for(launch, "sm_90").asm["ptx"]
        assert register_operands(ptx) == []
        assert ("wgmma.mma_async" in ptx) == (r >= 64)


def test_register_operands_of_wgmma_are_found():
    wgmma = "wgmma.mma_async.sync.aligned.m64n16k16.f32.bf16.bf16 {%r1,%r2}, "
    assert len(register_operands(f"{wgmma}{{%r3,%r4}}, %rd1, %p4, 1, 1;\n{wgmma}%rd2, %rd1, %p4, 1, 1, 0, 0;")) == 1


@pytest.mark.parametrize(
    "left, pending, written, found",
    [
        ("R68, ", 1, "R68", 1),
        ("R68, ", 0, "R68", 0),
        ("R68, ", 1, "R71", 1),
        ("R68, ", 1, "R72", 0),
        ("", 1, "R68", 0),
        ("", 1, "R31", 1),  # of the accumulator, R24 to R31
        ("", 1, "R32", 0),
    ],
)
def test_writes_to_registers_of_a_running_wgmma_are_found(left, pending, written, found):
    code = f"""
        /*0100*/                   IADD3 {written}, R2, R3, RZ ;                              /* 0x0000 */
        /*0110*/                   STG.E.128 desc[UR4][R68.64], R68 ;
        /*0120*/                   HGMMA.64x16x16.F32.BF16 R24, {left}gdesc[UR4], R24, gsb0 ;
        /*0130*/                   WARPGROUP.DEPBAR.LE gsb0, 0x{pending} ;
        /*0140*/              @!P0 BRA 0x100 ;
    """
    assert len(wgmma.hazards(code)) == found
    assert wgmma.shapes(code) == {"m64n16 RS" if left else "m64n16 SS"}


def test_amd_target_compiles(monkeypatch):
    from triton.backends import backends

    if "amd" not in backends:
        pytest.skip("this Triton has no AMD back end")
    with intercepted(monkeypatch, "default") as recorded:
        calls(torch.bfloat16, 512, 1024, 512, 16, 0.0)
    for launch in {launch.key(): launch for launch in recorded}.values():
        assert compile_for(launch, "gfx942").asm["amdgcn"]


def test_tuning_compiles_its_candidates_ahead(monkeypatch, tmp_path):
    """Several at once, as on a machine with a GPU; one that cannot be compiled stops nothing."""
    from contextlib import nullcontext

    import triton
    from lora_null.kernels.lora_kernels import project_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(runtime, "multiprocessors", lambda device: 132)
    good = {"BLOCK_T": 64, "BLOCK_N": 64, "BLOCK_K": 64, "SLICE_STEPS": 4, "num_warps": 4, "num_stages": 3}
    entries = [good, {**good, "BLOCK_K": 48}, {**good, "num_stages": 2}]
    work = tune.workload("project", 16, torch.bfloat16, "meta")
    monkeypatch.setattr(triton.runtime.driver, "_active", NoDevice())
    project_kernel.device_caches.pop(0, None)
    try:
        launch = runtime.launch
        tune.compile_ahead("project", entries, work.call)
        assert runtime.launch is launch
        assert len(project_kernel.device_caches[0][0]) == 2
    finally:
        project_kernel.device_caches.pop(0, None)


class NoDevice:
    """Triton's driver on a machine without a device: it can name one, and that is enough to compile."""

    def get_current_device(self):
        return 0

    def get_current_target(self):
        return target("sm_90")

    def get_current_stream(self, device):
        return 0

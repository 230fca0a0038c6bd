"""Every kernel, configuration and architecture, compiled: ``make test-kernels``.

Shipped configurations for each architecture, and on sm_90 those that tuning tries, at the ranks that it times, without
and with dropout. What ships must fit the registers and the shared memory, and its wgmma must not wait for each other;
nothing at all may write to registers of a wgmma that still runs. It is compiled with the Triton that is imported.
Results go to a file for each version, and a second call goes on where the first one ended; ``--table`` makes a page of
them.
"""

from __future__ import annotations

import argparse
import hashlib
import inspect
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import wgmma
from lora_null.kernels import config, lora, syrk, tune
from triton_tools import SHARED_MEMORY, Launch, compile_for, intercepted, register_operands, resources, sass, serialised

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"
PAGE = RESULTS / "kernels.md"
ARCHITECTURES = ("sm_90", "sm_80", "sm_100")
MASKED = (((8192, 4096), torch.bfloat16), ((8192,), torch.bool))
SIDES = ("ROWS", "BLOCK_T", "BLOCK_M", "BLOCK_N", "BLOCK_K", "BLOCK_R")


def cases(arch: str, tried: bool) -> Iterator[tuple[str, int, float, dict[str, Any]]]:
    """Yield ``(kernel, size, dropout, configuration)``; an empty configuration is whatever ships for the size."""
    for kernel, (_, sizes) in tune.SIZES.items():
        for dropout in tune.DROPOUT.get(kernel, (0.0,)):
            for size in sizes:
                if not tried:
                    yield kernel, size, dropout, {}
                    continue
                if size == 64 and kernel != "syrk":
                    continue  # between two others
                shipped = config.shipped(arch)["kernels"][kernel]["16"]
                known = [{name: value for name, value in entry.items() if name != "when"} for entry in shipped]
                for entry in tune.candidates(kernel, torch.bfloat16, arch, size):
                    if entry not in known:
                        yield kernel, size, dropout, entry


def launches(arch: str, kernel: str, size: int, dropout: float, entry: dict[str, Any]) -> list[Launch]:
    """Return what the workload of the tuning launches, apart from sums of slices."""
    with pytest.MonkeyPatch.context() as patch, intercepted(patch, arch) as recorded:
        if entry:
            patch.setitem(config._forced, kernel, entry)
        tune.workload(kernel, size, torch.bfloat16, "meta", dropout).call()
        if not entry and kernel == "linear":
            low_rank_variants(size, dropout)
        if not entry:
            # rows that are no multiple of 16 bytes, or of which some do not count
            patch.setattr(tune, "WIDTH", 4100)
            tune.workload(kernel, 4100 if kernel == "syrk" else size, torch.bfloat16, "meta", dropout).call()
        if not entry and kernel == "syrk":
            x, mask = (torch.empty(shape, dtype=kind, device="meta") for shape, kind in MASKED)
            syrk.covariance_update(torch.empty(4096, 4096, device="meta"), x, mask)
    return [launch for launch in recorded if "reduce" not in launch.kernel.fn.__name__]


def low_rank_variants(T: int, dropout: float) -> None:
    """Launch the linear at other ranks than the one that is timed, and with a scaling."""
    for r, scaling in ((16, 1.0), (128, 1.0), (64, 0.5)):
        shapes = ((T, tune.WIDTH), (tune.WIDTH, tune.WIDTH), (T, r), (tune.WIDTH, r), (r, tune.WIDTH))
        x, weight, S, B, A = (torch.empty(shape, dtype=torch.bfloat16, device="meta") for shape in shapes)
        lora.forward(x, weight, S, B, scaling=scaling)
        lora.backward_dx(x, weight, S, A, dropout=dropout)


def examined(launch: Launch, arch: str) -> dict[str, Any]:
    """Compile and return what a table shows."""
    compiled = compile_for(launch, arch)
    found: dict[str, Any] = resources(compiled)
    if arch == "sm_90" and "wgmma.mma_async" in compiled.asm["ptx"]:
        code = sass(compiled)
        found["wgmma"] = ", ".join(sorted(wgmma.shapes(code)))
        found["serialised"] = serialised(compiled)
        found["hazards"] = len(wgmma.hazards(code))
        found["register_operands"] = len(register_operands(compiled.asm["ptx"]))
    return found


def complaints(row: dict[str, Any]) -> list[str]:
    """Return what is wrong with a row. A candidate that does not fit is passed over where it is timed."""
    wrong = ["a write to registers of a running wgmma"] if row.get("hazards") else []
    if not row["tried"]:
        wrong += ["spills"] * bool(row["stack"] or row["spills"])
        wrong += ["too much shared memory"] * (row["shared"] > SHARED_MEMORY[row["arch"]])
        wrong += ["serialised wgmma"] * bool(row.get("serialised"))
    return wrong


def file_of(version: str) -> Path:
    """Return where the results of a version of Triton are."""
    return RESULTS / f"kernels-triton-{version}.jsonl"


def sources(kernel: Any) -> str:
    """Return a digest of a kernel and of all the functions that it calls: results of other texts are made again."""
    texts, rest = {}, [kernel]
    while rest:
        function = rest.pop().fn
        if function.__name__ not in texts:
            texts[function.__name__] = inspect.getsource(function)
            named = (function.__globals__.get(name) for name in function.__code__.co_names)
            rest += [it for it in named if isinstance(it, type(kernel))]
    return digest_of("".join(texts[name] for name in sorted(texts)).encode())


def digest_of(content: bytes) -> str:
    """Return a short hash."""
    return hashlib.sha256(content).hexdigest()[:16]


def compile_all(archs: tuple[str, ...], tried: bool) -> int:
    """Compile what is not known yet; return how many rows are wrong."""
    import triton
    from lora_null.kernels import lora_kernels, syrk_kernels

    functions = {**vars(lora_kernels), **vars(syrk_kernels)}
    digests = {name: sources(it) for name, it in functions.items() if name.endswith("_kernel")}
    path = file_of(triton.__version__)
    lines = path.read_text().splitlines() if path.exists() else []
    known = {row["key"]: row for row in map(json.loads, lines) if row["sources"] == digests.get(row["kernel"])}
    path.write_text("".join(json.dumps(row) + "\n" for row in known.values()))
    wrong, met = 0, set()
    for arch in archs:
        for kernel, size, dropout, entry in cases(arch, tried):
            for launch in launches(arch, kernel, size, dropout, entry):
                key = digest_of(f"{arch} {launch.key()}".encode())
                digest = digests[launch.kernel.fn.__name__]
                if key not in known or known[key]["sources"] != digest:
                    row = {"arch": arch, "kernel": launch.kernel.fn.__name__, "size": size, "dropout": dropout,
                           "tried": bool(entry), "options": launch.options, "sources": digest, "key": key}  # fmt: skip
                    try:
                        row |= examined(launch, arch)
                    except Exception as error:
                        row |= {"failed": f"{type(error).__name__}: {error}"[:200]}
                    known[key] = row
                    with path.open("a") as file:
                        file.write(json.dumps(row) + "\n")
                row = known[key]
                met.add(key)
                found = [row["failed"]] * (not row["tried"]) if "failed" in row else complaints(row)
                if found:
                    wrong += 1
                    print(f"{arch} {row['kernel']} {name_of(row)}: {', '.join(found)}", flush=True)
    # configurations that ship no more
    rows = [row for row in known.values() if row["key"] in met or row["tried"] != tried or row["arch"] not in archs]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    print(f"Triton {triton.__version__}: {len(met)} launches, {wrong} wrong")
    return wrong


def name_of(row: dict[str, Any]) -> str:
    """Return block sides, warps and stages in a few characters."""
    options = row["options"]
    sides = [f"{name.removeprefix('BLOCK_')} {side}" for name, side in options.items() if name in SIDES]
    return f"{', '.join(sides)}; {options['num_warps']} warps, {options['num_stages']} stages"


def table() -> str:
    """Return what ships as a Markdown table, a column for each version of Triton that was compiled with."""
    versions = {path.stem.rpartition("-")[2]: path for path in sorted(RESULTS.glob("kernels-triton-*.jsonl"))}
    rows: dict[tuple, dict[str, dict]] = {}
    for version, path in versions.items():
        for row in map(json.loads, path.read_text().splitlines()):
            if not row["tried"]:
                rows.setdefault((kernel_of(row), name_of(row), row["arch"]), {})[version] = row
    head = ["kernel", "configuration", "architecture", *(f"Triton {version}" for version in versions)]
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    for key, found in sorted(rows.items()):
        cells = [cell(found[version]) if version in found else "" for version in versions]
        lines.append("| " + " | ".join([*key, *cells]) + " |")
    return "\n".join(lines)


def kernel_of(row: dict[str, Any]) -> str:
    """Return the kernel and what of its variants was compiled."""
    options = row["options"]
    variants = {
        "dx": options.get("TRANSPOSED"),
        "dropout": options.get("DROPOUT"),
        "mask": options.get("MASK"),
        "one loop": options.get("ONE_LOOP"),
        "ragged": False in [value for name, value in options.items() if name.startswith("EVEN_")],
    }
    return ", ".join([row["kernel"].removesuffix("_kernel"), *(name for name, it in variants.items() if it)])


def page() -> str:
    """Return the table with what it says above it."""
    tried = [json.loads(line) for path in sorted(RESULTS.glob("kernels-triton-*.jsonl")) for line in path.open()]
    tried = [row for row in tried if row["tried"]]
    failed = sum("failed" in row for row in tried)
    spills = sum(bool(row.get("stack") or row.get("spills")) for row in tried)
    hazards = sum(bool(row.get("hazards")) for row in tried)
    waits = sum(bool(row.get("serialised")) for row in tried)
    return (
        "# Kernels as compiled\n\n"
        "Made by `python tests/support/kernel_matrix.py --table` from what `make test-kernels` recorded; nothing of\n"
        "it ran on a device. Registers are of a thread, KiB of shared memory of a block; `RS` means a left\n"
        "operand in registers; ragged rows are no multiple of a tile, or of 16 bytes.\n\n"
        f"Besides these, {len(tried)} launches that tuning tries on sm_90: {failed} do not compile, {spills} spill, "
        f"{waits} are serialised,\n{hazards} write to registers of a wgmma that may still run.\n\n{table()}\n"
    )


def cell(row: dict[str, Any]) -> str:
    """Return registers, shared memory, wgmma and what is wrong."""
    if "failed" in row:
        return row["failed"]
    parts = [f"{row['registers']} registers, {row['shared'] // 1024} KiB"]
    parts += [row.get("wgmma")] * bool(row.get("wgmma"))
    parts += [f"spills {row['stack'] + row['spills']} B"] * bool(row["stack"] or row["spills"])
    parts += ["serialised"] * bool(row.get("serialised"))
    parts += [f"{row.get('hazards')} hazards"] * bool(row.get("hazards"))
    return ", ".join(parts)


def main() -> int:
    """Compile or print."""
    it = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    it.add_argument("--archs", nargs="+", default=list(ARCHITECTURES))
    it.add_argument("--shipped", action="store_true", help="leave out what tuning tries")
    it.add_argument("--table", action="store_true", help="write what is known to benchmarks/results/kernels.md")
    arguments = it.parse_args()
    if arguments.table:
        PAGE.write_text(page())
        return 0
    wrong = compile_all(tuple(arguments.archs), tried=False)
    if not arguments.shipped:
        wrong += compile_all(("sm_90",), tried=True)
    return min(1, wrong)


if __name__ == "__main__":
    sys.exit(main())

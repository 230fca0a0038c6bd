"""Which package may import which, as data: the test holds it, and the table in CONTRIBUTING is made from it.

``python tests/support/floors.py`` prints that table.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]

# Lowest first. A package imports from lower floors and from itself; neighbours on one floor do not know each other.
FLOORS: list[dict[str, str]] = [
    {
        "csrc": "C++ on ATen: solver, covariance, linear",
        "system": "version, environment, files, tensors as bytes, processes, log, compiled extension",
    },
    {"config": "the one configuration object", "kernels": "Triton kernels, launchers, configurations as data"},
    {
        "models": "questions about a model: targets, weights, wrappers, identity, refusals",
        "ops": "tensor operations: references, autograd, the one gate that chooses an implementation",
    },
    {"covariances": "matrices by layer, in memory and in files", "solver": "covariance to null space to factors"},
    {
        "adapters": "adapted layers; initialize, save, load, merge, export",
        "calibration": "texts to covariances",
    },
    {
        "evaluation": "a tuned model beside the pre-trained one; spectra and adapters in figures",
        "onepass": "a model on disk to an adapter, one layer at a time: calibrated, solved and dropped",
        "peft": "the same for models that PEFT has prepared",
    },
    {
        "__init__": "the public names, loaded on first use",
        "bayes": "posteriors over adapters, and honest probabilities from them",
        "integrations": "for other people's training programs: a trainer callback, a plugin for axolotl",
        "quickstart": "the whole way on a real model",
    },
    {"cli": "the command line"},
]
# What only a type checker reads, or an entry that hands a public name through, builds no floor.
SHIMS = {"__init__"}


def package_of(module: str) -> str:
    """Return the package that ``lora_null.x.y`` belongs to: ``x``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else "__init__"


def imports(path: Path, module: str, is_package: bool) -> Iterator[tuple[str, int]]:
    """Yield ``(module of this package, line)`` for everything that a file imports from lora_null, at any depth."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name.split(".")[0] == "lora_null":
                    yield alias.name, node.lineno
        elif isinstance(node, ast.ImportFrom):
            origin = node.module or ""
            if node.level:
                parts = module.split(".")
                base = parts[: len(parts) - node.level + is_package]
                origin = ".".join([*base, *filter(None, [origin])])
            if origin.split(".")[0] != "lora_null":
                continue
            if origin == "lora_null":
                yield from ((f"lora_null.{alias.name}", node.lineno) for alias in node.names)
            else:
                yield origin, node.lineno


def modules(root: Path = ROOT) -> Iterator[tuple[str, Path, bool]]:
    """Yield name, file and whether it is a package's ``__init__`` for every module of the library."""
    for folder, prefix in ((root / "lora_null", "lora_null"), (root / "kernels" / "gpu", "lora_null.kernels")):
        for path in sorted(folder.rglob("*.py")):
            parts = path.relative_to(folder).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            yield ".".join([prefix, *(parts[:-1] if is_package else parts)]), path, is_package


def arrows(root: Path = ROOT) -> dict[tuple[str, str], list[str]]:
    """Return ``(package, imported package) -> places`` of the library."""
    found: dict[tuple[str, str], list[str]] = {}
    for module, path, is_package in modules(root):
        for target, line in imports(path, module, is_package):
            own, other = package_of(module), package_of(target)
            if own != other:
                found.setdefault((own, other), []).append(f"{path.relative_to(root)}:{line}")
    return found


def violations(root: Path = ROOT) -> list[str]:
    """Return every import that does not go to a lower floor, as a sentence."""
    floor = {package: number for number, packages in enumerate(FLOORS) for package in packages}
    wrong = []
    for (own, other), places in sorted(arrows(root).items()):
        if own in SHIMS:
            continue
        if own not in floor or other not in floor:
            wrong.append(f"{places[0]}: {own} -> {other}, of which one has no floor; add it to tests/support/floors.py")
        elif floor[other] >= floor[own]:
            wrong.append(
                f"{places[0]}: {own} (floor {floor[own]}) imports {other} (floor {floor[other]}); expected imports to "
                "lower floors only. Move what both need down, or hand it in as an argument."
            )
    return wrong


def table() -> str:
    """Return the floors as the Markdown table of CONTRIBUTING, highest first."""
    lines = ["| floor | package | what it is |", "|---|---|---|"]
    for number, packages in reversed(list(enumerate(FLOORS))):
        lines += [f"| {number} | `{package}` | {text} |" for package, text in packages.items()]
    return "\n".join(lines)


if __name__ == "__main__":
    print(table())

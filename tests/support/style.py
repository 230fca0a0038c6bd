"""What linters do not know of this project, as data: patterns that are refused, and where each is allowed.

``python tests/support/style.py`` prints every place that breaks a rule and fails if there is one.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[2]
LIBRARY = ("lora_null", "kernels", "csrc")
CODE = (*LIBRARY, "benchmarks", "examples", "tests")
SUFFIXES = {".py", ".cpp", ".h"}


class Rule(NamedTuple):
    """A pattern of one line, the folders it is refused in, the files that may hold it, and the remedy."""

    name: str
    pattern: str
    folders: tuple[str, ...]
    remedy: str
    allowed: frozenset[str] = frozenset()


RULES = (
    Rule(
        "banner",
        r"^\s*(#|//|/\*)\s*[-=*#~/]{3,}",
        CODE,
        "say why, or give the part a file of its own",
    ),
    Rule(
        "atomics",
        r"\btl\.atomic_",
        LIBRARY,
        "runs would differ in their last bits",
        # Adds its splits up with relaxed additions where the configuration says so.
        frozenset({"kernels/gpu/syrk_kernels.py"}),
    ),
    Rule("block pointer", r"\bmake_block_ptr\b", LIBRARY, "gone upstream: int64 addresses with masks, or descriptors"),
    Rule(
        "environment variable",
        r"\bos\.environ\b|\bimport environ\b|\bgetenv\b",
        LIBRARY,
        "read it in lora_null/system/environment.py and ask there",
        # The second puts ninja on PATH for as long as torch builds the extension.
        frozenset({"lora_null/system/environment.py", "lora_null/system/extension.py"}),
    ),
)
# `x` without a neighbour of the same kind, and no role such as :func:`x`.
SINGLE_BACKTICKS = re.compile(r"(?<![`:\w])`[^`\n]+`(?!`)")


def files(root: Path, folders: tuple[str, ...]) -> Iterator[Path]:
    """Yield the sources below ``folders``."""
    for folder in folders:
        yield from sorted(path for path in (root / folder).rglob("*") if path.suffix in SUFFIXES)


def documented(path: Path) -> Iterator[tuple[ast.AST, int, list[str]]]:
    """Yield ``(node, number of the first line, lines)`` of every docstring of a Python file."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, kinds) and (text := ast.get_docstring(node, clean=False)) is not None:
            yield node, node.body[0].lineno, text.split("\n")


def parameters(node: ast.AST) -> set[str]:
    """Return the parameters of a function; of a class those of ``__init__``, its fields, attributes and methods."""
    names = set()
    for part in ast.walk(node) if isinstance(node, ast.ClassDef) else [node]:
        if isinstance(part, (ast.FunctionDef, ast.AsyncFunctionDef)):
            arguments = part.args
            every = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
            names |= {argument.arg for argument in every if argument} | {part.name}
        elif isinstance(part, ast.AnnAssign) and isinstance(part.target, ast.Name):
            names.add(part.target.id)
        elif isinstance(part, ast.Attribute) and isinstance(part.ctx, ast.Store):
            names.add(part.attr)
    return names


def sections(lines: list[str]) -> Iterator[tuple[int, str]]:
    """Yield ``(index of its line, name)`` of everything described under ``Args:`` and ``Attributes:``."""
    heading: int | None = None
    for index, line in enumerate(lines):
        indent = len(line) - len(line.lstrip())
        if line.strip() in ("Args:", "Attributes:"):
            heading = indent
        elif line.strip() and heading is not None:
            if indent <= heading:
                heading = None
            elif indent == heading + 4 and (entry := re.match(r"\s*([\w*, ]+?)(?: \(.*?\))?:", line)):
                yield from ((index, name.strip(" *")) for name in entry.group(1).split(","))


def violations(root: Path = ROOT) -> list[str]:
    """Return ``file:line: what was found; the remedy`` for every place that breaks a rule."""
    wrong = []
    for rule in RULES:
        for path in files(root, rule.folders):
            name = path.relative_to(root).as_posix()
            if name in rule.allowed:
                continue
            for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
                if re.search(rule.pattern, line):
                    wrong.append(f"{name}:{number}: {rule.name}: {line.strip()!r}; {rule.remedy}.")
    for path in files(root, LIBRARY):
        if path.suffix != ".py":
            continue
        name = path.relative_to(root).as_posix()
        for node, first, lines in documented(path):
            for number, line in enumerate(lines, start=first):
                if match := SINGLE_BACKTICKS.search(line):
                    wrong.append(f"{name}:{number}: single backticks: {match.group()}; write ``...`` or :func:`...`.")
            known = parameters(node)
            for index, described in sections(lines):
                if described not in known:
                    wrong.append(f"{name}:{first + index}: no such parameter: {described}; rename or remove it.")
    return wrong


if __name__ == "__main__":
    found = violations()
    print(*found, sep="\n", end="\n" if found else "")
    sys.exit(bool(found))

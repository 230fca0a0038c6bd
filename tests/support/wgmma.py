"""What may go wrong with the asynchronous matrix products of sm_90, read from a kernel's machine code.

A wgmma reads the registers of its left operand, and adds to those of its accumulator, until a wait says that it is
done. A compiler that writes to them before leaves undefined results; one that is not sure puts a wait after each.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass

_INSTRUCTION = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;")
_PRODUCT = re.compile(r"HGMMA\.64x(\d+)x\d+\S* R(\d+), (?:R(\d+), )?gdesc")
_WAIT = re.compile(r"WARPGROUP\.DEPBAR\.LE gsb0, 0x([0-9a-f]+)")
_WRITE = re.compile(r"(?:@!?U?P\w+ )?([A-Z][\w.]*) R(\d+)\b")
_BRANCH = re.compile(r"BRA\S*.*?(0x[0-9a-f]+)")
# Their first operand is read, or no general register.
_NO_RESULT = ("ST", "RED", "LDGSTS", "HGMMA", "BAR", "SYNCS", "UTMA", "CALL", "RET", "WARPSYNC")


@dataclass(frozen=True)
class Product:
    """One wgmma: where it stands and which registers are its own until it is done."""

    address: str
    registers: frozenset[int]


def instructions(sass: str) -> list[tuple[str, str]]:
    """Return ``(address, text)`` of every instruction of a disassembly by cuobjdump."""
    return [(address, text) for address, text in _INSTRUCTION.findall(sass) if not text.startswith("0x")]


def shapes(sass: str) -> set[str]:
    """Return the shapes of the wgmma: ``m64n128`` and whether the left operand is in registers, as ``RS`` or ``SS``."""
    found = (_PRODUCT.search(text) for _, text in instructions(sass))
    return {f"m64n{match[1]} {'RS' if match[3] else 'SS'}" for match in found if match}


def loops(code: list[tuple[str, str]]) -> Iterator[list[tuple[str, str]]]:
    """Yield the bodies of the loops that hold a wgmma, inner ones on their own too."""
    place = {int(address, 16): index for index, (address, _) in enumerate(code)}
    for end, (address, text) in enumerate(code):
        match = _BRANCH.search(text)
        target = int(match[1], 16) if match else None
        if target in place and target < int(address, 16):
            body = code[place[target] : end + 1]
            if any(_PRODUCT.search(text) for _, text in body):
                yield body


def hazards(sass: str) -> list[str]:
    """Return a line for every write to a register of a wgmma that may still run, each loop followed twice."""
    return sorted({line for body in loops(instructions(sass)) for line in _followed(body + body)})


def _followed(code: list[tuple[str, str]]) -> Iterator[str]:
    groups: list[list[Product]] = []
    open_group: list[Product] = []
    for address, text in code:
        if match := _PRODUCT.search(text):
            accumulator = range(int(match[2]), int(match[2]) + int(match[1]) // 2)
            left = range(int(match[3]), int(match[3]) + 4) if match[3] else ()
            open_group.append(Product(address, frozenset((*accumulator, *left))))
            if "gsb0" in text:
                groups.append(open_group)
                open_group = []
        elif match := _WAIT.search(text):
            pending = int(match[1], 16)
            groups = groups[-pending:] if pending else []
        elif (match := _WRITE.match(text)) and not match[1].startswith(_NO_RESULT):
            written = set(range(int(match[2]), int(match[2]) + _width(match[1])))
            for other in [it for group in (*groups, open_group) for it in group]:
                if written & other.registers:
                    yield f"{address} {text[:60]} writes to registers of the wgmma at {other.address}"


def _width(opcode: str) -> int:
    """Return how many registers an instruction writes."""
    if ".128" in opcode or (opcode.startswith("LDSM") and opcode.endswith(".4")):
        return 4
    return 2 if ".64" in opcode or "WIDE" in opcode or (opcode.startswith("LDSM") and opcode.endswith(".2")) else 1

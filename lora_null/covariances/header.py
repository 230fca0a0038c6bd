"""What a file's header says, read as strictly as it is written: nothing of another type or range passes."""

from __future__ import annotations

from typing import Any


def names_by_key(value: Any) -> dict[str, list[str]]:
    """Return groups of names; ValueError for anything else."""
    if not _is_mapping(value) or not all(
        isinstance(names, list) and names and all(isinstance(name, str) for name in names) for names in value.values()
    ):
        raise ValueError(f"{_short(value)} is no mapping of names to lists of names")
    return value


def counts_by_key(value: Any) -> dict[str, int]:
    """Return numbers of tokens or calls; ValueError for anything else."""
    if not _is_mapping(value) or not all(is_count(count) for count in value.values()):
        raise ValueError(f"{_short(value)} is no mapping of names to numbers from 0 to 2^63 - 1")
    return value


def strings_by_key(value: Any) -> dict[str, str]:
    """Return readable facts; ValueError for anything else."""
    if not _is_mapping(value) or not all(isinstance(text, str) for text in value.values()):
        raise ValueError(f"{_short(value)} is no mapping of names to strings")
    return value


def is_count(value: Any) -> bool:
    """Tell whether ``value`` is a whole number that can have been counted."""
    return type(value) is int and 0 <= value < 2**63


def _is_mapping(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) for key in value)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."

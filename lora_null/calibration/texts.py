"""Calibration texts: files of documents, and the batches of tokens made of them."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..system.files import require_regular
from .masks import IGNORED_LABEL

# Looked for in this order in the objects of a .jsonl file; an answer is appended where one stands beside it.
TEXT_FIELDS = ("text", "question", "prompt", "instruction", "content")
ANSWER_FIELDS = ("answer", "completion", "response", "output")
# Some 250 million tokens, a thousand times what a calibration takes; the whole file is read into memory.
_LARGEST_TEXT = 2**30


def read_texts(data: str | Path, *, field: str | None = None) -> list[str]:
    """Read calibration documents: the paragraphs of a text file, or one field of each line of a .jsonl file.

    Args:
        data: The file. A name ending in ``.jsonl`` is read as JSON lines, anything else as text whose documents
            are separated by blank lines.
        field: Which field of the JSON objects; the default is the first of :data:`TEXT_FIELDS` that exists, followed by
            the first of :data:`ANSWER_FIELDS`.

    Raises:
        FileNotFoundError: No such file.
        IsADirectoryError: It is a folder.
        ValueError: No regular file, or larger than 1 GiB; a line is not an object with that field; nothing is left.
    """
    path = Path(data)
    expected = "a text file or a .jsonl file with calibration text"
    if path.suffix.lower() == ".jsonl":
        lines = read_json_lines(path, expected, "one object per line")
        texts = [_json_text(path, number, entry, field) for number, entry in lines]
    else:
        texts = [paragraph.strip() for paragraph in re.split(r"\n[^\S\n]*\n", _content(path, expected))]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(
            f"{path} holds no text; expected documents, with empty lines between them or one a line of .jsonl."
        )
    return texts


def read_json_lines(path: Path, expected: str, per_line: str) -> list[tuple[int, Any]]:
    """Return ``(line number, value)`` for each line of a file that is not blank.

    Args:
        path: The file.
        expected: What it should be, for messages.
        per_line: What each line should be, for messages.

    Raises:
        FileNotFoundError: No such file.
        IsADirectoryError: It is a folder.
        ValueError: No regular file, or larger than 1 GiB; not UTF-8; a line is not JSON.
    """
    entries = []
    # splitlines() would also cut at the separators that JSON allows inside a string, such as U+2028.
    for number, line in enumerate(_content(path, expected).split("\n"), start=1):
        if line.strip():
            try:
                entries.append((number, json.loads(line)))
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}, line {number} is not JSON ({error}); expected {per_line}.") from None
    return entries


def check_sizes(**sizes: int | None) -> None:
    """Raise a ValueError for a size below 1; None is no limit."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; expected a positive integer.")


def token_batches(
    tokenizer: Any,
    texts: Sequence[str],
    *,
    sequence_length: int = 512,
    batch_size: int = 16,
    max_tokens: int | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Tokenise documents into padded batches, each with ``input_ids`` and ``attention_mask (B, L)``.

    Documents keep their own beginning, as the model met them; longer ones than ``sequence_length`` are cut. With
    ``max_tokens`` documents are drawn in an order that ``seed`` fixes, and the last one is cut where that many tokens
    are reached. Batches are sorted by length, so that little is padded.

    Raises:
        ValueError: The documents have no token, or a size is not positive.
    """
    check_sizes(sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens)
    order = list(range(len(texts)))
    if max_tokens is not None:
        random.Random(seed).shuffle(order)
    pieces: list[list[int]] = []
    total = 0
    for index in order:
        if max_tokens is not None and total >= max_tokens:
            break
        ids = tokenizer(texts[index])["input_ids"]
        if max_tokens is not None:
            ids = ids[: max_tokens - total]
        pieces.extend(ids[start : start + sequence_length] for start in range(0, len(ids), sequence_length))
        total += len(ids)
    if not total:
        raise ValueError(f"The {len(texts)} calibration documents have no token; expected text.")
    pieces.sort(key=len)
    return [_pad(pieces[i : i + batch_size], tokenizer.pad_token_id or 0) for i in range(0, len(pieces), batch_size)]


def read_on_both_sides(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Give batches labels, from which an encoder-decoder model makes its decoder's input: the same text."""
    labels = [batch["input_ids"].masked_fill(batch["attention_mask"] == 0, IGNORED_LABEL) for batch in batches]
    return [{**batch, "labels": own} for batch, own in zip(batches, labels, strict=True)]


def _pad(pieces: Iterable[list[int]], fill: int) -> dict[str, Tensor]:
    pieces = list(pieces)
    length = max(map(len, pieces))
    ids = torch.tensor([piece + [fill] * (length - len(piece)) for piece in pieces])
    mask = torch.tensor([[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces])
    return {"input_ids": ids, "attention_mask": mask}


def _content(path: Path, expected: str) -> str:
    require_regular(path, expected, _LARGEST_TEXT)
    try:
        # Some editors put a byte order mark first.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first."
        ) from None


def _json_text(path: Path, number: int, entry: Any, field: str | None) -> str:
    if isinstance(entry, str):
        return entry
    names = (field,) if field else TEXT_FIELDS
    found = [name for name in names if isinstance(entry, dict) and isinstance(entry.get(name), str)]
    if not found:
        has = sorted(entry) if isinstance(entry, dict) else f"a {type(entry).__name__}"
        raise ValueError(
            f"{path}, line {number} has {has}; expected an object with a text field "
            f"{' or '.join(names)}. Name it with --field."
        )
    answers = [] if field else [entry[name] for name in ANSWER_FIELDS if isinstance(entry.get(name), str)]
    return "\n".join([entry[found[0]], *answers[:1]]).strip()

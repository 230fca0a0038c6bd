"""Where calibration texts come from: text files, JSON lines, and what the library datasets reads."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..system.files import require_regular

# Looked for in this order in the objects of a file; an answer is appended where one stands beside it.
TEXT_FIELDS = ("text", "question", "prompt", "instruction", "content")
ANSWER_FIELDS = ("answer", "completion", "response", "output")
# Before all of them: a conversation, as chat templates take it.
CHAT_FIELD = "messages"
# Some 250 million tokens, a thousand times what a calibration takes; the whole file is read into memory.
_LARGEST_TEXT = 2**30
# What Dataset.save_to_disk and DatasetDict.save_to_disk leave in their folders.
_SAVED = ("state.json", "dataset_dict.json")
_EXPECTED = (
    "a text file or a .jsonl file with calibration text, a Parquet file, a folder of a data set, or the name of one on "
    "the Hugging Face hub"
)

# A text, or the messages of a conversation, each with its role.
Document = str | Sequence[Mapping[str, Any]]


def read_texts(data: str | os.PathLike, *, field: str | None = None) -> Sequence[Document]:
    """Read calibration documents: paragraphs of a text file, lines of a .jsonl file, or rows of a data set.

    Args:
        data: A file whose name ends in ``.jsonl`` is read as JSON lines; a ``.parquet`` file, a folder that
            ``datasets`` has saved, one with Parquet files, and ``owner/name`` of the hub are read by the library
            ``datasets``, row by row as they are asked for; any other file is text whose documents are separated by
            blank lines.
        field: Which field of an object or row; the default is ``messages``, a conversation, else the first of
            :data:`TEXT_FIELDS` that exists, followed by the first of :data:`ANSWER_FIELDS`.

    Raises:
        FileNotFoundError: No such file, and no such data set.
        ImportError: ``datasets`` is needed, and not installed.
        IsADirectoryError: It is a folder without a data set.
        ValueError: No regular file, or larger than 1 GiB; a line has no such field; nothing is left.
    """
    path = Path(data)
    if _is_data_set(path):
        return Rows(str(data), field)
    if path.suffix.lower() == ".jsonl":
        lines = read_json_lines(path, _EXPECTED, "one object per line")
        texts = [document_of(f"{path}, line {number}", entry, field) for number, entry in lines]
    else:
        texts = [paragraph.strip() for paragraph in re.split(r"\n[^\S\n]*\n", _content(path, _EXPECTED))]
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


def document_of(where: str, entry: Any, field: str | None) -> Document:
    """Return the document in an object or row, which messages call ``where``.

    Raises:
        ValueError: It has no such field.
    """
    if isinstance(entry, str):
        return entry
    values: Mapping[str, Any] = entry if isinstance(entry, Mapping) else {}
    chat: Any = values.get(field or CHAT_FIELD)
    if _is_chat(chat):
        return chat
    names = (field,) if field else TEXT_FIELDS
    found = [name for name in names if isinstance(values.get(name), str)]
    if not found:
        has = sorted(values) if isinstance(entry, Mapping) else f"a {type(entry).__name__}"
        raise ValueError(
            f"{where} has {has}; expected an object with a text field {' or '.join(names)}, or a list of messages "
            f"with role and content under {field or CHAT_FIELD}. Name it with --field."
        )
    answers = [] if field else [values[name] for name in ANSWER_FIELDS if isinstance(values.get(name), str)]
    return "\n".join([values[found[0]], *answers[:1]]).strip()


class Rows(Sequence[Document]):
    """The rows of a data set of the library ``datasets``, each read when it is asked for.

    Args:
        data: A Parquet file, a folder, or a name on the hub.
        field: See :func:`read_texts`.
    """

    def __init__(self, data: str, field: str | None):
        self.data, self.field = data, field
        self._rows = _one_split(data, _loaded(data))
        if not len(self._rows):
            raise ValueError(f"{data} holds no text; expected a data set with rows.")
        self[0]  # a field that is missing shows before the model is loaded

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, index: Any) -> Any:
        return document_of(f"{self.data}, row {index}", self._rows[index], self.field)

    def __iter__(self) -> Iterator[Document]:
        return (self[index] for index in range(len(self)))


def _is_data_set(path: Path) -> bool:
    if path.is_dir():
        return any((path / name).exists() for name in _SAVED) or next(path.rglob("*.parquet"), None) is not None
    if path.exists() or path.suffix.lower() in (".jsonl", ".txt", ".md", ".json"):
        return path.suffix.lower() == ".parquet"
    # owner/name, where there is no folder of that owner
    return len(path.parts) == 2 and not path.parent.exists() and path.parts[0] not in ("..", "~", os.sep)


def _loaded(data: str) -> Any:
    path = Path(data)
    try:
        import datasets
    except ImportError:
        missing = "" if path.exists() else "no such file, and "
        raise ImportError(
            f"{data}: {missing}a data set is read by the library datasets, which is not installed. Expected it (pip "
            "install datasets), or a text file or a .jsonl file."
        ) from None
    try:
        if any((path / name).exists() for name in _SAVED):
            return datasets.load_from_disk(data)
        return datasets.load_dataset("parquet", data_files=data) if path.is_file() else datasets.load_dataset(data)
    except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
        kind = ValueError if path.exists() else FileNotFoundError
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise kind(f"{data} cannot be read ({reason}); expected {_EXPECTED}.") from error


def _one_split(data: str, loaded: Any) -> Any:
    """Return the rows of ``train``, or of the only split there is."""
    if not isinstance(loaded, dict):
        return loaded
    names = list(loaded)
    if "train" in names or len(names) == 1:
        return loaded["train" if "train" in names else names[0]]
    raise ValueError(
        f"{data} has the splits {', '.join(names)}; expected one that is called train, or one split only. Save the one "
        "that you want, with its save_to_disk, and name that folder."
    )


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list)
        and bool(value)
        and all(isinstance(message, Mapping) and isinstance(message.get("role"), str) for message in value)
    )


def _content(path: Path, expected: str) -> str:
    require_regular(path, expected, _LARGEST_TEXT)
    try:
        # Some editors put a byte order mark first.
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first."
        ) from None

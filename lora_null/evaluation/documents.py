"""What is evaluated: documents as tokens, cut into windows, in batches of bounded size."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor

from ..calibration.sources import read_json_lines, read_texts

# A text, or a prompt with the completion that alone is scored.
Text = str | Mapping[str, str]


@dataclass(frozen=True)
class Document:
    """Tokens of a document.

    Attributes:
        ids: All its tokens.
        scored_from: Index of the first token whose prediction counts, at least 1: the first has no context.
    """

    ids: tuple[int, ...]
    scored_from: int = 1


@dataclass(frozen=True)
class Window:
    """As much of a document as the model reads at once.

    Attributes:
        document: Index of the document.
        ids: Its tokens.
        scored_from: As in :class:`Document`, counted within the window.
    """

    document: int
    ids: tuple[int, ...]
    scored_from: int


def read_documents(name: str, texts: str | os.PathLike | Sequence[Text]) -> list[Text]:
    """Return the texts of a file or a list, checked; ``name`` is the argument that errors speak of.

    A ``.jsonl`` file whose objects have ``prompt`` and ``completion`` gives such pairs, any other file the documents
    of :func:`lora_null.calibration.texts.read_texts`.

    Raises:
        FileNotFoundError: No such file.
        TypeError: An entry is neither a text nor a pair.
        ValueError: There is no text, or an empty one.
    """
    if isinstance(texts, str | os.PathLike):
        # conversations are refused below, as what they are
        texts = cast(list[Text], _read_pairs(Path(texts)) or list(read_texts(Path(texts))))
    if not len(texts):
        raise ValueError(f"{name} holds no text; expected a file or a list with at least one document.")
    for number, text in enumerate(texts, start=1):
        pair = isinstance(text, Mapping)
        parts = [text.get("prompt"), text.get("completion")] if isinstance(text, Mapping) else [text]
        if not all(isinstance(part, str) for part in parts):
            found = f"a mapping with {sorted(text)}" if pair else f"a {type(text).__name__}"
            raise TypeError(
                f"{name}: entry {number} is {found}; expected a text, or a mapping of prompt and completion."
            )
        if not str(parts[-1]).strip():
            raise ValueError(f"{name}: entry {number} is empty; leave it out.")
    return list(texts)


def tokenise(name: str, tokenizer: Any, texts: Sequence[Text]) -> list[Document]:
    """Return the tokens of each text, with the special tokens that the tokenizer adds by itself.

    Raises:
        ValueError: The tokenizer does not split a pair where the completion begins, or nothing is left to predict.
    """
    documents = [Document(*encode_pair(tokenizer, *_parts(text))) for text in texts]
    if not any(len(document.ids) > document.scored_from for document in documents):
        raise ValueError(
            f"{name} has no document of two tokens, so that there is nothing to predict; expected longer texts."
        )
    return documents


def encode_pair(tokenizer: Any, prompt: str, completion: str) -> tuple[tuple[int, ...], int]:
    """Return the tokens of ``prompt + completion``, and the index of the first token of the completion.

    Raises:
        ValueError: The tokens of the prompt change when the completion follows, so that it has none of its own.
    """
    whole = tuple(tokenizer(prompt + completion)["input_ids"])
    if not prompt:
        return whole, 1
    start = tuple(tokenizer(prompt)["input_ids"])
    if whole[: len(start)] != start or len(whole) == len(start):
        raise ValueError(
            f"The tokenizer splits {prompt[-40:]!r} differently when {completion[:40]!r} follows, so that the answer "
            "has no tokens of its own. End the prompt where a word ends and let the answer begin with a space; the "
            "tokenizer must not append an end token by itself (add_eos_token=False)."
        )
    return whole, max(1, len(start))


def windows(documents: Sequence[Document], sequence_length: int) -> list[Window]:
    """Cut documents so that every token to be scored is scored once: neighbours share one token as context."""
    cut = []
    for index, document in enumerate(documents):
        for start in range(0, max(1, len(document.ids) - 1), sequence_length - 1):
            ids = document.ids[start : start + sequence_length]
            scored_from = max(1, document.scored_from - start)
            if scored_from < len(ids):
                cut.append(Window(index, ids, scored_from))
    return cut


def batches(cut: Sequence[Window], batch_size: int, max_tokens: int) -> Iterator[list[Window]]:
    """Group windows of similar length, longest first, at most ``batch_size`` and ``max_tokens`` with padding."""
    rest = sorted(cut, key=lambda window: -len(window.ids))
    while rest:
        size = max(1, min(batch_size, max_tokens // len(rest[0].ids)))
        yield rest[:size]
        rest = rest[size:]


def padded(batch: Sequence[Window]) -> tuple[dict[str, Tensor], Tensor]:
    """Return the model's inputs, and which tokens ``(B, L)`` are scored. Padding stands last and is never seen."""
    length = max(len(window.ids) for window in batch)
    ids = torch.tensor([[*window.ids, *[window.ids[-1]] * (length - len(window.ids))] for window in batch])
    position = torch.arange(length)
    mask = position < torch.tensor([[len(window.ids)] for window in batch])
    scored = mask & (position >= torch.tensor([[window.scored_from] for window in batch]))
    return {"input_ids": ids, "attention_mask": mask.long()}, scored


def _parts(text: Text) -> tuple[str, str]:
    return ("", text) if isinstance(text, str) else (text["prompt"], text["completion"])


def _read_pairs(path: Path) -> list[Text]:
    """Return the objects of a .jsonl file if all have a prompt and a completion, else nothing."""
    if path.suffix.lower() != ".jsonl" or not path.is_file():
        return []
    try:
        entries = [entry for _, entry in read_json_lines(path, "a .jsonl file of texts", "one object per line")]
    except ValueError:
        return []  # read_texts says what is wrong, and in which line
    pairs: list[Text] = [
        entry for entry in entries if isinstance(entry, dict) and {"prompt", "completion"} <= entry.keys()
    ]
    return pairs if len(pairs) == len(entries) else []

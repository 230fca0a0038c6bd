"""Calibration texts as batches of tokens, and which of the tokens count."""

from __future__ import annotations

import os
import random
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..covariances.covariances import check_weight
from ..models.arguments import PATH, takes
from .batches import WEIGHT
from .chat import chat_tokens
from .masks import IGNORED_LABEL
from .sources import Document, read_texts


def check_sizes(**sizes: int | None) -> None:
    """Raise a ValueError for a size below 1; None is no limit."""
    for name, size in sizes.items():
        if size is not None and size < 1:
            raise ValueError(f"{name} is {size}; expected a positive integer.")


@takes(data=(*PATH, list, tuple))
def text_batches(
    tokenizer: Any,
    data: str | os.PathLike | Sequence[str | os.PathLike],
    *,
    weights: Sequence[float] | None = None,
    field: str | None = None,
    roles: Sequence[str] | None = None,
    sequence_length: int = 512,
    batch_size: int = 16,
    max_tokens: int | None = None,
    seed: int = 0,
) -> list[dict[str, Any]]:
    """Read files or data sets, one or several, into batches for :func:`lora_null.calibrate`.

    With weights the covariances are those of each text alone, added with these weights (:meth:`Covariances.weighted`).

    Args:
        tokenizer: The model's; conversations need its chat template.
        data: A text file, documents separated by blank lines; a ``.jsonl`` file; or what the library ``datasets``
            reads: a ``.parquet`` file, a folder that it has saved or one with Parquet files, or ``owner/name`` on the
            hub, of which the split ``train`` is taken, or the only one. A list of these is read in order.
        weights: How often each token of a text counts, a number for each text; the default is once.
        field: Of the objects or rows. The default is ``messages``, a conversation, else ``text``, ``question``,
            ``prompt``, ``instruction`` or ``content``, followed by ``answer``, ``completion``, ``response`` or
            ``output``.
        roles: Only tokens of messages with these roles count, by the batches' ``labels``: calibrate with
            ``mask="labels"``. To a message belongs all that the template writes for it. Documents that are no
            conversations count in whole.
        sequence_length: Longer documents are cut into pieces.
        batch_size: Pieces in a batch.
        max_tokens: Of each text, documents are drawn until so many tokens count; the default is all of them.
        seed: Of the order in which they are drawn.

    Returns:
        Batches with ``input_ids`` and ``attention_mask (B, L)``; with ``roles`` also ``labels (B, L)``, and with
        weights ``text_weight``.

    Raises:
        TypeError: ``tokenizer`` is none, or ``data`` no path.
        FileNotFoundError: No such file, and no such data set on the hub.
        ImportError: The library ``datasets`` is needed, and not installed.
        ValueError: A file cannot be read or holds no text; a size is not positive; a weight is no number from 1e-6 to
            1e6, or there are more or fewer than texts; nobody has one of the roles, or the chat template writes
            messages otherwise when more follow, so that nobody knows which tokens are whose.
    """
    if not callable(tokenizer) or isinstance(tokenizer, type):
        raise TypeError(
            f"text_batches: tokenizer is {tokenizer!r:.80}; expected the model's tokenizer. Were arguments swapped or "
            "left out? Their order is tokenizer, data."
        )
    check_sizes(sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens)
    sources: list[Any] = list(data) if isinstance(data, list | tuple) else [data]
    check_weights(weights, len(sources))
    texts = [read_texts(source, field=field) for source in sources]
    batches: list[dict[str, Any]] = []
    for number, documents in enumerate(texts):
        own: list[dict[str, Any]] = token_batches(
            tokenizer,
            documents,
            roles=roles,
            sequence_length=sequence_length,
            batch_size=batch_size,
            max_tokens=max_tokens,
            seed=seed,
        )
        batches += own if weights is None else with_weight(own, weights[number])
    return batches


def check_weights(weights: Sequence[float] | None, texts: int) -> None:
    """Raise a ValueError unless there is a number for each of so many texts; None is one for each."""
    if weights is not None and len(weights) != texts:
        raise ValueError(f"weights are {list(weights)}; expected {texts}, one for each text, in their order.")
    for weight in weights or ():
        check_weight(weight)


def with_weight(batches: Sequence[dict[str, Any]], weight: float) -> list[dict[str, Any]]:
    """Let each token of the batches count ``weight`` times."""
    return [{**batch, WEIGHT: weight} for batch in batches]


def token_batches(
    tokenizer: Any,
    texts: Sequence[Document],
    *,
    roles: Sequence[str] | None = None,
    sequence_length: int = 512,
    batch_size: int = 16,
    max_tokens: int | None = None,
    seed: int = 0,
) -> list[dict[str, Tensor]]:
    """Tokenise documents into padded batches, each with ``input_ids`` and ``attention_mask (B, L)``.

    Documents keep their own beginning, as the model met them; longer ones than ``sequence_length`` are cut. With
    ``max_tokens`` documents are drawn in an order that ``seed`` fixes, and the last one is cut where that many tokens
    count. Batches are sorted by length, so that little is padded. ``roles``: see :func:`text_batches`.

    Raises:
        ValueError: No token of the documents counts, or a size is not positive.
    """
    check_sizes(sequence_length=sequence_length, batch_size=batch_size, max_tokens=max_tokens)
    order = list(range(len(texts)))
    if max_tokens is not None:
        random.Random(seed).shuffle(order)
    pieces: list[tuple[list[int], list[int]]] = []
    total, met = 0, set()
    for index in order:
        if max_tokens is not None and total >= max_tokens:
            break
        document = texts[index]
        if isinstance(document, str):
            ids = tokenizer(document)["input_ids"] if document else []
            labels = ids
        else:
            met |= {message["role"] for message in document}
            ids, labels = chat_tokens(tokenizer, document, roles)
        if max_tokens is not None:
            end = _end_of(labels, max_tokens - total)
            ids, labels = ids[:end], labels[:end]
        for start in range(0, len(ids), sequence_length):
            piece = ids[start : start + sequence_length], labels[start : start + sequence_length]
            counted = sum(label != IGNORED_LABEL for label in piece[1])
            total += counted
            if counted:
                pieces.append(piece)
    if not total:
        roles_met = f" The roles are {', '.join(sorted(met))}, and counted are {', '.join(roles)}." if roles else ""
        raise ValueError(f"The {len(texts)} calibration documents have no token that counts; expected text.{roles_met}")
    pieces.sort(key=lambda piece: len(piece[0]))
    groups = [pieces[i : i + batch_size] for i in range(0, len(pieces), batch_size)]
    return [_pad(group, tokenizer.pad_token_id or 0, labelled=roles is not None) for group in groups]


def labelled(batches: Sequence[dict[str, Tensor]]) -> list[dict[str, Tensor]]:
    """Give batches labels, of all tokens but padding, where there are none. A decoder beside an encoder reads them."""
    return [batch if "labels" in batch else {**batch, "labels": _unpadded(batch)} for batch in batches]


def _unpadded(batch: dict[str, Tensor]) -> Tensor:
    ids = batch["input_ids"]
    return ids.masked_fill(batch.get("attention_mask", torch.ones_like(ids)) == 0, IGNORED_LABEL)


def _end_of(labels: Sequence[int], count: int) -> int:
    """Return after how many tokens ``count`` of them count, or all."""
    for position, label in enumerate(labels):
        count -= label != IGNORED_LABEL
        if not count:
            return position + 1
    return len(labels)


def _pad(pieces: Sequence[tuple[list[int], list[int]]], fill: int, *, labelled: bool) -> dict[str, Tensor]:
    length = max(len(ids) for ids, _ in pieces)
    batch = {
        "input_ids": torch.tensor([ids + [fill] * (length - len(ids)) for ids, _ in pieces]),
        "attention_mask": torch.tensor([[1] * len(ids) + [0] * (length - len(ids)) for ids, _ in pieces]),
    }
    if labelled:
        rows = [labels + [IGNORED_LABEL] * (length - len(labels)) for _, labels in pieces]
        batch["labels"] = torch.tensor(rows)
    return batch

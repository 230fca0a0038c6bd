"""Conversations as tokens, by the tokenizer's chat template, and which message each token belongs to."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from .masks import IGNORED_LABEL


def chat_tokens(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], roles: Sequence[str] | None = None
) -> tuple[list[int], list[int]]:
    """Return the token ids of a conversation, and its labels: those of other roles are left out, as trainers do.

    A message's tokens are all that the template writes for it: what it writes once the message is there, less what it
    wrote before. A token on the border belongs to the message in which it begins.

    Raises:
        ValueError: There is no chat template, or it refuses the conversation; with ``roles``: the template changes
            earlier messages when others follow, or the tokenizer does not say where its tokens come from.
    """
    if not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            "The text has conversations (messages), but the tokenizer has no chat template; expected that of a chat "
            "model. Or write the conversations as text."
        )
    text = _written(tokenizer, messages)
    if roles is None:
        ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
        return ids, ids
    if not getattr(tokenizer, "is_fast", False):
        raise ValueError(
            f"roles: {type(tokenizer).__name__} does not say which part of the text a token is; expected a fast "
            "tokenizer (of the library tokenizers). Leave roles out."
        )
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    counts = [message["role"] in roles for message in messages]
    spans = [span for span, counted in zip(_spans(tokenizer, messages, counts, text), counts, strict=True) if counted]
    ids = list(encoded["input_ids"])
    starts = [start for start, _ in encoded["offset_mapping"]]
    labels = [
        token if any(first <= start < end for first, end in spans) else IGNORED_LABEL
        for token, start in zip(ids, starts, strict=True)
    ]
    return ids, labels


def _written(tokenizer: Any, messages: Sequence[Mapping[str, Any]]) -> str:
    try:
        return tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False)
    except Exception as error:  # templates raise jinja2's errors and any other
        roles = ", ".join(str(message["role"]) for message in messages)
        raise ValueError(f"The chat template refuses a conversation of {roles} ({error}).") from error


def _spans(
    tokenizer: Any, messages: Sequence[Mapping[str, Any]], counts: Sequence[bool], text: str
) -> list[tuple[int, int]]:
    """Return where each message begins and ends in ``text``; exact only where ``counts`` changes, which is enough."""
    borders = [0]
    for number in range(1, len(messages)):
        if counts[number] == counts[number - 1]:
            # neighbours of one kind need no border, and some templates refuse to end between them
            borders.append(borders[-1])
            continue
        before = _written(tokenizer, messages[:number])
        if not text.startswith(before):
            raise ValueError(
                f"roles: the chat template writes the first {number} of {len(messages)} messages otherwise when more "
                "follow, so that nobody knows which tokens are whose. Leave roles out, or give conversations that end "
                "with the message that shall count."
            )
        borders.append(len(before))
    return list(pairwise([*borders, len(text)]))

"""Text that a model writes itself: what it knows to say, where no text like its pre-training is at hand."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from ..models.arguments import takes
from ..models.modes import evaluating, input_device
from ..models.parts import cache_name
from .texts import check_sizes


@takes(model=nn.Module)
def own_text(
    model: nn.Module,
    tokenizer: Any,
    tokens: int = 16384,
    *,
    prompts: Sequence[str] = (),
    sequence_length: int = 128,
    batch_size: int = 32,
    seed: int = 0,
    progress: bool = True,
) -> list[dict[str, Tensor]]:
    """Let a causal language model write batches of text to calibrate on, token by token from its own distribution.

    Its own text needs no file and holds every kind of text that the model would write; an adapter that leaves alone
    what the model reads there changes its distribution least (docs/retention.md). Documents begin with nothing, that
    is with the tokenizer's ``bos_token``, else with its ``eos_token``, or with prompts, and are not ended: after an
    end the model goes on with another text, as it read them in pre-training.

    Args:
        model: With a KV cache, as all causal language models of transformers have.
        tokenizer: Its tokenizer.
        tokens: How many are wanted, prompts included, rounded up to whole documents; at least ``2 d`` for the widest
            layer.
        prompts: Taken in turns; the model goes on with each. Those of equal length run together.
        sequence_length: Tokens of each document.
        batch_size: Documents that are written together.
        seed: Of the draws; the global random state is left alone.
        progress: Show a progress bar.

    Returns:
        Batches for :func:`lora_null.calibrate`: ``{"input_ids": (batch, sequence_length)}``, without padding.

    Raises:
        TypeError: ``model`` is no model.
        ValueError: A size is not positive; a prompt is as long as a document; the tokenizer knows no token to begin
            with; the model keeps no cache, or has an encoder.
    """
    check_sizes(tokens=tokens, sequence_length=sequence_length, batch_size=batch_size)
    count = -(-tokens // sequence_length)
    beginnings = _beginnings(tokenizer, prompts, sequence_length)
    wanted = sorted((beginnings[i % len(beginnings)] for i in range(count)), key=len)
    generator = torch.Generator().manual_seed(seed)
    batches = []
    with evaluating(model), tqdm(total=count, desc="write", unit="document", disable=not progress) as bar:
        for _, group in groupby(wanted, key=len):
            rows = list(group)
            for start in range(0, len(rows), batch_size):
                ids = torch.tensor(rows[start : start + batch_size])
                batches.append({"input_ids": _continued(model, ids, sequence_length, generator)})
                bar.update(len(ids))
    return batches


def unwritten_text(
    tokenizer: Any, tokens: int, *, sequence_length: int = 128, batch_size: int = 32
) -> list[dict[str, Tensor]]:
    """Return batches of the sizes that :func:`own_text` would write without prompts, to plan with."""
    check_sizes(tokens=tokens, sequence_length=sequence_length, batch_size=batch_size)
    [[first]] = _beginnings(tokenizer, (), sequence_length)
    count = -(-tokens // sequence_length)
    sizes = [min(batch_size, count - start) for start in range(0, count, batch_size)]
    return [{"input_ids": torch.full((size, sequence_length), first)} for size in sizes]


def _beginnings(tokenizer: Any, prompts: Sequence[str], sequence_length: int) -> list[list[int]]:
    if not prompts:
        first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else tokenizer.eos_token_id
        if first is None:
            raise ValueError(
                "own_text: the tokenizer has neither a bos_token nor an eos_token; expected one of them, or prompts "
                "to begin with."
            )
        return [[first]]
    beginnings = [list(tokenizer(prompt)["input_ids"]) for prompt in prompts]
    for prompt, ids in zip(prompts, beginnings, strict=True):
        if not 0 < len(ids) < sequence_length:
            raise ValueError(
                f"own_text: the prompt {prompt[:40]!r} has {len(ids)} tokens; expected at least one, and fewer than "
                f"sequence_length={sequence_length}, so that the model has something to write."
            )
    return beginnings


def _continued(model: nn.Module, ids: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Return ``ids (B, n)`` continued to ``(B, length)`` on the CPU."""
    device, cache, name = input_device(model), None, cache_name(model)
    while ids.shape[1] < length:
        new = ids if cache is None else ids[:, -1:]
        outputs = model(input_ids=new.to(device), use_cache=True, **{name: cache})
        cache = getattr(outputs, name, None)
        if cache is None or getattr(outputs, "encoder_last_hidden_state", None) is not None:
            raise ValueError(
                f"own_text: {type(model).__name__} returned no {name}, or has an encoder; expected a causal "
                "language model that keeps a cache. Give calibrate a text instead."
            )
        # Drawn on the CPU, so that a seed means the same on every device.
        chances = outputs.logits[:, -1].float().softmax(-1).cpu()
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)], dim=1)
    return ids

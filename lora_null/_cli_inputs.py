"""What the commands read: a model with its tokenizer, and calibration text."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Looked for in this order in the objects of a .jsonl file; an answer is appended where one stands beside it.
TEXT_FIELDS = ("text", "question", "prompt", "instruction", "content")
ANSWER_FIELDS = ("answer", "completion", "response", "output")


def choose_device(device: str = "auto") -> str:
    """Return ``device``, where ``"auto"`` means a CUDA device if there is one.

    Raises:
        ValueError: There is no such device here.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    if device.split(":")[0] == "meta":
        raise ValueError("device is 'meta', which holds no data; expected auto, cpu, cuda or cuda:N.")
    try:
        # Also what a torch without CUDA, or a machine with fewer devices, answers; each in another exception.
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"device is {device!r}, which cannot be used here ({reason}); expected auto, cpu, cuda or cuda:N."
        ) from None
    return device


def load_model(model: str, *, dtype: str = "auto", device: str = "auto") -> tuple[Any, Any]:
    """Load a causal language model for inference, and its tokenizer with a padding token.

    Args:
        model: A folder or a Hugging Face model id.
        dtype: Name of a torch dtype; ``"auto"`` means the checkpoint's own.
        device: ``"auto"``, ``"cpu"``, ``"cuda"``, ``"cuda:1"``, ...

    Raises:
        ValueError: No such model, dtype or device; or the model is a checkpoint of a run with adapters, which
            transformers would load without them.
    """
    from transformers import AutoModelForCausalLM

    chosen, device = parse_dtype(dtype) or "auto", choose_device(device)
    tokenizer = load_tokenizer(model)
    loaded: Any = AutoModelForCausalLM.from_pretrained(model, dtype=chosen)
    if getattr(loaded.config, "lora_null", None):
        raise ValueError(
            f"{model} is a checkpoint of a model patched by lora_null: loaded as a model it would lack its adapters, "
            "and its base may be shifted. Expected the pre-trained model; turn the checkpoint into an adapter with "
            "lora-null export."
        )
    return loaded.to(device).eval(), tokenizer


def load_tokenizer(model: str) -> Any:
    """Load a tokenizer that pads with its end token where it has no padding token: none is ever added."""
    from transformers import AutoTokenizer

    # transformers would ask the hub for a folder that does not exist, and report a network error.
    if model.startswith((".", "/", "~")) or model.count("/") > 1:
        if not Path(model).expanduser().is_dir():
            raise FileNotFoundError(f"{model} is not a folder; expected a model folder or a Hugging Face model id.")
    tokenizer = AutoTokenizer.from_pretrained(model)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def parse_dtype(name: str | None) -> torch.dtype | None:
    """Return the torch dtype called ``name``, in long or short form; None for None and ``"auto"``."""
    if name in (None, "auto"):
        return None
    short = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32", "fp64": "float64"}
    dtype = getattr(torch, short.get(name, name), None)
    if not isinstance(dtype, torch.dtype) or not dtype.is_floating_point:
        raise ValueError(f"dtype is {name!r}; expected float32, bfloat16 or float16 (fp32, bf16, fp16), or auto.")
    return dtype


def read_texts(data: str | Path, *, field: str | None = None) -> list[str]:
    """Read calibration documents: the paragraphs of a text file, or one field of each line of a .jsonl file.

    Args:
        data: The file. A name ending in ``.jsonl`` is read as JSON lines, anything else as text whose documents
            are separated by blank lines.
        field: Which field of the JSON objects; the default is the first of :data:`TEXT_FIELDS` that exists, followed by
            the first of :data:`ANSWER_FIELDS`.

    Raises:
        FileNotFoundError: No such file.
        ValueError: A line is not an object with that field, or nothing is left to read.
    """
    path = Path(data)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not a file; expected a text file or a .jsonl file with calibration text.")
    try:
        # Some editors put a byte order mark first.
        content = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not UTF-8 text ({error.reason} at byte {error.start}); convert it first."
        ) from None
    if path.suffix.lower() == ".jsonl":
        # splitlines() would also cut at the separators that JSON allows inside a string, such as U+2028.
        numbered = enumerate(content.split("\n"), start=1)
        texts = [_json_text(path, number, line, field) for number, line in numbered if line.strip()]
    else:
        texts = [paragraph.strip() for paragraph in re.split(r"\n[^\S\n]*\n", content)]
    texts = [text for text in texts if text]
    if not texts:
        raise ValueError(f"{path} holds no text; expected calibration text like the model's pre-training data.")
    return texts


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
    ``max_tokens`` whole documents are drawn in an order that ``seed`` fixes. Batches are sorted by length, so that
    little is padded.

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
        pieces.extend(ids[start : start + sequence_length] for start in range(0, len(ids), sequence_length))
        total += len(ids)
    if not total:
        raise ValueError(f"The {len(texts)} calibration documents have no token; expected text.")
    pieces.sort(key=len)
    return [_pad(pieces[i : i + batch_size], tokenizer.pad_token_id or 0) for i in range(0, len(pieces), batch_size)]


def _pad(pieces: Iterable[list[int]], fill: int) -> dict[str, Tensor]:
    pieces = list(pieces)
    length = max(map(len, pieces))
    ids = torch.tensor([piece + [fill] * (length - len(piece)) for piece in pieces])
    mask = torch.tensor([[1] * len(piece) + [0] * (length - len(piece)) for piece in pieces])
    return {"input_ids": ids, "attention_mask": mask}


def _json_text(path: Path, number: int, line: str, field: str | None) -> str:
    try:
        entry = json.loads(line)
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); expected one object per line.") from None
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

"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields
from enum import Enum
from inspect import Parameter, Signature
from typing import Annotated, Any, get_type_hints

import typer

from ..config import LoraNullConfig


class Method(str, Enum):
    """How the null spaces are computed; see :func:`lora_null.null_space`."""

    auto = "auto"
    exact = "exact"
    filtered = "filtered"


def help_of(owner: type, name: str) -> str:
    """Return the help text of the field ``name`` of a dataclass."""
    return next(field.metadata["help"] for field in fields(owner) if field.name == name)


def flags_of(owner: type) -> Callable[[Callable], Callable]:
    """Give a command that takes ``**settings`` one flag for each field of the dataclass ``owner``."""
    types: dict[str, Any] = get_type_hints(owner)
    flags = [
        Parameter(
            field.name,
            Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[types[field.name], typer.Option(f"--{name}", help=field.metadata["help"])]
            if len(name := field.name.replace("_", "-")) == 1
            else Annotated[types[field.name], typer.Option(help=field.metadata["help"])],
        )
        for field in fields(owner)
    ]

    def decorate(command: Callable) -> Any:
        vars(command)["__signature__"] = Signature(flags)
        return command

    return decorate


Model = Annotated[str, typer.Argument(help="Folder or Hugging Face id of the base model.", show_default=False)]
Rank = Annotated[int, typer.Option("--r", help=help_of(LoraNullConfig, "r"))]
Targets = Annotated[str, typer.Option(help="all-linear, a regular expression, or suffixes with commas.")]
Dtype = Annotated[str, typer.Option(help="float32, bfloat16, float16; auto: the checkpoint's.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Overwrite = Annotated[
    bool, typer.Option("--overwrite", help="Replace an output of this command; other files are refused.")
]
Progress = Annotated[bool, typer.Option("--progress/--no-progress", help="Show progress bars.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]


def parse_targets(target_modules: str, what: str = "target_modules") -> str | tuple[str, ...]:
    """Read ``q_proj,v_proj`` as two suffixes; a single word without a dot or bracket is one suffix too."""
    if target_modules == "all-linear" or any(sign in target_modules for sign in r"\*+?()[]|^$"):
        try:
            re.compile(target_modules)
        except re.error as error:
            raise ValueError(
                f"{what} is {target_modules!r}, which is no regular expression ({error}); expected all-linear, "
                "a regular expression over whole names, or suffixes with commas."
            ) from None
        return target_modules
    return parse_names(target_modules) or ()


def parse_names(text: str | None) -> tuple[str, ...] | None:
    """Read words with commas between them."""
    return None if text is None else tuple(name.strip() for name in text.split(",") if name.strip())


def parse_numbers(text: str | None, what: str) -> tuple[int, ...] | None:
    """Read whole numbers with commas between them."""
    try:
        return None if text is None else tuple(int(part) for part in text.split(",") if part.strip())
    except ValueError:
        raise ValueError(f"{what} is {text!r}; expected whole numbers with commas, such as 0,1,2.") from None


def parse_pattern(pairs: Sequence[str] | None, kind: type, what: str) -> dict[str, Any] | None:
    """Read ``["q_proj=4", ...]``; the last ``=`` of each divides it."""
    pattern = {}
    for pair in pairs or ():
        key, sign, number = pair.rpartition("=")
        try:
            pattern[key] = kind(number)
        except ValueError:
            sign = ""
        if not sign or not key:
            raise ValueError(f"{what} is {pair!r}; expected NAME=NUMBER, such as q_proj=16.")
    return pattern or None

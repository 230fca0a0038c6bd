"""Arguments and options that several commands share."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import fields, is_dataclass
from enum import Enum
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from ..config import LoraNullConfig
from .run_file import RunFile


class Method(str, Enum):
    """How the null spaces are computed; see :func:`lora_null.null_space`."""

    auto = "auto"
    exact = "exact"
    filtered = "filtered"


def help_of(owner: type, name: str) -> str:
    """Return the help text of the field ``name`` of a dataclass."""
    return next(field.metadata["help"] for field in fields(owner) if field.name == name)


def with_flags(command: Callable) -> Callable:
    """Give a command ``--config``, and in place of each parameter that is a dataclass one flag for each field of it."""
    hints = get_type_hints(command, include_extras=True)
    owners: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    parameters = [Parameter("config", Parameter.KEYWORD_ONLY, default=None, annotation=RunFile)]
    for name, parameter in signature(command).parameters.items():
        own = _flags(owners[name]) if name in owners else [parameter.replace(annotation=hints[name])]
        parameters += [flag.replace(kind=Parameter.KEYWORD_ONLY) for flag in own]

    # the file has been read by then
    def run(*, config: Path | None = None, **values: Any) -> Any:
        for name, owner in owners.items():
            values[name] = owner(**{field.name: values.pop(field.name) for field in fields(owner)})
        return command(**values)

    run.__name__, run.__doc__ = command.__name__, command.__doc__
    vars(run)["__signature__"] = Signature(parameters)
    return run


def _flags(owner: type) -> list[Parameter]:
    types = get_type_hints(owner)
    flags = []
    for field in fields(owner):
        name = f"--{field.name.replace('_', '-')}"
        # one letter would become a short flag, and what is off needs no flag that says so
        names = [name] if len(field.name) == 1 or field.default is False else []
        option = typer.Option(*names, help=field.metadata["help"])
        flag = Parameter(field.name, Parameter.KEYWORD_ONLY, default=field.default)
        flags.append(flag.replace(annotation=Annotated[types[field.name], option]))
    return flags


Model = Annotated[str, typer.Argument(help="Folder or hub id of the base model.", show_default=False)]
Rank = Annotated[int, typer.Option("--r", help=help_of(LoraNullConfig, "r"))]
Data = Annotated[
    list[Path] | None, typer.Option(help="Text, .jsonl, .parquet or data set; repeatable.", show_default=False)
]
Weights = Annotated[str | None, typer.Option(help="How often each text counts, with commas.")]
Targets = Annotated[str, typer.Option(help="Suffixes or a regex.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, ...")]
Seed = Annotated[int, typer.Option(help="Seed of every random choice.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output, no other files.")]
VerifyBase = Annotated[
    bool,
    typer.Option("--verify-base/--no-verify-base", show_default=False, help="Refuse what was made on other weights."),
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

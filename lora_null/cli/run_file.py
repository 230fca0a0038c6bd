"""Options from a YAML file, ``--config run.yaml``; a flag wins over the file."""

from __future__ import annotations

from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Annotated, Any

import typer

from ..system.files import require_regular

# A file of options has some hundred bytes.
_LARGEST = 2**20


def read_options(context: typer.Context, path: Path | None) -> None:
    """Take what the file says as defaults of the command's parameters.

    Raises:
        FileNotFoundError: No such file.
        ValueError: It is no mapping in YAML, or names what the command does not have.
    """
    if path is None or context.resilient_parsing:
        return
    known = {str(parameter.name): parameter for parameter in context.command.params}
    for name in ("config", "help"):
        known.pop(name, None)
    defaults: dict[str, Any] = {}
    for key, value in _mapping(path).items():
        name = str(key).removeprefix("--").replace("-", "_")
        if name not in known:
            near = get_close_matches(name, known, n=1)
            hint = f"Did you mean {near[0]}?" if near else f"Expected {', '.join(sorted(known))}."
            raise ValueError(f"{path} names {key!r}, which {context.info_name} does not have. {hint}")
        if value is not None:
            several = getattr(known[name], "multiple", False) or known[name].nargs != 1
            defaults[name] = _as_written(f"{path}: {key}", value, several)
    context.default_map = {**(context.default_map or {}), **defaults}


def said_in_file(error: Any) -> str:
    """Return what the file says of the parameter that a parser's error is about, if it was said there."""
    context, parameter = error.ctx, getattr(error, "param", None)
    if parameter is None or context is None:
        return ""
    source = context.get_parameter_source(parameter.name)
    if source is None or source.name != "DEFAULT_MAP":
        return ""
    return f", where the file of --config says {parameter.name}: {context.default_map[parameter.name]}"


RunFile = Annotated[
    Path | None,
    typer.Option("--config", callback=read_options, is_eager=True, help="YAML file of options; flags win."),
]


def _mapping(path: Path) -> Mapping[Any, Any]:
    import yaml

    require_regular(path, "a YAML file with options", _LARGEST)
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path} cannot be read as YAML ({reason}); expected lines such as r: 32.") from None
    if not isinstance(values, Mapping):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise ValueError(f"{path} holds {found}; expected options, in lines such as r: 32.")
    return values


def _as_written(where: str, value: Any, several: bool) -> Any:
    """Return a value as the command line would give it: words, with commas or one after another."""
    if isinstance(value, bool):
        return value
    if isinstance(value, Mapping):
        value = [f"{key}={_word(where, each)}" for key, each in value.items()]
    words = [_word(where, each) for each in value] if isinstance(value, list) else [_word(where, value)]
    return words if several else ",".join(words)


def _word(where: str, value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        raise ValueError(f"{where} holds {value!r}; expected a number or a word.")
    return str(value)

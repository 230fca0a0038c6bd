"""Pages of the reference from docstrings: a hook of mkdocs, and what the tests read.

A line ``::: lora_null.NAME`` in a page becomes the signature and the docstring of that name.
``python docs/pages.py > tests/docs/api.txt`` writes the signatures of all public names.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import Any

DIRECTIVE = re.compile(r"^::: (?P<path>[\w.]+)$", re.MULTILINE)
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises):$", re.MULTILINE)
ITEM = re.compile(r"^ {4}(?P<name>\*{0,2}[\w., ]+?): (?P<text>.*(?:\n(?: {8}.*|\s*$))*)", re.MULTILINE)
ROLE = re.compile(r":(?:func|class|meth|mod|attr|data):`~?(?P<path>[\w.]+)`")
# Whose ``__all__`` is public.
MODULES = (
    "lora_null",
    "lora_null.ops",
    "lora_null.peft",
    "lora_null.bayes",
    "lora_null.adapters",
    "lora_null.evaluation",
    "lora_null.integrations",
)


def public() -> dict[str, Any]:
    """Return ``path -> object`` of every public name once, under the shortest path that leads to it."""
    found: dict[str, Any] = {}
    for module in MODULES:
        loaded = importlib.import_module(module)
        for name in loaded.__all__:
            value = getattr(loaded, name)
            if name != "__version__" and not inspect.ismodule(value) and not any(value is v for v in found.values()):
                found[f"{module}.{name}"] = value
    return found


def resolve(path: str) -> Any:
    """Return the object at a dotted path.

    Raises:
        AttributeError, ImportError: There is none.
    """
    module, _, name = path.rpartition(".")
    return getattr(importlib.import_module(module), name)


def signature(path: str, value: Any) -> str:
    """Return ``name(arguments) -> result``, annotations as they are written; the name alone where there is none."""
    try:
        text = str(inspect.signature(value))
    except ValueError:
        return path
    text = re.sub(r"(?<=[:>] )'([^']*)'|(?<=[:>] )\"([^\"]*)\"", lambda m: m[1] or m[2], text)
    text = text.removesuffix(" -> None") if inspect.isclass(value) else text
    return f"{path}{text}"


def rendered(path: str) -> str:
    """Return the Markdown of one name: heading, signature, docstring, and a class's own public members."""
    value = resolve(path)
    parts = [
        f"### {path} {{#{path}}}",
        f"```text\n{signature(path, value)}\n```",
        markdown(inspect.getdoc(value) or ""),
    ]
    for name, member in members(value) if inspect.isclass(value) else []:
        title = name if isinstance(member, property) else signature(name, member)
        parts.append(f"**`{title}`**\n\n{markdown(inspect.getdoc(member) or '')}")
    return "\n\n".join(part for part in parts if part)


def markdown(doc: str) -> str:
    """Turn a docstring with Google's sections into Markdown."""
    known = public()

    def link(found: re.Match) -> str:
        path = found["path"]
        path = path if path.startswith("lora_null.") else f"lora_null.{path}"
        return f"[`{path}`][{path}]" if path in known else f"`{path}`"

    head, *rest = SECTION.split(ROLE.sub(link, doc).replace("``", "`"))
    parts = [head.strip()]
    for title, body in zip(rest[::2], rest[1::2], strict=True):
        items = list(ITEM.finditer(body)) if title not in ("Returns", "Yields") else []
        text = "\n".join(f"- `{i['name']}`: {' '.join(i['text'].split())}" for i in items)
        parts += [f"**{title}**", text or inspect.cleandoc(body)]
    return "\n\n".join(part for part in parts if part)


def interface() -> str:
    """Return the signatures of every public name and of the public members of classes, one a line."""
    lines = []
    for path, value in sorted(public().items()):
        lines.append(signature(path, value))
        if inspect.isclass(value):
            for name, inner in members(value):
                lines.append(f"{path}.{name if isinstance(inner, property) else signature(name, inner)}")
    return "\n".join(lines) + "\n"


def members(value: type) -> list[tuple[str, Any]]:
    """Return a class's own public methods and properties, by name."""
    found = [(name, inspect.getattr_static(value, name)) for name in vars(value) if not name.startswith("_")]
    return [
        (name, member if isinstance(member, property) else getattr(value, name))
        for name, member in found
        if isinstance(member, property) or callable(getattr(value, name))
    ]


def where() -> dict[str, str]:
    """Return ``path -> page`` for every name that a page of the reference shows."""
    folder = Path(__file__).parent
    return {
        found["path"]: page.relative_to(folder).as_posix()
        for page in sorted((folder / "api").glob("*.md"))
        for found in DIRECTIVE.finditer(page.read_text(encoding="utf-8"))
    }


def on_page_markdown(text: str, page: Any, **kwargs: Any) -> str:
    """Fill the directives of a page, as a hook of mkdocs, and let names link to where they are explained."""
    if not DIRECTIVE.search(text):
        return text
    text = DIRECTIVE.sub(lambda found: rendered(found["path"]), text)
    own, pages = page.file.src_uri, where()
    targets = {path: ("" if file == own else file.rpartition("/")[2]) + f"#{path}" for path, file in pages.items()}
    return re.sub(r"\]\[(lora_null[\w.]+)\]", lambda m: f"]({targets[m[1]]})" if m[1] in targets else "]", text)


if __name__ == "__main__":
    print(interface(), end="")

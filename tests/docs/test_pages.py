"""The pages hold together: the navigation, links, every public name explained, and every block of code executed."""

import importlib.util
import inspect
import re
from pathlib import Path

import pytest
import torch
import yaml

from lora_null import LoraNullConfig
from lora_null.cli import starting

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.rglob("*.md"))
BLOCK = re.compile(r"^```(?: \{ \.)?(\w+)(?: \})?\n(.*?)^```$", re.MULTILINE | re.DOTALL)
SNIPPET = re.compile(r'^--8<-- "(.+)"$', re.MULTILINE)


@pytest.fixture(scope="module")
def pages():
    """Return the module that makes the reference."""
    specification = importlib.util.spec_from_file_location("pages", DOCS / "pages.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def name_of(page):
    return page.relative_to(DOCS).as_posix()


def entries(tree):
    for item in tree:
        (value,) = item.values()
        yield from entries(value) if isinstance(value, list) else [value]


def test_every_page_is_in_the_navigation_once():
    listed = list(entries(yaml.safe_load((ROOT / "mkdocs.yml").read_text(encoding="utf-8"))["nav"]))
    assert sorted(listed) == sorted(map(name_of, PAGES))


def anchors(text):
    """Return the anchors of a page's headings, as mkdocs makes them."""
    found = set()
    for line in re.findall(r"^#+ (.*)$", BLOCK.sub("", text), re.MULTILINE):
        plain = re.sub(r"[^\w\s-]", "", re.sub(r"[`*]|\{#.*\}", "", line)).strip().lower()
        found.add(re.sub(r"[\s-]+", "-", plain))
    return found | set(re.findall(r"^::: ([\w.]+)$", text, re.MULTILINE))


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md", ROOT / "CONTRIBUTING.md"], ids=lambda p: p.name)
def test_links_and_pictures_lead_somewhere(page):
    text = BLOCK.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith(("http://", "https://")):
            continue
        file, _, anchor = target.partition("#")
        path = (page.parent / file).resolve() if file else page
        assert path.exists(), f"{target} in {page.name} leads nowhere"
        if anchor:
            assert anchor in anchors(path.read_text(encoding="utf-8")), f"{path.name} has no heading for {target}"
        if page.is_relative_to(DOCS):
            assert path.is_relative_to(DOCS), f"{target} in {page.name} leaves the pages"
    for snippet in SNIPPET.findall(page.read_text(encoding="utf-8")):
        assert (ROOT / snippet).is_file(), snippet


def test_every_public_name_has_a_page(pages):
    public = set(pages.public())
    assert len(public) > 25
    assert public - set(pages.where()) == set(), "add a line '::: NAME' to a page in docs/api"
    for path in pages.where():
        assert pages.resolve(path).__doc__, path


def test_a_name_without_a_page_is_found(pages, monkeypatch):
    import lora_null.ops

    monkeypatch.setattr(lora_null.ops, "__all__", [*lora_null.ops.__all__, "forgotten"])
    monkeypatch.setattr(lora_null.ops, "forgotten", lambda: None, raising=False)
    assert set(pages.public()) - set(pages.where()) == {"lora_null.ops.forgotten"}


def test_every_public_name_is_used_in_a_block_that_runs(pages):
    code = "\n".join(body for page in PAGES for kind, body in blocks(page) if kind == "python")
    unused = [path for path in pages.public() if not re.search(rf"\b{path.rpartition('.')[2]}\b", code)]
    assert unused == []


def test_docstrings_become_markdown(pages):
    text = pages.rendered("lora_null.null_space")
    assert text.startswith("### lora_null.null_space {#lora_null.null_space}\n\n```text\nlora_null.null_space(C: ")
    assert "- `r`: Number of vectors" in text and "**Raises**" in text and "``" not in text.replace("```", "")
    assert "Args:" not in text and ":class:" not in text
    assert "[`lora_null.NullSpace`][lora_null.NullSpace]" in text
    assert "**`save(" in pages.rendered("lora_null.Covariances")


def blocks(page):
    """Return ``(language, code)`` of a page, without those that only show a file."""
    return [(kind, body) for kind, body in BLOCK.findall(page.read_text("utf-8")) if not SNIPPET.match(body)]


WITH_CODE = [page for page in PAGES if any(kind == "python" for kind, _ in blocks(page))]


@pytest.mark.parametrize("page", WITH_CODE, ids=name_of)
def test_the_code_of_a_page_runs(page, llama, tokenizer, monkeypatch, tmp_path):
    """In the order of the page, on a small random model; what a page does not define itself is given here."""
    import transformers

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", lambda *args, **options: llama())
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *args, **options: tokenizer)
    monkeypatch.chdir(tmp_path)
    generator = torch.Generator().manual_seed(0)
    names = {
        "__name__": "page",
        "torch": torch,
        "AutoModelForCausalLM": transformers.AutoModelForCausalLM,
        "name": "model",
        "model": llama(),
        "tokenizer": tokenizer,
        "texts": [" ".join(f"w{int(i)}" for i in torch.randint(96, (40,), generator=generator)) for _ in range(8)],
    }
    for kind, body in blocks(page):
        if kind == "python":
            exec(compile(body, name_of(page), "exec"), names)


def test_every_block_says_what_it_is():
    for page in PAGES:
        assert {kind for kind, _ in BLOCK.findall(page.read_text("utf-8"))} <= {"python", "yaml", "text"}, page.name
        assert page.read_text("utf-8").count("```") == 2 * len(BLOCK.findall(page.read_text("utf-8"))), page.name


def test_the_yaml_of_the_pages_can_be_read():
    keys = {page.name: yaml.safe_load(body) for page in PAGES for kind, body in blocks(page) if kind == "yaml"}
    assert keys["axolotl.md"]["plugins"] == ["lora_null.integrations.axolotl.LoraNullPlugin"]
    assert keys["llama_factory.md"]["finetuning_type"] == "lora"
    # what init is told there is all that it needs
    assert set(keys["command_line.md"]) <= set(inspect.signature(starting.init).parameters)
    assert LoraNullConfig(**{key: keys["command_line.md"][key] for key in ("r", "train", "rank_pattern")}).r == 32

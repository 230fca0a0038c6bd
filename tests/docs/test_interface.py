"""What users rely on does not change unnoticed: signatures on record, a changelog, a tree that can be released."""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


def load(path):
    specification = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages():
    return load(ROOT / "docs" / "pages.py")


@pytest.fixture
def release():
    return load(ROOT / "tests" / "support" / "release.py")


def test_the_signatures_are_those_on_record(pages):
    recorded = (ROOT / "tests" / "docs" / "api.txt").read_text(encoding="utf-8")
    assert pages.interface() == recorded, (
        "the public interface has changed. If that is meant, say so in CHANGELOG.md under Unreleased and run: "
        "python docs/pages.py > tests/docs/api.txt"
    )


def test_a_changed_signature_is_seen(pages, monkeypatch):
    import lora_null

    def null_space(C, r, *, other=1):
        """Solve."""

    before = pages.interface()
    lora_null.null_space  # noqa: B018  bound now, so that undoing the patch restores it
    monkeypatch.setattr(lora_null, "null_space", null_space)
    changed = set(pages.interface().splitlines()) - set(before.splitlines())
    assert changed == {"lora_null.null_space(C, r, *, other=1)"}


def test_the_changelog_speaks_of_every_name():
    import lora_null

    text = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert re.search(r"^## (Unreleased|\d+\.\d+\.\d+)$", text, re.MULTILINE)
    silent = [name for name in lora_null.__all__ if name != "__version__" and not re.search(rf"\b{name}\b", text)]
    assert silent == []


def test_the_tree_is_ready_for_a_release(release, monkeypatch):
    assert release.unready() == []
    real = release.text
    for name, old, new, complaint in (
        ("CHANGELOG.md", "## Unreleased\n", "## 0.0.1\n", "does not begin with a section"),
        ("CHANGELOG.md", "\n- ", "\n", "has no line"),
        ("CITATION.cff", f"version: {release.version()}", "version: 9.9.9", "does not name version"),
    ):
        monkeypatch.setattr(
            release, "text", lambda path, n=name, o=old, w=new: real(path).replace(o, w) if path == n else real(path)
        )
        assert any(complaint in sentence for sentence in release.unready()), complaint


def test_a_changed_signature_wants_a_line_in_the_changelog(release, tmp_path, monkeypatch):
    monkeypatch.setattr(release, "RELEASED", tmp_path / "released.txt")
    before = release.text("tests/docs/api.txt")
    other = before.replace("lora_null.null_space(C: Tensor, r: int", "lora_null.null_space(C: Tensor", 1)
    assert other != before
    release.RELEASED.write_text(other + "lora_null.bayes.gone_since()\n")
    # the section speaks of null_space
    assert [line.split(": ")[1] for line in release.unready()] == ["lora_null.bayes.gone_since."]
    assert release.unmentioned("- Some line.") == ["lora_null.bayes.gone_since", "lora_null.null_space"]


def test_a_path_without_compilers_has_everything_else(release, tmp_path, monkeypatch):
    for folder, names in (("a", ["g++", "ls", "gcc-12", "clang++"]), ("b", ["ls", "python", "cc1"])):
        (tmp_path / folder).mkdir()
        for name in names:
            (tmp_path / folder / name).touch()
    monkeypatch.setenv("PATH", f"{tmp_path / 'a'}:{tmp_path / 'b'}:{tmp_path / 'missing'}")
    (tmp_path / "links").mkdir()
    left = Path(release.without_compilers(tmp_path / "links"))
    assert sorted(p.name for p in left.iterdir()) == ["cc1", "ls", "python"]
    assert (left / "ls").resolve() == (tmp_path / "a" / "ls")


def test_an_interpreter_that_is_not_here_is_left_out(release, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(release, "build", lambda into: (tmp_path / "x.tar.gz", tmp_path / "x.whl"))
    monkeypatch.setattr(release, "RELEASED", tmp_path / "released.txt")
    tried = []
    monkeypatch.setattr(release, "try_out", lambda sdist, wheel, python, torch: tried.append((python, torch)))
    monkeypatch.setattr(sys, "argv", ["release", "--python", "python9.99", "--python", sys.executable, "--torch", "1"])
    release.main()
    assert tried == [(sys.executable, "1")] and not release.RELEASED.exists()
    assert "python9.99: not on this machine" in capsys.readouterr().out
    # what is released is on record for the next changelog
    real, title = release.text, f"## {release.version()}"
    monkeypatch.setattr(release, "text", lambda name: real(name).replace("## Unreleased", title))
    release.main()
    assert release.RELEASED.read_text() == real("tests/docs/api.txt")

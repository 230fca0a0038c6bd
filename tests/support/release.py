"""Build the package and try it where nothing else of the project is.

``python tests/support/release.py`` builds sdist and wheel into ``dist`` and installs each into an empty environment:
the wheel without and with a compiler at hand, the sdist compiled ahead. ``--python`` and ``--torch``, repeatable, try
other versions instead; an interpreter that is not on this machine is named and left out.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The signatures on record as they were in the last release; a release writes them anew, and the first one the file.
RELEASED = ROOT / "tests" / "docs" / "released.txt"
COMPILERS = ("c++", "g++", "gcc", "cc", "clang", "clang++")


def text(name: str) -> str:
    """Return a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def version() -> str:
    """Return the version of the package."""
    found = re.search(r'__version__ = "([^"]+)"', text("lora_null/system/version.py"))
    assert found, "lora_null/system/version.py has no __version__"
    return found[1]


def unmentioned(section: str) -> list[str]:
    """Return the names whose signatures are others than in the last release, and which the section does not name."""
    before = RELEASED.read_text(encoding="utf-8") if RELEASED.exists() else text("tests/docs/api.txt")
    changed = set(text("tests/docs/api.txt").splitlines()) ^ set(before.splitlines())
    paths = sorted({line.partition("(")[0] for line in changed})
    return [path for path in paths if not re.search(rf"\b{path.rpartition('.')[2]}\b", section)]


def unready() -> list[str]:
    """Return what keeps this tree from being released, as sentences."""
    wrong = []
    if f"\nversion: {version()}\n" not in text("CITATION.cff"):
        wrong.append(f"CITATION.cff does not name version {version()}.")
    section = re.search(r"^## (Unreleased|\d\S*)\n(.*?)(?=^## |\Z)", text("CHANGELOG.md"), re.MULTILINE | re.DOTALL)
    if section is None or section[1] not in ("Unreleased", version()):
        wrong.append(f"CHANGELOG.md does not begin with a section 'Unreleased' or '{version()}'.")
    elif not re.search(r"^- ", section[2], re.MULTILINE):
        wrong.append(f"The section {section[1]} of CHANGELOG.md has no line.")
    elif names := unmentioned(section[2]):
        wrong.append(f"The section {section[1]} of CHANGELOG.md does not name what has changed: {', '.join(names)}.")
    return wrong


def run(*command: object, **options) -> None:
    """Run a command, shown first; its failure ends everything."""
    print("$", *command, flush=True)
    subprocess.run([str(word) for word in command], check=True, **options)


def build(into: Path) -> tuple[Path, Path]:
    """Build sdist and, from it, the wheel; return both."""
    shutil.rmtree(into, ignore_errors=True)
    run(sys.executable, "-m", "build", "-o", into, ROOT)
    (sdist,), (wheel,) = into.glob("*.tar.gz"), into.glob("*.whl")
    return sdist, wheel


def without_compilers(folder: Path) -> str:
    """Return a PATH on which every command is but the compilers."""
    for entry in os.environ["PATH"].split(os.pathsep):
        for command in Path(entry).glob("*") if Path(entry).is_dir() else []:
            link = folder / command.name
            if not re.fullmatch(rf"({'|'.join(map(re.escape, COMPILERS))})(-\d+)?", command.name) and not link.exists():
                link.symlink_to(command)
    return str(folder)


def environment(folder: Path, python: str, torch: str) -> Path:
    """Make an empty environment with one version of torch; return its interpreter."""
    run(python, "-m", "venv", folder)
    inside = folder / "bin" / "python"
    run(inside, "-m", "pip", "install", "-q", f"torch=={torch}", "setuptools>=77", "wheel", "ninja")
    return inside


def smoke(inside: Path, wanted: str, **variables: str) -> None:
    """Run the smoke test in an empty folder, with a cache of its own."""
    with tempfile.TemporaryDirectory() as empty:
        values = {**os.environ, "LORA_NULL_CACHE": f"{empty}/cache", "HF_HUB_OFFLINE": "1", **variables}
        values.pop("PYTHONPATH", None)
        run(inside, ROOT / "tests" / "support" / "smoke.py", wanted, cwd=empty, env=values)


def try_out(sdist: Path, wheel: Path, python: str, torch: str) -> None:
    """Install wheel and sdist, one after the other, in an empty environment, and run each.

    The wheel without a compiler first, then with one; the sdist compiled against the installed torch ahead of time, and
    then run without a compiler.
    """
    with tempfile.TemporaryDirectory() as folder:
        inside = environment(Path(folder) / "venv", python, torch)
        (Path(folder) / "bin").mkdir()
        bare = without_compilers(Path(folder) / "bin")
        run(inside, "-m", "pip", "install", "-q", wheel)
        smoke(inside, "plain", PATH=bare)
        smoke(inside, "compiled")
        run(inside, "-m", "pip", "uninstall", "-q", "-y", "lora_null")
        run(inside, "-m", "pip", "install", "-q", "--no-build-isolation", sdist)
        smoke(inside, "compiled", PATH=bare)


def main() -> None:
    """Build and try; see the module."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--python", action="append", help="interpreters to try them on")
    parser.add_argument("--torch", action="append", help="versions of torch to try them on")
    arguments = parser.parse_args()
    if wrong := unready():
        sys.exit("\n".join(wrong))
    pinned = re.findall(r"^torch==(\S+)", text("constraints.txt"), re.MULTILINE)
    sdist, wheel = build(ROOT / "dist")
    for python in arguments.python or [sys.executable]:
        # pyenv's shims are on the PATH for interpreters that they refuse to start.
        found = shutil.which(python)
        if found is None or subprocess.run([found, "--version"], capture_output=True).returncode:
            print(f"{python}: not on this machine, left out")
            continue
        for torch in arguments.torch or pinned:
            try_out(sdist, wheel, found, torch)
    if f"\n## {version()}\n" in text("CHANGELOG.md"):
        RELEASED.write_text(text("tests/docs/api.txt"), encoding="utf-8")
    print(f"lora_null {version()}: {sdist.name} and {wheel.name} are ready in dist")


if __name__ == "__main__":
    main()

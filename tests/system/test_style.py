"""Refused patterns are refused: each is planted and found; ``make test`` and the hook run the checks."""

import re
import shutil
import subprocess
import sys

import pytest
import style

# Nothing that a linter of lines could find in this file itself.
TICK, LINE = "`", "-" * 9
DOCUMENTED = '''"""Module."""


def scaled(x, factor):
    """Scale.

    Args:
        x: ``(T, d)``.
        {name}: Of ``x``;
            note: continued.

    Returns:
        nothing: of the kind.
    """
'''


def test_the_tree_is_clean():
    assert style.violations() == []


@pytest.mark.parametrize(
    ("file", "text", "name"),
    [
        ("lora_null/ops/linear.py", f"# {LINE} part\n", "banner"),
        ("csrc/linear.cpp", f"// {'=' * 20}\n", "banner"),
        ("tests/test_it.py", f"    # {'#' * 8}\n", "banner"),
        ("kernels/gpu/lora_kernels.py", "tl.atomic_max(p, v)\n", "atomics"),
        ("kernels/gpu/syrk_kernels.py", "p = tl.make_block_ptr(x, (T, d))\n", "block pointer"),
        ("lora_null/cli/app.py", 'HOME = os.environ["HOME"]\n', "environment variable"),
        ("kernels/gpu/config.py", 'HOME = os.getenv("HOME")\n', "environment variable"),
        ("csrc/linear.cpp", '  auto* home = std::getenv("HOME");\n', "environment variable"),
        ("lora_null/evaluation/report.py", f'"""See {TICK}other{TICK}."""\n', "single backticks"),
        ("kernels/gpu/tune.py", f'class A:\n    """Text.\n\n    As {TICK}x{TICK}.\n    """\n', "single backticks"),
        ("lora_null/solver/exact.py", DOCUMENTED.format(name="scale"), "no such parameter: scale"),
        (
            "lora_null/config.py",
            'class A:\n    """A.\n\n    Attributes:\n        x, y: Two.\n    """\n\n    x: int\n',
            "y",
        ),
    ],
)
def test_a_planted_violation_is_found(tmp_path, file, text, name):
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(text)
    (found,) = style.violations(tmp_path)
    assert found.startswith(f"{file}:") and name in found


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("kernels/gpu/syrk_kernels.py", "tl.atomic_add(p, v)\n"),
        ("lora_null/system/environment.py", 'HOME = os.environ["HOME"]\n'),
        ("tests/test_it.py", 'HOME = os.environ["HOME"]\n'),
        ("lora_null/config.py", "# -1 means all; x -- y\n# a heading\n"),
        ("lora_null/config.py", f'"""See :func:{TICK}other{TICK} and {TICK * 2}this{TICK * 2}."""\n'),
        ("lora_null/config.py", f"# {TICK}code{TICK} in a comment\n"),
        ("lora_null/config.py", DOCUMENTED.format(name="factor")),
    ],
)
def test_what_is_allowed_passes(tmp_path, file, text):
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(text)
    assert style.violations(tmp_path) == []


def test_the_command_fails_on_a_violation(tmp_path):
    support = tmp_path / "tests" / "support"
    support.mkdir(parents=True)
    shutil.copy(style.__file__, support)
    command = [sys.executable, str(support / "style.py")]
    assert subprocess.run(command, capture_output=True, timeout=60).returncode == 0
    (tmp_path / "lora_null").mkdir()
    (tmp_path / "lora_null" / "bad.py").write_text(f"# {LINE}\n")
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 1 and "lora_null/bad.py:1: banner" in done.stdout


def test_make_test_checks_style_first_and_hands_its_arguments_to_pytest():
    command = ["make", "-n", "test", "ARGS=-k nothing", "VENV=.venv"]
    done = subprocess.run(command, cwd=style.ROOT, capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"needs make: {done.stderr}")
    lines = [line for line in done.stdout.splitlines() if ".venv/bin/" in line]
    checks = ["ruff check", "ruff format --check", "clang-format --dry-run -Werror", "python tests/support/style.py"]
    positions = [
        next(number for number, line in enumerate(lines) if f".venv/bin/{check}" in line)
        for check in (*checks, "mypy", "python -m pytest")
    ]
    assert positions == sorted(positions) and lines[-1].endswith("-k nothing")
    assert "entry: make style" in (style.ROOT / ".pre-commit-config.yaml").read_text()


def test_the_notes_name_every_test_file_and_no_other():
    folder = style.ROOT / "tests"
    row = re.compile(r"`(?:(\w+)/)?(test_\w+\.py)`")
    named = set()
    for line in (folder / "README.md").read_text(encoding="utf-8").splitlines():
        package = ""
        for match in row.finditer(line):
            package = match.group(1) or package
            named.add(f"{package}/{match.group(2)}")
    assert named == {path.relative_to(folder).as_posix() for path in folder.glob("*/test_*.py")}

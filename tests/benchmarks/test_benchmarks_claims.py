"""Claims: what they quote stands in the library, and the command runs them."""

import re
import subprocess
import sys

import pytest
from benchmark_suite import ROOT, suite

NAMES = suite("claims.__main__").NAMES


def words(text):
    """One line, without the marks of comments at line starts."""
    return " ".join(re.sub(r"^\s*(#|//)", " ", text, flags=re.MULTILINE).split())


@pytest.mark.parametrize("name", NAMES)
def test_the_quoted_words_stand_in_the_source(name):
    claim = suite(f"claims.{name}")
    assert claim.QUOTE in words((ROOT / claim.SOURCE).read_text(encoding="utf-8"))
    assert any(character.isdigit() for character in claim.QUOTE) or "times" in claim.QUOTE
    assert isinstance(claim.TIMED, bool) and claim.__doc__


def test_a_claim_that_needs_no_quiet_machine_holds():
    for claimed, measured in suite("claims.delta_rounding").measure().values():
        assert claimed / 1.5 < measured < claimed * 1.5


def test_the_command_prints_claim_and_measurement_and_refuses_unknown_names():
    command = [sys.executable, "-m", "benchmarks.claims", "delta_rounding"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert re.search(r"usual form +claimed +1\.66 +measured +1\.\d", done.stdout)
    done = subprocess.run([*command, "nothing"], cwd=ROOT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 2 and "there is no claim nothing; known are: " in done.stderr

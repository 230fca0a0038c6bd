"""Results of the benchmarks as data: appended one by one, never lost."""

import os
import subprocess
import sys
import textwrap

import pytest
from benchmark_suite import ROOT, suite

records = suite("records")

# For a child process: the module alone, without the torch that its package imports.
LOAD = f"""\
import importlib.util
spec = importlib.util.spec_from_file_location("records", {str(ROOT / "benchmarks" / "records.py")!r})
records = importlib.util.module_from_spec(spec)
spec.loader.exec_module(records)
"""


def record(number, **fields):
    return {"question": "q", "provider": f"p{number}", "case": {"n": number}, **fields}


def test_records_come_back_in_order(tmp_path):
    path = tmp_path / "new" / "results.jsonl"
    for number in range(5):
        records.append(path, record(number))
    assert records.read(path) == ([record(number) for number in range(5)], [])


def test_a_damaged_file_loses_no_other_record(tmp_path):
    path = tmp_path / "results.jsonl"
    records.append(path, record(0))
    with path.open("ab") as file:
        file.write(b'{"question": "q", "prov\n\xff\xfe\x00 not text\n["a list"]\n{"half": "a rec')
    records.append(path, record(1))
    found, damaged = records.read(path)
    assert found == [record(0), record(1)]
    assert damaged == [2, 3, 4, 5]
    # Nothing that was in the file is gone.
    assert b'{"half": "a rec\n' in path.read_bytes()


def test_no_space_left_keeps_every_earlier_record(tmp_path):
    """A file size limit stops the write in the middle of a line, as a full disk does."""
    path = tmp_path / "results.jsonl"
    code = f"""
        import resource, signal
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
        written = 0
        try:
            while True:
                records.append({str(path)!r}, {{"question": "q", "provider": "p" * 300, "case": written}})
                written += 1
        except records.ResultsError as error:
            print(written, error)
    """
    done = subprocess.run(
        [sys.executable, "-c", LOAD + textwrap.dedent(code)], capture_output=True, text=True, check=True
    )
    written, message = done.stdout.split(" ", 1)
    found, damaged = records.read(path)
    assert [r["case"] for r in found] == list(range(int(written))) and int(written) > 5
    assert not damaged and path.read_bytes().endswith(b"\n")
    assert "earlier records are untouched" in message and "--output" in message


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")
def test_a_killed_run_keeps_what_it_has(tmp_path):
    path = tmp_path / "results.jsonl"
    code = f"""
        number = 0
        while True:
            records.append({str(path)!r}, {{"question": "q", "provider": "p", "case": number}})
            print(number, flush=True)
            number += 1
    """
    child = subprocess.Popen([sys.executable, "-c", LOAD + textwrap.dedent(code)], stdout=subprocess.PIPE, text=True)
    last = -1
    for _ in range(20):
        last = int(child.stdout.readline())
    child.kill()
    child.wait()
    child.stdout.close()
    records.append(path, record(99))
    found, _ = records.read(path)
    assert [r["case"] for r in found][: last + 1] == list(range(last + 1))
    assert found[-1] == record(99)


def test_the_newest_repetition_counts():
    old = record(1, median_ms=2.0, environment={"device": "a"})
    new = record(1, median_ms=1.0, environment={"device": "a"})
    elsewhere = record(1, median_ms=9.0, environment={"device": "b"})
    assert records.latest([old, elsewhere, new]) == [new, elsewhere]

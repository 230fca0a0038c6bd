"""The compiled part: found in a checkout and in a wheel, built once, and missing without harm."""

import logging
import os
import shutil
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest
import torch

import lora_null
from lora_null.system import extension, log
from lora_null.system.environment import cache_folder

ROOT = Path(__file__).parents[2]
COMPILER = shutil.which(os.environ.get("CXX", "c++"))


@pytest.fixture
def forget(monkeypatch):
    """Make load() decide again, and warnings come again."""
    monkeypatch.setattr(extension, "_loaded", {})
    monkeypatch.setattr(log, "_given", set())


def run(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **environment}, capture_output=True, text=True, timeout=300
    )


def test_sources_are_found_in_this_checkout():
    folder = extension.source_folder()
    assert folder is not None and {"bindings.cpp", "null_space.cpp", "null_space.h"} <= {
        p.name for p in folder.iterdir()
    }


def test_sources_are_found_in_an_installed_package(tmp_path):
    # The layout of a wheel: csrc inside the package, nothing beside it.
    shutil.copytree(ROOT / "lora_null", tmp_path / "lora_null", ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    shutil.copytree(ROOT / "csrc", tmp_path / "lora_null" / "csrc")
    code = (
        f"import sys; sys.path.insert(0, {str(tmp_path)!r})\n"
        "from lora_null.system import extension; print(extension.source_folder())"
    )
    assert run(code).stdout.strip() == str((tmp_path / "lora_null" / "csrc").resolve())


def test_switched_off_by_the_environment(forget, monkeypatch, caplog):
    monkeypatch.setenv("LORA_NULL_NO_EXTENSION", "1")
    monkeypatch.setattr(extension, "build", lambda: pytest.fail("built although switched off"))
    with caplog.at_level(logging.WARNING, "lora_null"):
        assert extension.load() is None
    assert not caplog.records


def test_failing_compiler_gives_one_warning_and_the_same_result(forget, monkeypatch, caplog):
    def fail():
        raise RuntimeError("Error building extension\n[1/4] c++ ...\nnull_space.cpp:3: error: no such thing\nmore")

    monkeypatch.setitem(sys.modules, "lora_null._C", None)
    monkeypatch.setattr(extension, "build", fail)
    C = torch.diag(torch.linspace(0.1, 1, 60, dtype=torch.float64))
    with caplog.at_level(logging.WARNING, "lora_null"):
        spaces = [lora_null.null_space(C, 4, method="filtered") for _ in range(2)]
    assert len(caplog.records) == 1 and "error: no such thing" in caplog.text
    assert spaces[0].energy == pytest.approx(float(C.diagonal()[:4].sum()), rel=1e-3)


def test_a_missing_compiler_is_named_before_torch_looks_for_it(forget, monkeypatch, caplog, tmp_path):
    monkeypatch.setitem(sys.modules, "lora_null._C", None)
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    monkeypatch.setenv("LORA_NULL_CACHE", str(tmp_path))
    monkeypatch.delenv("LORA_NULL_NO_EXTENSION", raising=False)
    with caplog.at_level(logging.WARNING):
        assert extension.load() is None
    assert [record.name for record in caplog.records] == ["lora_null"]
    assert "could not be built (there is no compiler no-such-compiler -m64)" in caplog.text
    assert not list(tmp_path.iterdir())


@pytest.fixture
def binary(forget, monkeypatch, tmp_path):
    """A binary of the sources in a folder, older than they are by its time; a build gives a string."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    path = tmp_path / "_C.so"
    path.touch()
    os.utime(path, (0, 0))
    module = types.SimpleNamespace(__file__=str(path), sources=extension.digest(tmp_path / "csrc"))
    monkeypatch.setitem(sys.modules, "lora_null._C", module)
    monkeypatch.setattr(extension, "source_folder", lambda: tmp_path / "csrc")
    monkeypatch.setattr(extension, "build", lambda: "built anew")
    return module


def test_binary_of_the_same_sources_is_used_whatever_the_times_of_files(binary, caplog):
    assert extension.ready() is binary and extension.load() is binary
    assert not caplog.records


def test_binary_of_other_sources_is_built_again_and_not_in_silence(binary, tmp_path, caplog):
    header = tmp_path / "csrc" / "null_space.h"
    header.write_text(header.read_text() + "\n")
    os.utime(header, (0, 0))
    with caplog.at_level(logging.WARNING, "lora_null"):
        assert extension.ready() is None
        assert extension.load() == "built anew"
    assert len(caplog.records) == 1 and "other sources" in caplog.text and "build_ext" in caplog.text


def test_binary_from_before_it_named_its_sources_is_outdated(binary):
    del binary.sources
    assert extension.load() == "built anew"


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built here")
def test_the_binary_names_its_sources():
    assert extension.load().sources == extension.digest(extension.source_folder())


def test_cache_folder_follows_the_environment(monkeypatch):
    monkeypatch.setenv("LORA_NULL_CACHE", "/some/where")
    assert cache_folder() == Path("/some/where")
    monkeypatch.delenv("LORA_NULL_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/xdg")
    assert cache_folder() == Path("/xdg/lora_null")


def test_changed_sources_get_another_build(tmp_path):
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    before = extension._fingerprint(tmp_path / "csrc")
    assert before == extension._fingerprint(ROOT / "csrc")
    header = tmp_path / "csrc" / "null_space.h"
    header.write_text(header.read_text() + "\n")
    assert extension._fingerprint(tmp_path / "csrc") != before


@pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")
@pytest.mark.slow
def test_builds_on_first_use_and_is_reused(tmp_path):
    code = (
        "import sys; sys.modules['lora_null._C'] = None\n"  # as in an install without a compiled part
        "from lora_null.system import extension; module = extension.load(); print(module.__file__)"
    )
    begin = time.perf_counter()
    first = run(code, LORA_NULL_CACHE=str(tmp_path), LORA_NULL_NO_EXTENSION="0")
    built = time.perf_counter() - begin
    assert first.returncode == 0, first.stderr
    binary = Path(first.stdout.strip())
    assert binary.is_relative_to(tmp_path)
    # A killed build leaves torch's mark behind; it must not block the next process for ever.
    (binary.parent / "lock").touch()
    stamp = binary.stat().st_mtime_ns
    second = run(code, LORA_NULL_CACHE=str(tmp_path), LORA_NULL_NO_EXTENSION="0")
    assert ["is compiled for this torch, once" in run.stderr for run in (first, second)] == [True, False]
    assert second.stdout == first.stdout and binary.stat().st_mtime_ns == stamp
    logging.getLogger("lora_null").info("extension built in %.0f s", built)


@pytest.mark.skipif(extension.load() is None, reason="the extension is not built here")
def test_the_interpreter_runs_on_during_a_solve():
    # A thread that needs the interpreter must make progress while another solves.
    import threading

    C = torch.diag(torch.linspace(0.1, 1, 1500, dtype=torch.float64))
    ticks, done = 0, threading.Event()

    def solve():
        extension.load().filtered(C, 32, 1e-4, 8, 16, 0, True)
        done.set()

    thread = threading.Thread(target=solve)
    thread.start()
    while not done.is_set():
        ticks += 1
        time.sleep(1e-3)
    thread.join()
    assert ticks > 5

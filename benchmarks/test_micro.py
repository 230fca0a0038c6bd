"""Micro-benchmarks for pytest-benchmark: ``python -m pytest benchmarks --benchmark-only``.

The same set-ups, checks and providers as the suite, one small case each; for a profiler or a quick look while
working on one function. Comparisons belong to the suite, which takes turns.
"""

import importlib
import importlib.util
import sys
from pathlib import Path

import pytest

CASES = {
    "covariance": {"d": 1024, "T": 2048, "dtype": "fp32"},
    "null-space": {"d": 1024, "r": 64, "spectrum": "o"},
    "factorize": {"m": 1024, "d": 1024, "r": 64, "stage": "factors"},
    "linear": {"T": 1024, "m": 1024, "d": 1024, "r": 64, "dtype": "fp32", "adapter": "fp32", "train_a": False},
    "linear-group": {"model": "square-2048", "group": "qkv", "T": 256, "r": 64, "dtype": "fp32"},
}


def _suite(name: str):
    # pytest runs in importlib mode, which leaves the repository root off sys.path.
    if "benchmarks" not in sys.modules:
        folder = Path(__file__).parent
        spec = importlib.util.spec_from_file_location(
            "benchmarks", folder / "__init__.py", submodule_search_locations=[str(folder)]
        )
        assert spec is not None and spec.loader is not None
        sys.modules["benchmarks"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["benchmarks"])
    return importlib.import_module(f"benchmarks.{name}")


def _entries():
    for name in CASES:
        for provider in _suite("questions").registry()[name].providers():
            if not provider.missing("cpu") and not provider.name.endswith("compiled"):
                yield pytest.param(name, provider.name, id=f"{name}-{provider.name}")


@pytest.mark.parametrize(("name", "provider"), list(_entries()))
def test_speed(benchmark, name, provider):
    """Time the first mode of one provider, after its output was checked."""
    harness = _suite("harness")
    question = _suite("questions").registry()[name]
    case = harness.Case(CASES[name])
    chosen = next(p for p in question.providers() if p.name == provider)
    if not chosen.only(case):
        pytest.skip("takes no part in this case")
    inputs = question.setup(case, "cpu")
    call = chosen.build(case, inputs)
    if call.output is not None:
        assert not question.verify(case, inputs, call.output()).refuses(chosen.allowance)
    benchmark.pedantic(next(iter(call.modes.values())), rounds=5, warmup_rounds=1)

"""Run PEFT's own LoRA tests with and without the fused forward: ``python -m tests.peers`` or ``make test-peers``.

They come with PEFT's sdist, which pip fetches into ``build/peers`` and nothing else keeps. A test that fails only where
adapters are fused is a failure of ours. Tests that want a GPU or another package fail or skip both times.
"""

import argparse
import json
import os
import subprocess
import sys
import tarfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "build" / "peers"
# What they import besides PEFT's own requirements.
PACKAGES = ("attrs", "datasets", "diffusers", "parameterized", "scipy")
# The files in which layers of LoRA are called; of the first two, which try all methods, the tests of LoRA.
FILES = (
    "custom_models",
    "mixed",
    "initialization",
    "lora_variants",
    "low_level_api",
    "tuners_utils",
    "target_parameters",
    "trainable_tokens",
    "lora_conversion",
    "lora_intruders",
    "lorafa",
    "loraplus",
    "riemannian_lora",
    "other",
    "helpers",
    "torch_compile",
)
LORA = "not (test_custom_models or test_mixed) or lora"


def packages():
    """Return a Python that has this one's packages and those of the tests, which this one shall not have."""
    python = WORK / "venv" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(WORK / "venv")], check=True)
        ask = [str(python), "-c", "import sysconfig; print(sysconfig.get_path('purelib'))"]
        theirs = Path(subprocess.run(ask, check=True, capture_output=True, text=True).stdout.strip())
        # Not the path alone: what is installed for development is found by the .pth files there.
        lines = [f"import site; site.addsitedir({path!r})" for path in sys.path if path.endswith("-packages")]
        (theirs / "development.pth").write_text("\n".join(lines))
        constraints = ["-c", str(ROOT / "constraints.txt")]
        subprocess.run([str(python), "-m", "pip", "install", "-q", *constraints, *PACKAGES], check=True)
    return python


def suite():
    """Return the folder of PEFT's tests, of the installed version."""
    release = f"peft-{version('peft')}"
    if not (WORK / release / "tests").is_dir():
        fetch = [sys.executable, "-m", "pip", "download", "-q", "--no-binary", ":all:", "--no-deps"]
        subprocess.run([*fetch, "-d", str(WORK), release.replace("-", "==")], check=True)
        with tarfile.open(WORK / f"{release}.tar.gz") as archive:
            archive.extractall(WORK, filter="data")
    # The sdist leaves it out, and the tests import each other relatively.
    (WORK / release / "tests" / "__init__.py").touch()
    return WORK / release


def outcomes(python, folder, fused, hub, arguments):
    """Run the tests once; return test name to outcome."""
    noted = WORK / ("fused.json" if fused else "plain.json")
    noted.unlink(missing_ok=True)
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT / "tests" / "peers"),
        "PEER_OUTCOMES": str(noted),
        "PEER_FUSED": str(int(fused)),
        "PEER_HUB": str(int(hub)),
        "HF_HUB_OFFLINE": str(int(not hub)),
    }
    command = [str(python), "-m", "pytest", "-q", "-p", "fused_plugin", "-p", "no:cacheprovider", "-o", "addopts="]
    command += ["--tb=short", "--no-header", "-rfE", "--timeout=300", *arguments]
    with open(noted.with_suffix(".log"), "w") as log:
        subprocess.run(command, cwd=folder, env=environment, stdout=log, stderr=subprocess.STDOUT)
    if not noted.exists():
        sys.exit(f"{noted.with_suffix('.log')} says why PEFT's tests did not run.")
    return json.loads(noted.read_text())


def main():
    parser = argparse.ArgumentParser(prog="tests.peers", description=__doc__)
    parser.add_argument("--files", nargs="+", default=FILES, help="of PEFT's test files, without test_ and .py")
    parser.add_argument("-k", default=LORA, help="which of their tests, as pytest's -k")
    parser.add_argument("--hub", action="store_true", help="also those that fetch models from the hub")
    chosen = parser.parse_args()
    WORK.mkdir(parents=True, exist_ok=True)
    python, folder = packages(), suite()
    files = [f"tests/test_{name}.py" for name in chosen.files]
    arguments = [*(name for name in files if (folder / name).exists()), "-k", chosen.k]
    plain, fused = (outcomes(python, folder, kind, chosen.hub, arguments) for kind in (False, True))
    new = [name for name, outcome in plain.items() if outcome == "passed" and fused.get(name) != "passed"]
    passed = sum(outcome == "passed" for outcome in plain.values())
    print(f"PEFT {version('peft')}: {len(plain)} tests, {passed} pass by themselves, {len(new)} of them not when fused")
    print("\n".join(new))
    return 1 if new or not passed else 0


if __name__ == "__main__":
    sys.exit(main())

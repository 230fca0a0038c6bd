"""Time and memory of callables that take turns."""

from __future__ import annotations

import ctypes
import gc
import re
import statistics
import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch


@dataclass(eq=False)
class Timed:
    """One thing to time.

    Attributes:
        run: The timed call. It receives what ``prepare`` returned, or nothing.
        prepare: Untimed work before every sample, for instance the forward pass of a timed backward pass.
        capturable: Whether the call may be replayed as a CUDA graph.
        self_timed: ``run`` times its parts itself and returns milliseconds, extrapolated from them.
    """

    run: Callable[..., Any]
    prepare: Callable[[], Any] | None = None
    capturable: bool = True
    self_timed: bool = False

    def __call__(self) -> Any:
        """Run once, preparation included."""
        return self.run() if self.prepare is None else self.run(self.prepare())


@dataclass(frozen=True)
class Times:
    """Median and the 20 % and 80 % quantiles of the samples, in milliseconds."""

    median_ms: float
    q20_ms: float
    q80_ms: float
    samples: int

    @classmethod
    def of(cls, samples_ms: list[float]) -> Times:
        """Summarise samples given in milliseconds."""
        ordered = sorted(samples_ms)

        def quantile(share: float) -> float:
            position = share * (len(ordered) - 1)
            low = int(position)
            high = min(low + 1, len(ordered) - 1)
            return ordered[low] + (position - low) * (ordered[high] - ordered[low])

        return cls(statistics.median(ordered), quantile(0.2), quantile(0.8), len(ordered))


class HostClock:
    """Wall-clock samples for calls that are done when they return."""

    # A sample shorter than this is averaged over several calls: a clock tick is some 50 ns, but one
    # interruption of the process costs a good part of a millisecond.
    shortest_ms = 2.0
    # Worker threads of the call before may still be spinning on the cores that this one needs.
    pause_s = 0.005

    def __init__(self):
        self._repeats: weakref.WeakKeyDictionary[Timed, int] = weakref.WeakKeyDictionary()

    def sample(self, timed: Timed) -> float:
        """Return one sample in milliseconds."""
        time.sleep(self.pause_s)
        if timed.self_timed:
            return timed.run()
        repeats = self._repeats.get(timed, 1)
        if timed.prepare is not None:
            ready = timed.prepare()
            start = time.perf_counter_ns()
            timed.run(ready)
            return (time.perf_counter_ns() - start) / 1e6
        start = time.perf_counter_ns()
        for _ in range(repeats):
            timed.run()
        spent = (time.perf_counter_ns() - start) / 1e6
        if spent < self.shortest_ms:
            self._repeats[timed] = max(repeats + 1, int(repeats * self.shortest_ms / max(spent, 1e-3)))
        return spent / repeats


class DeviceClock:
    """Samples between CUDA events, each after the L2 cache was overwritten."""

    def __init__(self):
        size = 2 * torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self._cache = torch.empty(max(size, 2**26) // 4, dtype=torch.int32, device="cuda")

    def sample(self, timed: Timed) -> float:
        """Return one sample in milliseconds."""
        if timed.self_timed:
            return timed.run()
        ready = () if timed.prepare is None else (timed.prepare(),)
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._cache.fill_(1)
        start.record()
        timed.run(*ready)
        end.record()
        end.synchronize()
        return start.elapsed_time(end)


def clock(device: str) -> HostClock | DeviceClock:
    """Return the clock that is right for the device."""
    return DeviceClock() if device == "cuda" else HostClock()


def interleave(
    calls: dict[str, Timed],
    clock: HostClock | DeviceClock,
    *,
    seconds: float,
    at_least: int = 3,
    at_most: int = 200,
    patience: float = 15.0,
    failures: dict[str, str] | None = None,
) -> dict[str, list[float]]:
    """Sample the calls in turns, so that a drifting clock meets all of them alike.

    Every call has an equal share of ``seconds``; the order rotates from round to round. A call slower than its
    share still gets ``at_least`` samples, unless they take more than ``patience`` seconds. Given a dictionary for
    ``failures``, a call that raises is entered there and left out from then on.

    Returns:
        Samples in milliseconds by name.
    """
    names = list(calls)
    samples: dict[str, list[float]] = {name: [] for name in names}
    spent = dict.fromkeys(names, 0.0)
    share = seconds / max(1, len(names))
    for round_number in range(at_most):
        shift = round_number % max(1, len(names))
        turn = [
            name
            for name in names[shift:] + names[:shift]
            if name in samples and (spent[name] < share or (len(samples[name]) < at_least and spent[name] < patience))
        ]
        if not turn:
            break
        for name in turn:
            start = time.perf_counter()
            try:
                samples[name].append(clock.sample(calls[name]))
            except Exception as error:
                if failures is None:
                    raise
                failures[name] = f"{type(error).__name__}: {error}"[:300]
                del samples[name]
            spent[name] += time.perf_counter() - start
    return samples


def captured(timed: Timed) -> Timed:
    """Return a call that replays ``timed`` as a CUDA graph."""
    if timed.prepare is not None:
        raise ValueError("A call with untimed preparation cannot be captured as a whole.")
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            timed.run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        kept = timed.run()

    def replay():
        graph.replay()
        return kept

    return Timed(replay)


def peak_bytes(call: Callable[[], Any], device: str) -> tuple[int | None, Any]:
    """Return the largest memory of one call above what was held before it, and what the call returned.

    CUDA: bytes allocated by torch. CPU: resident memory of the process, so libraries that allocate on their own
    are counted too, in pages and therefore to about a megabyte; ``None`` where the system does not tell.
    """
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        held = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        result = call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - held, result
    _trim()
    before = _status("VmRSS")
    try:
        # 5 resets the high-water mark (proc_pid_clear_refs(5)).
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return None, call()
    result = call()
    after = _status("VmHWM")
    return None if before is None or after is None else max(0, after - before), result


def keep_freed_memory() -> None:
    """Tell glibc, for the rest of the process, to keep what is freed.

    Whether it gives memory back, and the next call pays for fresh pages, hangs on which block was freed last: in a
    decoder layer 2 % of the time, for or against a provider by accident.
    """
    try:
        for parameter, value in ((-4, 0), (-1, 2**31 - 1)):  # M_MMAP_MAX, M_TRIM_THRESHOLD
            ctypes.CDLL(None).mallopt(parameter, value)
    except (OSError, AttributeError):
        return


def _trim() -> None:
    # Freed memory that the C library keeps would hide the next call's own.
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (OSError, AttributeError):
        return


def _status(field: str) -> int | None:
    try:
        text = Path("/proc/self/status").read_text()
    except OSError:
        return None
    found = re.search(rf"^{field}:\s+(\d+) kB", text, re.MULTILINE)
    return int(found.group(1)) * 1024 if found else None


class SavedBytes:
    """Counts the bytes that autograd keeps for the backward pass, each storage once, parameters not at all."""

    def __init__(self, parameters=()):
        self._known = {parameter.untyped_storage().data_ptr() for parameter in parameters}
        self.bytes = 0

    def _pack(self, tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._known:
            self._known.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return tensor

    def __enter__(self):
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)
        self._hooks.__enter__()
        return self

    def __exit__(self, *exception):
        self._hooks.__exit__(*exception)

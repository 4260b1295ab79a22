"""Time on the device: a stopwatch that never waits for it, and `wall_clock_breakdown`.

The names are DeepSpeed's (`fwd`, `bwd`, `step`), which prints each micro-step and each step; here it is the mean over
the steps since the last line. `data` is the wait for ``engine.training_dataloader``; `update` is all of the time
between two optimizer steps, the script's own included.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from redline.callbacks import Callback
from redline.engine import Engine

if TYPE_CHECKING:
    from redline.monitoring.metrics import MetricsLogger

__all__ = ["Span", "Stopwatch", "WallClockBreakdown", "timestamp", "wrap_calls"]

Call = Callable[..., Any]
Timestamp = Any  # seconds, or a CUDA event, whose class exists only where CUDA does

_METHODS = {"fwd": "forward", "bwd": "backward", "step": "step"}  # of the engine, by their names in lines

MAX_PENDING = 1000  # spans that are kept, before those that have ended are added up


class Span(NamedTuple):
    """How often something was done, and the milliseconds that it took in total."""

    times: int
    ms: float


def timestamp(device: torch.device) -> Timestamp:
    """Now: the clock's time on the CPU; on CUDA an event, that is, the time when the device gets here."""
    if device.type != "cuda":
        return time.perf_counter()
    # Recorded in the current stream; nothing waits for it until its time is read.
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Stopwatch:
    """Adds up spans of a device's time by key."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pending: list[tuple[Any, Timestamp, Timestamp]] = []  # a list: collectives add from other threads
        self._totals: dict[Any, Span] = {}
        self._begun: dict[Any, Timestamp] = {}

    def measure(self, key: Any, call: Call, *args: Any, **kwargs: Any) -> Any:
        """Call something, and add the time that it takes."""
        self._begun[key] = timestamp(self._device)
        try:
            return call(*args, **kwargs)
        finally:
            self.end(key)

    def end(self, key: Any) -> None:
        """End the span that :meth:`measure` has begun, if it has not ended already."""
        if key in self._begun:
            self.add(key, self._begun.pop(key), timestamp(self._device))

    def add(self, key: Any, begin: Timestamp, end: Timestamp) -> None:
        """Add the span between two timestamps of one device."""
        self._pending.append((key, begin, end))
        if len(self._pending) >= MAX_PENDING:
            self._add_up(MAX_PENDING // 2)  # those that the device has ended long ago

    def totals(self) -> dict[Any, Span]:
        """All spans so far by key; waits for the device to end them."""
        self._add_up(len(self._pending))
        return dict(self._totals)

    def take(self) -> dict[Any, Span]:
        """The same, and start again from zero."""
        totals = self.totals()
        self._totals.clear()
        return totals

    def clear(self) -> None:
        """Forget all spans, without waiting."""
        self._pending.clear()
        self._totals.clear()

    def _add_up(self, count: int) -> None:
        oldest = self._pending[:count]
        del self._pending[:count]
        for key, begin, end in oldest:
            if isinstance(end, float):
                ms = (end - begin) * 1e3
            else:
                end.synchronize()
                ms = begin.elapsed_time(end)
            before = self._totals.get(key, Span(0, 0.0))
            self._totals[key] = Span(before.times + 1, before.ms + ms)


class WallClockBreakdown(Callback):
    """Times forward, backward and step; :meth:`line` is printed below each progress line, and charted."""

    def __init__(self, engine: Engine, charts: MetricsLogger | None = None) -> None:
        self._engine, self._charts = engine, charts
        self._stopwatch = Stopwatch(engine.device)
        self._is_warm = False
        wrap_calls(engine, self, self._stopwatch.measure)
        engine.loader_wrappers.append(self._time_batches)

    def on_step(self, engine: Engine) -> None:
        # This callback comes before those that print and write, whose time is not the step's.
        self._stopwatch.end("step")
        if not self._is_warm:  # the first step does not count
            self._stopwatch.clear()
            self._is_warm = True

    def line(self, engine: Engine, steps: int, seconds: float) -> str:
        """Means over the steps since the last line; "" where there are none."""
        spans = self._stopwatch.take()
        if not steps:
            return ""
        means = {name: spans[name].ms / steps for name in ("data", *_METHODS) if name in spans}
        if self._charts is not None:
            times = {f"elapsed_time_ms_{_METHODS[name]}": ms for name, ms in means.items() if name in _METHODS}
            self._charts.log_scalars(times, engine.global_samples)
        means["update"] = seconds * 1e3 / steps
        return "time (ms): " + ", ".join(f"{name}={ms:.2f}" for name, ms in means.items())

    def _time_batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A pass over the loader, with the wait for each batch added."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if self in self._engine.callbacks:
                self._stopwatch.add("data", begin, time.perf_counter())
            yield batch


def wrap_calls(engine: Engine, callback: Callback, observe: Callable[..., Any]) -> None:
    """Let ``observe(name, call, *args, **kwargs)`` make an engine's calls of forward, backward and step.

    Not where it evaluates, nor while the callback is off: a range test takes it out of ``engine.callbacks``. The engine
    gets instance attributes, so that one without them pays nothing.
    """

    def wrapped(name: str, method: str) -> Call:
        within = vars(engine).get(method)  # another breakdown's

        def choose(*args: Any, **kwargs: Any) -> Any:
            # Looked up at each call: deepspeed.initialize changes the engine's class after this.
            call = within or getattr(type(engine), method).__get__(engine)
            if torch.is_grad_enabled() and callback in engine.callbacks:
                return observe(name, call, *args, **kwargs)
            return call(*args, **kwargs)

        return choose

    # nn.Module.__call__ looks `forward` up on the instance, so that this covers engine(x) as well.
    for name, method in _METHODS.items():
        setattr(engine, method, wrapped(name, method))

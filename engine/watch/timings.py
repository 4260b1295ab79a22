"""`wall_clock_breakdown`: where the time of an update goes.

The names are DeepSpeed's (`fwd`, `bwd`, `step`), which prints each micro-step and each update; here it is the mean
over the updates since the last line. `data` is the wait for ``engine.training_dataloader``; `update` is all of the
time between two updates, and so what the script does itself, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from engine.engine import Engine
from engine.watch.monitor import Monitor
from engine.watch.stopwatch import Stopwatch

__all__ = ["Timings", "surround"]

_NAMES = {"fwd": "forward", "bwd": "backward", "step": "step"}  # in lines and in monitors


class Timings:
    """Times forward, backward and step with a stamp before and after: a CUDA event, or a look at the clock.

    Args:
        engine: what is timed.
        monitor: gets what is printed, too, under DeepSpeed's names.
    """

    def __init__(self, engine: Engine, monitor: Monitor | None = None) -> None:
        self._monitor = monitor
        self._engine = engine
        self._watch = Stopwatch()
        self._warm = False
        surround(engine, self._timed)
        if engine.training_dataloader is not None:
            engine.training_dataloader.through.append(self._pass)

    def updated(self, engine: Engine) -> None:
        self._watch.end("step", engine.device)  # what is printed now is no part of it
        if not self._warm:  # the first update is not to be counted
            self._watch.clear()
            self._warm = True

    def line(self, updates: int, seconds: float) -> str | None:
        """The mean of each over the updates since the last line; None before the second one."""
        spans = self._watch.totals()
        self._watch.clear()
        if not updates:
            return None
        parts = {name: spans[name].ms / updates for name in ("data", *_NAMES) if name in spans}
        if self._monitor is not None:
            times = {f"Train/Samples/elapsed_time_ms_{_NAMES[name]}": parts[name] for name in _NAMES if name in parts}
            self._monitor.publish(times, self._engine.global_samples)
        parts["update"] = seconds * 1e3 / updates
        return "time (ms): " + ", ".join(f"{name}={ms:.2f}" for name, ms in parts.items())

    def _timed(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        device = self._engine.device

        def timed(*args: Any, **kwargs: Any) -> Any:
            self._watch.begin(name, device)
            try:
                return call(*args, **kwargs)
            finally:
                self._watch.end(name, device)

        return timed

    def _pass(self, batches: Iterator[Any]) -> Iterator[Any]:
        """A pass over the loader, each wait for it noted."""
        while True:
            begin = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            if self._engine.observers:
                self._watch.add("data", begin, time.perf_counter())
            yield batch


def surround(engine: Engine, put_around: Callable[[str, Callable[..., Any]], Callable[..., Any]]) -> None:
    """Put something around an engine's `fwd`, `bwd` and `step` where it trains and is watched; not where it evaluates.

    Args:
        engine: gets instance attributes, so that an engine which nobody looks into pays nothing.
        put_around: of a name and a call; makes a call of it.
    """

    def where_watched(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        watched = put_around(name, call)

        def choose(*args: Any, **kwargs: Any) -> Any:
            look = engine.observers and torch.is_grad_enabled()
            return watched(*args, **kwargs) if look else call(*args, **kwargs)

        return choose

    for name, method in _NAMES.items():
        setattr(engine, method, where_watched(name, getattr(engine, method)))

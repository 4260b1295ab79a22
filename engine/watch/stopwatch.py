"""Spans of time on a device: taken without waiting for it, read when somebody wants to know."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

__all__ = ["Span", "Stopwatch", "stamp"]

Stamp = Any  # seconds, or a CUDA event, whose class is only there where CUDA is

ENOUGH = 1000  # spans that wait to be read, before those that are over are added up


class Span(NamedTuple):
    """How often something was done, and for how long altogether."""

    times: int
    ms: float


def stamp(device: torch.device) -> Stamp:
    """Now: by the clock on the CPU; on CUDA the moment when the device gets here."""
    if device.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
    event.record()
    return event


class Stopwatch:
    """Adds up spans by key; those of one key do not overlap, unless they are added whole."""

    def __init__(self) -> None:
        self._spans: list[tuple[Any, Stamp, Stamp]] = []  # a list: other threads add to it, too
        self._totals: dict[Any, Span] = {}
        self._open: dict[Any, Stamp] = {}

    def begin(self, key: Any, device: torch.device) -> None:
        """A span of this key begins now."""
        self._open[key] = stamp(device)

    def end(self, key: Any, device: torch.device) -> None:
        """It ends now, if it has not ended already."""
        begin = self._open.pop(key, None)
        if begin is not None:
            self.add(key, begin, stamp(device))

    def add(self, key: Any, begin: Stamp, end: Stamp) -> None:
        """Note a span between two stamps of one device."""
        self._spans.append((key, begin, end))
        if len(self._spans) >= ENOUGH:
            self._add_up(wait=False)

    def totals(self) -> dict[Any, Span]:
        """All spans so far; waits for the device to end them."""
        self._add_up(wait=True)
        return dict(self._totals)

    def clear(self) -> None:
        """Forget everything, without waiting."""
        self._spans.clear()
        self._totals.clear()

    def _add_up(self, wait: bool) -> None:
        spans, self._spans = self._spans, []
        for index, (key, begin, end) in enumerate(spans):
            if not isinstance(end, float):
                if wait:
                    end.synchronize()
                elif not end.query():
                    self._spans = spans[index:] + self._spans
                    return
            ms = (end - begin) * 1e3 if isinstance(end, float) else begin.elapsed_time(end)
            before = self._totals.get(key, Span(0, 0.0))
            self._totals[key] = Span(before.times + 1, before.ms + ms)

"""Spans of time: added up by key, and read without loss."""

from __future__ import annotations

import time

import pytest
import torch

from engine.watch import stopwatch
from engine.watch.stopwatch import Span, Stopwatch, stamp

CPU = torch.device("cpu")


def test_spans_of_one_key_add_up() -> None:
    watch = Stopwatch()
    for key, begin, end in (("fwd", 1.0, 1.5), ("bwd", 1.5, 1.75), ("fwd", 2.0, 3.0)):
        watch.add(key, begin, end)
    assert watch.totals() == {"fwd": Span(2, 1500.0), "bwd": Span(1, 250.0)}
    assert watch.totals() == {"fwd": Span(2, 1500.0), "bwd": Span(1, 250.0)}


def test_a_span_that_has_ended_does_not_end_again(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([1.0, 2.0, 9.0])
    monkeypatch.setattr(time, "perf_counter", lambda: next(times))
    watch = Stopwatch()
    watch.begin("step", CPU)
    watch.end("step", CPU)
    watch.end("step", CPU)
    assert watch.totals() == {"step": Span(1, 1000.0)}


def test_clearing_forgets_all() -> None:
    watch = Stopwatch()
    watch.add("fwd", 1.0, 2.0)
    watch.clear()
    assert watch.totals() == {}


def test_spans_do_not_pile_up() -> None:
    watch = Stopwatch()
    for _ in range(3 * stopwatch.ENOUGH):
        watch.add("fwd", 1.0, 2.0)
    assert len(watch._spans) < stopwatch.ENOUGH
    assert watch.totals()["fwd"].times == 3 * stopwatch.ENOUGH


class Event:
    """A CUDA event as it behaves: it has come, or one waits for it."""

    def __init__(self, at: float, come: bool) -> None:
        self.at, self.come, self.waited = at, come, False

    def query(self) -> bool:
        return self.come

    def synchronize(self) -> None:
        self.waited = True

    def elapsed_time(self, end: Event) -> float:
        return end.at - self.at


def test_only_reading_waits_for_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stopwatch, "ENOUGH", 2)
    watch = Stopwatch()
    early, late = Event(3.0, come=True), Event(7.0, come=False)
    watch.add("fwd", Event(1.0, come=True), early)
    watch.add("fwd", Event(4.0, come=True), late)
    assert not early.waited and not late.waited
    assert len(watch._spans) == 1  # the late one
    assert watch.totals() == {"fwd": Span(2, 5.0)}
    assert late.waited


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_stamp_on_cuda_is_an_event_of_the_device() -> None:
    device = torch.device("cuda")
    watch = Stopwatch()
    begin = stamp(device)
    torch.ones(1000, 1000, device=device) @ torch.ones(1000, 1000, device=device)
    watch.add("matmul", begin, stamp(device))
    assert watch.totals()["matmul"].ms > 0

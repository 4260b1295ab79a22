"""Time: spans added up without waiting for the device, and the breakdown of a step's time."""

from __future__ import annotations

import logging
import re
import time
from pathlib import Path

import pytest
import torch
from torch.utils.data import TensorDataset

from redline.monitoring import timing
from redline.monitoring.timing import Span, Stopwatch, timestamp
from tests.tiny import X, Y, make_engine, train

CPU = torch.device("cpu")
ON = {"wall_clock_breakdown": True}


@pytest.fixture(autouse=True)
def _logs_info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="redline")


def lines(caplog: pytest.LogCaptureFixture) -> list[dict[str, float]]:
    found = [message for message in caplog.messages if message.startswith("  time (ms): ")]
    return [{name: float(ms) for name, ms in re.findall(r"(\w+)=([\d.]+)", line)} for line in found]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """A clock on which each look takes a second, once its element is true."""
    now, running, usual = [0.0], [False], time.perf_counter

    def tick() -> float:
        now[0] += 1.0
        return now[0] if running[0] else usual()

    monkeypatch.setattr(time, "perf_counter", tick)
    return running


# -- the breakdown -------------------------------------------------------------------------------------------


def test_the_parts_are_printed_below_each_line_from_the_second_step_on(caplog: pytest.LogCaptureFixture) -> None:
    train(make_engine(steps_per_print=1, **ON), 3)
    assert [list(line) for line in lines(caplog)] == [["fwd", "bwd", "step", "update"]] * 2
    progress = [message.partition("=")[0] for message in caplog.messages if "=" in message][-4:]
    assert progress == ["step", "  time (ms): fwd"] * 2


def test_the_parts_are_means_of_a_step_without_the_first_and_without_evaluations(
    caplog: pytest.LogCaptureFixture, clock: list[bool]
) -> None:
    engine = make_engine(steps_per_print=4, gradient_accumulation_steps=2, **ON)
    clock[0] = True
    for _ in range(4):
        with torch.no_grad():
            engine(X[:4])
        train(engine, 2)
    (line,) = lines(caplog)
    assert (line["fwd"], line["bwd"], line["step"]) == (2000.0, 2000.0, 2000.0)  # two of each in a step


def test_the_wait_for_the_loader_is_printed(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(data=TensorDataset(X, Y), steps_per_print=2, **ON)
    assert engine.training_dataloader is not None
    for x, _ in engine.training_dataloader:
        engine.backward(engine(x).mean())
        engine.step()
    assert list(lines(caplog)[-1]) == ["data", "fwd", "bwd", "step", "update"]


def test_without_an_interval_one_is_chosen_and_logged(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(**ON)
    assert "steps_per_print: null; breakdowns are printed every 10 steps" in caplog.messages
    train(engine, 12)
    assert len(lines(caplog)) == 1


def test_the_times_are_metrics_too(tmp_path: Path) -> None:
    files = {"enabled": True, "output_path": str(tmp_path), "job_name": "job"}
    train(make_engine(csv_monitor=files, steps_per_print=2, **ON), 4)
    for name in ("forward", "backward", "step"):
        rows = (tmp_path / "job" / f"Train_Samples_elapsed_time_ms_{name}.csv").read_text().splitlines()
        assert [row.partition(",")[0] for row in rows] == ["step", "8", "16"]


def test_training_is_the_same_with_a_breakdown_and_goes_on_after_an_error(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(memory_breakdown=True, steps_per_print=2, **ON)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine(torch.randn(4, 3))
    assert train(engine, 5) == train(make_engine(), 5)
    assert len(lines(caplog)) == 2


# -- the stopwatch -------------------------------------------------------------------------------------------


def test_spans_of_one_key_add_up_until_they_are_cleared() -> None:
    watch = Stopwatch(CPU)
    for key, begin, end in (("fwd", 1.0, 1.5), ("bwd", 1.5, 1.75), ("fwd", 2.0, 3.0)):
        watch.add(key, begin, end)
    assert watch.totals() == watch.totals() == {"fwd": Span(2, 1500.0), "bwd": Span(1, 250.0)}
    watch.clear()
    assert watch.totals() == {}


def test_a_span_that_has_ended_does_not_end_again(clock: list[bool]) -> None:
    clock[0] = True
    watch = Stopwatch(CPU)
    watch.measure("step", watch.end, "step")
    assert watch.totals() == {"step": Span(1, 1000.0)}


def test_spans_do_not_pile_up() -> None:
    watch = Stopwatch(CPU)
    for _ in range(3 * timing.MAX_PENDING):
        watch.add("fwd", 1.0, 2.0)
    assert len(watch._pending) < timing.MAX_PENDING
    assert watch.totals()["fwd"].times == 3 * timing.MAX_PENDING


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_timestamp_on_cuda_is_an_event_of_the_device() -> None:
    device = torch.device("cuda")
    watch = Stopwatch(device)
    begin = timestamp(device)
    torch.ones(1000, 1000, device=device) @ torch.ones(1000, 1000, device=device)
    watch.add("matmul", begin, timestamp(device))
    assert watch.totals()["matmul"].ms > 0

"""The breakdown of an update's time: what is timed, when it is shown, and what it leaves alone."""

from __future__ import annotations

import logging
import re
import time
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from engine import Engine, initialize

DATA = TensorDataset(torch.randn(64, 4), torch.randn(64, 1))


@pytest.fixture(autouse=True)
def _listening(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger="engine")


def make_engine(**config: Any) -> Engine:
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "SGD"}, **config}
    return initialize(nn.Linear(4, 1), config, training_data=DATA, device="cpu")


def train(engine: Engine, micro_steps: int) -> None:
    assert engine.training_dataloader is not None
    for x, y in list(engine.training_dataloader)[:micro_steps]:
        engine.backward(nn.functional.mse_loss(engine(x), y))
        engine.step()


def times(caplog: pytest.LogCaptureFixture) -> list[dict[str, float]]:
    lines = [r.getMessage() for r in caplog.records if r.getMessage().startswith("  time (ms): ")]
    return [{name: float(ms) for name, ms in re.findall(r"(\w+)=([\d.]+)", line)} for line in lines]


def test_the_parts_are_shown_with_each_line_from_the_second_update_on(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=1, wall_clock_breakdown=True)
    train(engine, 3)
    assert [list(line) for line in times(caplog)] == [["fwd", "bwd", "step", "update"]] * 2


def test_the_parts_are_means_of_one_update_and_the_first_does_not_count(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    ticks = iter(range(1000))
    engine = make_engine(steps_per_print=4, wall_clock_breakdown=True, gradient_accumulation_steps=2)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))  # each look at the clock takes a second
    for _ in range(8):
        engine.backward(engine(torch.randn(4, 4)).mean())
        engine.step()
    line = times(caplog)[0]
    assert (line["fwd"], line["bwd"], line["step"]) == (2000.0, 2000.0, 2000.0)  # two of each in an update


def test_the_wait_for_the_loader_is_shown(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=2, wall_clock_breakdown=True)
    assert engine.training_dataloader is not None
    for x, _ in engine.training_dataloader:
        engine.backward(engine(x).mean())
        engine.step()
    assert list(times(caplog)[-1]) == ["data", "fwd", "bwd", "step", "update"]


def test_an_evaluation_is_not_timed(caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(1000))
    engine = make_engine(steps_per_print=2, wall_clock_breakdown=True)
    monkeypatch.setattr(time, "perf_counter", lambda: float(next(ticks)))
    for _ in range(2):
        with torch.no_grad():
            engine(torch.randn(4, 4))
        engine.backward(engine(torch.randn(4, 4)).mean())
        engine.step()
    assert times(caplog)[0]["fwd"] == 1000.0


def test_without_an_interval_one_is_chosen_and_said(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(wall_clock_breakdown=True)
    assert "steps_per_print: null; breakdowns are printed every 10 updates" in caplog.messages
    train(engine, 12)
    assert len(times(caplog)) == 1


def test_numbers_are_the_same_with_a_breakdown() -> None:
    def weights(**config: Any) -> torch.Tensor:
        torch.manual_seed(0)
        engine = make_engine(**config)
        for _ in range(5):
            engine.backward(engine(torch.randn(4, 4)).square().mean())
            engine.step()
        return engine.module.weight.detach()  # type: ignore[return-value]

    assert torch.equal(weights(), weights(wall_clock_breakdown=True, memory_breakdown=True))


def test_an_error_in_the_forward_comes_through_and_training_goes_on(caplog: pytest.LogCaptureFixture) -> None:
    engine = make_engine(steps_per_print=2, wall_clock_breakdown=True)
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        engine(torch.randn(4, 3))
    train(engine, 2)
    assert len(times(caplog)) == 1

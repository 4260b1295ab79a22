"""Callbacks: when each of their methods is called, and what an engine looks like then."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from redline import Engine, initialize
from redline.callbacks import BestCheckpoint, Callback, EarlyStopping, LRMonitor
from tests.distributed import run_ranks

SCHEDULE = {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}}
FP16 = {"enabled": True, "loss_scale": 0, "initial_scale_power": 8, "hysteresis": 1}


class Journal(Callback):
    """Writes down every call, with the step and the learning rate."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def _note(self, name: str, engine: Engine, *more: Any) -> None:
        assert engine.optimizer is not None
        self.calls.append((name, engine.global_steps, engine.optimizer.param_groups[0]["lr"], *more))

    def on_step(self, engine: Engine) -> None:
        self._note("step", engine)

    def on_skip(self, engine: Engine, step: int) -> None:
        self._note("skip", engine, step)

    def on_step_end(self, engine: Engine) -> None:
        self._note("end", engine)

    def on_validation(self, engine: Engine, loss: Tensor | float) -> None:
        self._note("validation", engine, float(loss))


def make_engine(**config: Any) -> tuple[Engine, Journal]:
    optimizer = {"type": "SGD", "params": {"lr": 1.0}}
    config = {"train_micro_batch_size_per_gpu": 4, "optimizer": optimizer, "scheduler": SCHEDULE, **config}
    engine, journal = initialize(nn.Linear(4, 1), config, device="cpu"), Journal()
    engine.callbacks.append(journal)
    return engine, journal


def train(engine: Engine, micro_steps: int, scale: float = 1.0) -> None:
    for _ in range(micro_steps):
        engine.backward(engine(torch.ones(4, 4)).float().mean() * scale)
        engine.step()


def test_a_step_is_seen_before_and_after_the_learning_rate_changes() -> None:
    engine, journal = make_engine(gradient_accumulation_steps=2)
    train(engine, 4)
    assert journal.calls == [("step", 1, 1.0), ("end", 1, 0.5), ("step", 2, 0.5), ("end", 2, 0.25)]


def test_a_skipped_step_is_seen_as_one_before_it_ends() -> None:
    engine, journal = make_engine(fp16=FP16)
    train(engine, 1, scale=1e4)
    assert journal.calls == [("step", 1, 1.0), ("skip", 1, 1.0, 1), ("end", 1, 1.0)]


def test_a_skip_that_only_the_device_knows_is_seen_when_the_host_learns_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redline.device._READ_AT_ONCE", ())  # as on CUDA
    engine, journal = make_engine(fp16=FP16)
    train(engine, 1)
    train(engine, 1, scale=1e4)
    assert journal.calls[2:] == [("step", 2, 0.5), ("end", 2, 0.25)]
    train(engine, 1)
    assert journal.calls[4:] == [("skip", 2, 0.5, 2), ("step", 3, 0.5), ("end", 3, 0.25)]


def test_validation_losses_reach_the_callbacks() -> None:
    engine, journal = make_engine()
    engine.record_validation(2.0)
    train(engine, 1)
    engine.record_validation(torch.tensor(0.5))
    assert [call for call in journal.calls if call[0] == "validation"] == [
        ("validation", 0, 1.0, 2.0),
        ("validation", 1, 0.5, 0.5),
    ]


class Stop(Callback):
    """Raises in one of its methods, once so many steps are done."""

    def __init__(self, method: str, step: int = 1) -> None:
        self.step = step
        setattr(self, method, self._raise)

    def _raise(self, engine: Engine, *_: Any) -> None:
        if engine.global_steps == self.step:
            raise RuntimeError("enough")


def stopped(callback: Stop, scale: float = 1.0, **config: Any) -> Engine:
    engine, _ = make_engine(**config)
    engine.callbacks.append(callback)
    with pytest.raises(RuntimeError, match="enough"):
        train(engine, 5, scale)
    return engine


def test_a_callback_may_end_the_training_with_an_error_and_the_schedule_follows_its_step() -> None:
    for step, lr in ((1, 0.5), (2, 0.25)):
        engine = stopped(Stop("on_step", step))
        assert (engine.global_steps, engine.get_lr()) == (step, [lr])


def test_the_loss_scale_follows_a_skipped_step_whose_callback_has_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    for reads_at_once in (("cpu",), ()):
        monkeypatch.setattr("redline.device._READ_AT_ONCE", reads_at_once)
        assert stopped(Stop("on_skip"), scale=1e4, fp16=FP16).loss_scale == 128.0


# -- those that redline has ------------------------------------------------------------------------------


def test_early_stopping_waits_for_a_better_value() -> None:
    engine, _ = make_engine()
    stopping = EarlyStopping(patience=2, min_delta=0.1)
    engine.callbacks = [stopping]
    stopped = []
    for value in (3.0, 2.0, 1.95, 1.0, float("nan"), 0.95):
        engine.record_validation(torch.tensor(value))
        stopped.append(stopping.should_stop)
    assert stopped == [False] * 5 + [True]
    assert stopping.best == 1.0
    again = EarlyStopping(patience=2)
    again.load_state_dict(stopping.state_dict())
    assert again.should_stop


def test_the_best_checkpoint_is_kept(tmp_path: Path) -> None:
    engine, _ = make_engine()
    best = BestCheckpoint(tmp_path, "accuracy", "max")
    engine.callbacks = [best]
    for accuracy in (0.5, 0.75, 0.25):
        train(engine, 1)
        engine.record_validation({"loss": 1.0, "accuracy": accuracy})
    assert best.best == 0.75
    assert engine.load_checkpoint(tmp_path) == (None, None)  # it is not the newest of the run
    _, client_state = engine.load_checkpoint(tmp_path, tag="best")
    assert engine.global_steps == 2
    assert client_state == {"best": 0.75}


def test_a_value_that_is_not_recorded_is_named() -> None:
    engine, _ = make_engine()
    engine.callbacks = [EarlyStopping(monitor="f1")]
    with pytest.raises(ValueError, match="got 'f1'; record_validation was given loss, accuracy"):
        engine.record_validation({"loss": 1.0, "accuracy": 0.5})
    with pytest.raises(ValueError, match='expected "min" or "max"'):
        EarlyStopping(mode="lowest")  # type: ignore[arg-type]


def test_learning_rates_are_kept_for_a_plot() -> None:
    engine, _ = make_engine()
    monitor = LRMonitor(every=2)
    engine.callbacks = [monitor]
    train(engine, 4)
    assert (monitor.steps, monitor.lrs) == ([2, 4], [[0.5], [0.125]])


def stop(patience: int) -> tuple[int, float | None]:
    engine, _ = make_engine()
    stopping = EarlyStopping(patience)
    engine.callbacks = [stopping]
    count = 0
    while not stopping.should_stop:
        engine.record_validation(float(count if engine.global_rank else 10))  # better on one rank alone
        count += 1
    return count, stopping.best


def test_ranks_stop_together() -> None:
    assert run_ranks(stop, 2, 2) == [(3, 5.0)] * 2

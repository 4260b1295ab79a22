"""Callbacks: what observes an engine's optimizer steps, and three that many scripts want.

Progress lines, metrics writers, timers, range tests and saving on SIGTERM are callbacks, and so is your own code:

    class StopOnNaN(Callback):
        def on_step(self, engine):
            if engine.global_steps % 100 == 0 and engine.loss.isnan():
                raise RuntimeError(f"the loss is NaN at step {engine.global_steps}")

    engine.callbacks.append(StopOnNaN())
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

__all__ = ["BestCheckpoint", "Callback", "EarlyStopping", "LRMonitor"]

Validation = Tensor | float | Mapping[str, Tensor | float]


class Callback:
    """A callback that does nothing; override the methods you need.

    The engine calls its callbacks in the order of ``engine.callbacks``, on every rank. None of the methods should wait
    for the device at every step: ``engine.loss`` and ``engine.grad_norm`` are tensors there until they are read.
    """

    # `engine` is the `Engine`, which imports this module; subclasses may annotate it.

    def on_step(self, engine: Any) -> None:
        """Called after an optimizer step, before learning rate and momentum change.

        ``engine.global_steps`` counts the step already; ``engine.loss`` and ``engine.grad_norm`` are the step's own.
        """

    def on_skip(self, engine: Any, step: int) -> None:
        """Called when optimizer step `step` (from 1) turns out to have been skipped for non-finite gradients.

        This comes after the step's :meth:`on_step`: at once where the host knows the gradient norm; where only the
        device does, in the next :meth:`Engine.backward` or when the learning rate or the skipped steps are asked for.
        """

    def on_step_end(self, engine: Any) -> None:
        """Called when a step is complete, and learning rate and momentum are those of the next step."""

    def on_validation(self, engine: Any, loss: Validation) -> None:
        """Called by ``engine.record_validation`` with what it was given: this rank's loss, or several named values."""

    def on_save(self, engine: Any) -> None:
        """Called before a checkpoint is saved: what is kept for later would be lost to a run that continues there."""

    def on_resume(self, engine: Any) -> None:
        """Called after a checkpoint is loaded, unless it was the model only: the run is at ``engine.global_steps``.

        Also where there was none to load, before the first step.
        """


class _BestValue(Callback):
    """Follows a validation value, the same on all ranks, and calls :meth:`on_value` with each."""

    def __init__(self, monitor: str | None, mode: Literal["min", "max"], min_delta: float) -> None:
        if mode not in ("min", "max"):
            raise ValueError(f'mode: got {mode!r}; expected "min" or "max"')
        self.monitor, self.mode, self.min_delta = monitor, mode, min_delta
        self.best: float | None = None

    def on_value(self, engine: Any, value: float, is_best: bool) -> None:
        raise NotImplementedError

    def on_validation(self, engine: Any, loss: Validation) -> None:
        if isinstance(loss, Mapping):
            if self.monitor is None or self.monitor not in loss:
                raise ValueError(f"monitor: got {self.monitor!r}; record_validation was given {', '.join(loss)}")
            loss = loss[self.monitor]
        value = float(engine.world.mean(torch.as_tensor(loss, dtype=torch.float32, device=engine.device).detach()))
        sign = 1 if self.mode == "min" else -1
        is_best = not math.isnan(value) and (self.best is None or sign * (self.best - value) > self.min_delta)
        if is_best:
            self.best = value
        self.on_value(engine, value, is_best)

    def state_dict(self) -> dict[str, Any]:
        """For the `client_state` of a checkpoint."""
        return {"best": self.best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state_dict` returned."""
        self.best = state["best"]


class EarlyStopping(_BestValue):
    """Says when a validation value has stopped getting better: the script asks `should_stop` after each evaluation.

        stopping = EarlyStopping(patience=3)
        engine.callbacks.append(stopping)
        for epoch in range(100):
            train_epoch(engine)
            engine.record_validation(engine.evaluate(validation_set, loss_fn))
            if stopping.should_stop:
                break

    Args:
        patience: evaluations without a better value before training should stop.
        monitor: as of :class:`BestCheckpoint`, like the others.
        mode: "min" or "max".
        min_delta: how much better a value has to be.
    """

    def __init__(
        self,
        patience: int = 3,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        *,
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.patience = patience
        self.waited = 0  # evaluations since the best one

    @property
    def should_stop(self) -> bool:
        """Whether to end the training; the same on all ranks."""
        return self.waited >= self.patience

    def on_value(self, engine: Any, value: float, is_best: bool) -> None:
        self.waited = 0 if is_best else self.waited + 1

    def state_dict(self) -> dict[str, Any]:
        return {**super().state_dict(), "waited": self.waited}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        super().load_state_dict(state)
        self.waited = state["waited"]


class BestCheckpoint(_BestValue):
    """Saves a checkpoint whenever ``engine.record_validation`` is given the best value so far.

        engine.callbacks.append(BestCheckpoint("checkpoints", mode="max"))
        engine.record_validation(engine.evaluate(validation_set, accuracy))
        ...
        engine.load_checkpoint("checkpoints", tag="best")

    Args:
        directory: see `save_checkpoint`.
        monitor: the name of the value, where several are recorded; None where it is one number.
        mode: whether lower ("min") or higher ("max") is better.
        tag: the checkpoint's name; each replaces the one before. `load_checkpoint` does not take it by default.
        min_delta: a value has to be better than the best one by more than this.
    """

    def __init__(
        self,
        directory: str | Path,
        monitor: str | None = None,
        mode: Literal["min", "max"] = "min",
        *,
        tag: str = "best",
        min_delta: float = 0.0,
    ) -> None:
        super().__init__(monitor, mode, min_delta)
        self.directory, self.tag = directory, tag

    def on_value(self, engine: Any, value: float, is_best: bool) -> None:
        if is_best:
            engine.save_checkpoint(self.directory, tag=self.tag, save_latest=False, client_state=self.state_dict())


class LRMonitor(Callback):
    """Keeps the learning rate of each optimizer step, for a plot: `steps`, and `lrs` with one value a parameter group.

    Args:
        every: optimizer steps between two values.
    """

    def __init__(self, every: int = 1) -> None:
        self.every = every
        self.steps: list[int] = []
        self.lrs: list[list[float]] = []

    def on_step(self, engine: Any) -> None:
        if engine.global_steps % self.every == 0:
            self.steps.append(engine.global_steps)
            self.lrs.append([float(group["lr"]) for group in engine.optimizer.param_groups])

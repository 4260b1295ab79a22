"""The rig: a live engine on which short runs are made, each from the same start, and which is then as it was before.

Every run starts from the same weights, optimizer state, random numbers and batches, and goes through the engine's own
step. One that diverges stops: on all processes at the same update, since they decide on the mean of their losses.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.data import to_device
from engine.engine import Engine
from engine.errors import RangeTestError
from engine.range_test.analysis import Curve, DivergenceDetector, Kind
from engine.range_test.progress import Progress
from engine.range_test.recorder import Recorder
from engine.range_test.snapshot import Snapshot
from engine.range_test.task import LossFn, batches, loss_of, training_batches, validation_batches
from schedulers.schedule import Schedule

__all__ = ["Rig", "Run"]


@dataclass(frozen=True, slots=True)
class Run:
    """A short run to be made.

    Attributes:
        name: what a person calls it: ``rate 5``.
        kind: see :class:`Curve`.
        schedule: makes the run's schedule for the engine's optimizer.
        steps: updates, at most.
        rate: see :class:`Curve`.
        stops: whether the run ends where it diverges.
        validations: how often the validation loss is measured, if there is data for it; 0 for never.
    """

    name: str
    kind: Kind
    schedule: Callable[[Optimizer], Schedule]
    steps: int
    rate: float | None = None
    stops: bool = True
    validations: int = 20


class Rig:
    """A context in which runs are made; on its end, an exception's too, the engine is as it was before.

    Args:
        engine: at the beginning of an update.
        data: a dataset, a tuple of tensors, or anything that yields micro-batches again and again.
        loss: ``loss(model, batch)`` to a scalar, or a criterion ``loss(output, target)``.
        validation: data for a validation loss; None for none.

    Raises:
        RangeTestError: the engine stands inside an update or has no optimizer; data or loss cannot be used.
    """

    def __init__(self, engine: Engine, data: Any, loss: LossFn, *, validation: Any = None) -> None:
        _check_idle(engine)
        micro_batch = engine.train_micro_batch_size_per_gpu()
        self.engine = engine
        self._data = training_batches(data, engine.world, micro_batch=micro_batch)
        self._held_out = (
            None if validation is None else validation_batches(validation, engine.world, micro_batch=micro_batch)
        )
        self._loss = loss_of(loss)
        self._snapshot: Snapshot | None = None

    def __enter__(self) -> Rig:
        self._snapshot = Snapshot(self.engine, self._data, self._held_out)
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._snapshot is not None
        self._snapshot.restore()
        if self.engine.micro_steps == 0:
            self.engine.renew_parallel()

    def make(self, run: Run, bar: Progress) -> Curve:
        """Make one run from the start; its record, the same on every process."""
        assert self._snapshot is not None, "a rig is used in a with statement"
        self._snapshot.restore()
        engine = self.engine
        assert engine.optimizer is not None
        engine.lr_scheduler = run.schedule(engine.optimizer)
        engine.recorder = recorder = Recorder(engine.world)
        engine.observers = []
        engine.after_update = None
        engine._finite = None  # a test is there to diverge
        every = max(1, run.steps // run.validations) if run.validations else 0
        validate = _Validation(engine, self._held_out if every else None, self._loss, every)
        return _run(engine, batches(self._data, engine.device), self._loss, run, recorder, validate, bar)


def _run(
    engine: Engine,
    data: Iterator[Any],
    loss: Callable[[nn.Module, Any], Tensor],
    run: Run,
    recorder: Recorder,
    validate: _Validation,
    bar: Progress,
) -> Curve:
    """One run, from the weights as they are."""
    detector = DivergenceDetector()
    validate(0)
    for step in range(run.steps):
        lr = float(engine.get_lr()[0])
        for batch in islice(data, engine.gradient_accumulation_steps()):
            engine.backward(loss(engine, batch))
            engine.step()
        value = recorder.last_loss()
        bar.update(run.name, step, lr, value)
        validate(step + 1)
        if detector.update(value) and run.stops:
            bar.say(f"{run.name}: diverged at step {step}, learning rate {lr:.3g}")
            bar.skip(run.steps - step - 1)
            break
    return recorder.curve(run.name, run.rate, kind=run.kind)


class _Validation:
    """The mean loss over the held-out data, measured every so many updates."""

    def __init__(
        self, engine: Engine, data: Iterable[Any] | None, loss: Callable[[nn.Module, Any], Tensor], every: int
    ) -> None:
        self._engine, self._data, self._loss, self._every = engine, data, loss, every

    def __call__(self, updates: int) -> None:
        if self._data is None or updates % self._every:
            return
        engine = self._engine
        training = [(module, module.training) for module in engine.modules()]
        engine.eval()
        total = torch.zeros(2, dtype=torch.float64, device=engine.device)  # sum of losses, number of samples
        with torch.no_grad():
            for batch in self._data:
                batch = to_device(batch, engine.device)
                size = _samples(batch)
                total += torch.stack([self._loss(engine, batch).double() * size, total.new_tensor(size)])
        for module, flag in training:
            module.training = flag
        loss_sum, samples = engine.world.sum(total)
        engine.record_validation(loss_sum / samples)


def _check_idle(engine: Engine) -> None:
    if engine.optimizer is None:
        raise RangeTestError('range test: the engine has no optimizer; give the config an "optimizer" section')
    inside = engine._unfinished.micro_batches != 0
    if inside or any(parameter.grad is not None for parameter in engine.parameters()):
        raise RangeTestError(
            "range test: the engine is inside an update and would lose its gradients; run the test before training or "
            "right after a step() that ended an update"
        )


def _samples(batch: Any) -> int:
    """How many samples a batch holds: the first dimension of the first tensor in it."""
    if isinstance(batch, Tensor):
        return len(batch) if batch.ndim else 1
    parts = batch.values() if isinstance(batch, Mapping) else batch
    return next((_samples(part) for part in parts if isinstance(part, (Tensor, Mapping, tuple, list))), 1)

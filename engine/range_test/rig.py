"""The rig: a live engine on which short runs are made, each from the same start, and which is then as it was before.

Every run starts from the same weights, optimizer state, random numbers and batches, and goes through the engine's own
step; what a run is to have of its own, `conditions` sets. Only fp16's loss scale goes on from where earlier runs have
settled: a short run would skip most of its updates while it looks for it anew. One that diverges stops: on all
processes at the same update, since they decide on the mean of their losses.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from engine.device import to_device
from engine.engine import Engine
from engine.errors import LossScaleError, RangeTestError
from engine.range_test.conditions import check, reorder, set_batch_size, set_settings
from engine.range_test.curve import Curve, Kind
from engine.range_test.divergence import DivergenceDetector
from engine.range_test.interrupt import Interrupt
from engine.range_test.progress import Progress
from engine.range_test.recorder import Recorder
from engine.range_test.snapshot import Snapshot
from engine.range_test.task import LossFn, batches, loss_of, scalar_of, training_batches, validation_batches
from schedulers.schedule import Schedule

__all__ = ["Rig", "Run"]

MOST_BAD = 5  # skipped updates in a row whose loss is not finite, before a run counts as diverged
MOST_SKIPPED = 40  # skipped updates in a row; a loss scale of 2 ** 32 has come down to its minimum by then


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
        seed: 0 for the engine's random numbers and order of data as they are; another one for others, with the same
            weights. Data that comes in an order of its own (a list of batches) keeps it.
        train_batch_size: samples of an update, reached by accumulation; None for the engine's.
        settings: `weight_decay` and `momentum` (the first of betas), set in every group that has them.
    """

    name: str
    kind: Kind
    schedule: Callable[[Optimizer], Schedule]
    steps: int
    rate: float | None = None
    stops: bool = True
    validations: int = 20
    seed: int = 0
    train_batch_size: int | None = None
    settings: Mapping[str, float] = field(default_factory=dict)


class Rig:
    """A context in which runs are made; on its end, an exception's too, the engine is as it was before.

    Args:
        engine: at the beginning of an update.
        data: a dataset, a tuple of tensors, or anything that yields micro-batches again and again.
        loss: ``loss(model, batch)`` to a scalar, or a criterion ``loss(output, target)``.
        validation: data for a validation loss; None for none.

    Attributes:
        scale: state of the loss scaler that the next run begins with; None for the engine's own.

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
        self._given_loss, self._loss = loss, loss_of(loss)
        self.scale: dict[str, Any] | None = None
        self._snapshot: Snapshot | None = None
        self._interrupt: Interrupt

    def __enter__(self) -> Rig:
        self._snapshot = Snapshot(self.engine, self._data, self._held_out, loss=self._given_loss)
        self._interrupt = Interrupt(self.engine.world)
        self._interrupt.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        assert self._snapshot is not None
        self._interrupt.hold()
        try:
            self._snapshot.restore()
        finally:
            self._interrupt.remove()
        if not isinstance(error, KeyboardInterrupt):
            self._interrupt.raise_own()

    def make(self, run: Run, bar: Progress) -> Curve:
        """Make one run from the start; its record, the same on every process.

        Raises:
            RangeTestError: the engine cannot have the run's batch size or settings.
        """
        assert self._snapshot is not None, "a rig is used in a with statement"
        self._snapshot.restore()
        engine = self.engine
        assert engine.optimizer is not None
        check(engine, run.train_batch_size, run.settings)
        if engine.scaler is not None and self.scale is not None:
            engine.scaler.load_state_dict(self.scale)
        reorder(run.seed, self._data)
        set_batch_size(engine, run.train_batch_size)
        set_settings(engine, run.settings)
        engine.lr_scheduler = run.schedule(engine.optimizer)
        engine.recorder = recorder = Recorder(engine.world, engine.global_steps)
        engine.observers = []
        engine.after_update = None
        engine._finite = None  # a test is there to diverge
        engine._accumulation.set_boundary(None)
        every = max(1, run.steps // run.validations) if run.validations else 0
        validate = _Validation(engine, self._held_out if every else None, self._loss, every)
        curve = self._run(run, recorder, validate, bar)
        settings = tuple(sorted((name, float(value)) for name, value in run.settings.items()))
        return replace(curve, seed=run.seed, train_batch_size=run.train_batch_size, settings=settings)

    def _run(self, run: Run, recorder: Recorder, validate: _Validation, bar: Progress) -> Curve:
        """One run, from the weights as they are."""
        engine, data = self.engine, batches(self._data, self.engine.device)
        end, settled = _End(), _Settled(engine)
        validate(0)
        for step in range(run.steps):
            lr = float(engine.get_lr()[0])
            skipped, hopeless = _update(engine, data, self._loss)
            value = recorder.last_loss()
            bar.update(run.name, step, lr, value)
            self._interrupt.look()
            validate(step + 1)
            diverged = end.reached(value, skipped=skipped)
            settled.see(value, skipped=skipped, diverged=diverged or hopeless)
            if hopeless or (diverged and run.stops):
                recorder.count_last()
                bar.say(f"{run.name}: diverged at step {step}, learning rate {lr:.3g}")
                bar.skip(run.steps - step - 1)
                break
        self.scale = settled.scale or self.scale
        return recorder.curve(run.name, run.rate, kind=run.kind)


def _update(engine: Engine, data: Iterator[Any], loss: Callable[[nn.Module, Any], Tensor]) -> tuple[bool, bool]:
    """One update; whether it was skipped, and whether every other would be."""
    before, steps = engine.skipped_steps, engine.gradient_accumulation_steps()
    try:
        for index, batch in enumerate(islice(data, steps), 1):
            engine.backward(loss(engine, batch))
            if engine.config.managed_gradient_accumulation or index == steps:
                engine.step()
        return engine.skipped_steps > before, False
    except LossScaleError:
        return True, True


class _End:
    """Whether a run has diverged, skipped updates and all.

    A skipped update is none, and many in a row are normal while fp16 looks for its loss scale. But a loss that is not
    finite is no fault of the scale; several in a row leave no hope, since the weights do not move any more.
    """

    def __init__(self) -> None:
        self._detector = DivergenceDetector()
        self._skipped = self._bad = 0  # in a row

    def reached(self, loss: float, *, skipped: bool) -> bool:
        """Take the next update."""
        if not skipped:
            self._skipped = self._bad = 0
            return self._detector.update(loss)
        self._skipped += 1
        self._bad = 0 if math.isfinite(loss) else self._bad + 1
        return self._bad >= MOST_BAD or self._skipped >= MOST_SKIPPED or self._detector.diverged


class _Settled:
    """What a run leaves of the loss scale to later ones: that of its end, or, where it diverged, of its lowest loss.

    What halves the scale on the way to a divergence are the gradients of a broken model, not of the one that all runs
    start from.

    Attributes:
        scale: the scaler's state; None where there is no scaler, or where all updates were skipped before a divergence.
    """

    def __init__(self, engine: Engine) -> None:
        self.scale: dict[str, Any] | None = None
        self._scaler = engine.scaler
        self._best: dict[str, Any] | None = None  # at the lowest loss
        self._lowest = math.inf
        self._diverged = False

    def see(self, loss: float, *, skipped: bool, diverged: bool) -> None:
        """Take the next update."""
        if self._scaler is None:
            return
        if loss < self._lowest and not skipped:
            self._lowest, self._best = loss, self._scaler.state_dict()
        self._diverged = self._diverged or diverged
        self.scale = self._best if self._diverged else self._scaler.state_dict()


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
                loss = scalar_of(self._loss(engine, batch)).to(total)
                total += torch.stack([loss * size, total.new_tensor(size)])
        for module, flag in training:
            module.training = flag
        loss_sum, samples = engine.world.sum(total)
        if not samples:
            raise RangeTestError(
                "validation: it yields no sample; is it empty, smaller than a batch with drop_last, or readable only "
                "once? Give a dataset or a loader with samples, or leave it out"
            )
        engine.record_validation(loss_sum / samples)


def _check_idle(engine: Engine) -> None:
    if engine.optimizer is None:
        raise RangeTestError('range test: the engine has no optimizer; give the config an "optimizer" section')
    inside = engine._accumulation.backwards != 0
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

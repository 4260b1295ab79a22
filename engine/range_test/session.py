"""A session of short runs on a live engine, each from the same start; afterwards the engine is as it was before.

Every run starts from the same weights, optimizer state, random numbers and batches, and trains through the engine's own
step. Seed, batch size and optimizer settings may differ from run to run; restoring the snapshot undoes them. Only
fp16's loss scale carries over from earlier runs: a short run would skip most of its steps while it looks for it anew. A
run that diverges stops, on all ranks at the same step, since they decide on the mean of their losses.
"""

from __future__ import annotations

import hashlib
import math
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import islice
from types import TracebackType
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from redline.console import ProgressBar
from redline.data import Loader
from redline.engine import Engine
from redline.errors import EngineError, LossScaleError, RangeTestError
from redline.random_state import random_state, reseed
from redline.range_test.curve import Curve, DivergenceDetector, Kind
from redline.range_test.recorder import Recorder
from redline.range_test.task import LossFn, Mode, batches, loader_of, loss_of, parts_of, repeated
from redline.range_test.validation import Validation
from redline.run_state import RunState
from redline.schedulers.schedule import Schedule
from redline.signals import InterruptGuard

__all__ = ["Progress", "Run", "Session", "check_run", "setting_of"]

SETTINGS = ("weight_decay", "momentum")  # what a run may vary
MAX_BAD = 5  # skipped steps in a row whose loss is not finite, before a run counts as diverged
MAX_SKIPPED = 40  # skipped steps in a row; a loss scale of 2 ** 32 has come down to its minimum by then
RECENT = 8  # last micro-batches of a run, from which batch norm's running statistics are computed for a validation
FITTED_STEPS = 2  # a run's own batches, on which its loss is measured, are those of so many steps, ...
MOST_FITTED = 8  # ... and at most so many micro-batches


@dataclass(frozen=True, slots=True)
class Run:
    """A short run to be made; `check_run` tells whether an engine can make it."""

    name: str  # "rate 5"
    kind: Kind
    schedule: Callable[[Optimizer], Schedule]  # built on the engine's optimizer
    steps: int  # optimizer steps, at most
    rate: float | None = None  # see `Curve`
    stops: bool = True  # whether the run ends where it diverges
    validations: int = 20  # how often the validation loss is measured, if there is data for it; 0 for never
    seed: int = 0  # 0 for the engine's own; another for other random numbers and, of a dataset, another order
    train_batch_size: int | None = None  # samples per step, reached by accumulation; None for the engine's
    part: int | None = None  # optimizer steps after which it sees the same samples again; None for all of the data
    fits: bool = False  # whether the loss on its own batches is measured, too: see `Curve.fitted`
    settings: Mapping[str, float] = field(default_factory=dict)  # of `SETTINGS`, for every group that has them


class Progress(ProgressBar):
    """Shows run, step, learning rate and loss; arguments as those of :class:`ProgressBar`."""

    def __enter__(self) -> Progress:
        return self

    def update(self, run: str, step: int, lr: float, loss: float) -> None:
        """Count a step of a run."""
        self.advance(1, run, lambda: f"step {step}, lr {lr:.3g}, loss {loss:.4g}")

    def validated(self, samples: float) -> None:
        """Samples went through the model for a validation, over all ranks."""


class Session:
    """A context in which runs are made; at its end, also after an exception, the engine is as it was before.

    Arguments are those of `run_range_test`.

    Raises:
        RangeTestError: the engine is inside an optimizer step or has no optimizer; data or loss cannot be used.
    """

    def __init__(
        self, engine: Engine, data: Any, loss: LossFn | None, *, validation: Any = None, mode: Mode = "min"
    ) -> None:
        if engine.optimizer is None:
            raise RangeTestError('range test: the engine has no optimizer; give the config an "optimizer" section')
        if engine.accumulated_micro_batches or any(parameter.grad is not None for parameter in engine.parameters()):
            raise RangeTestError(
                "range test: the engine is inside an optimizer step and would lose its gradients; run the test before "
                "training or right after a step() that ended one"
            )
        self.engine, self._optimizer = engine, engine.optimizer
        self.scale: dict[str, Any] | None = None  # of the loss scaler as the next run begins; None for the engine's own
        micro_batch, seed = engine.train_micro_batch_size_per_gpu(), engine.config.redline.data.seed
        self._data = loader_of(data, engine.world, micro_batch=micro_batch, seed=seed)
        self._given_loss, self._loss = loss, loss_of(loss)
        self.validation = Validation(engine, self._loss, validation, mode)
        self._recent: deque[Any] = deque(maxlen=RECENT)
        self._initial: tuple[float, float] | None = None  # losses of the weights that each run starts from
        self._first: list[Any] = []  # the micro-batches that each run starts with

    @property
    def steps_per_epoch(self) -> float | None:
        """Optimizer steps in which all ranks have seen their training data once; None for data without a length."""
        try:
            own = len(self._data) / self.engine.gradient_accumulation_steps()  # type: ignore[arg-type]
        except TypeError:
            own = math.inf
        epoch = max(self.engine.world.gather(own))
        return epoch if math.isfinite(epoch) else None

    def __enter__(self) -> Session:
        data = (self._data, self.validation.loader)
        modules = [self._given_loss] if isinstance(self._given_loss, nn.Module) else []
        self._snapshot = RunState(self.engine, data=data, parts=parts_of(*data), modules=modules)
        self._initial = None
        # On one rank Ctrl-C acts at once, since there is no other one that would wait for it.
        self._interrupts = InterruptGuard(defers=self.engine.world.size > 1)
        self._interrupts.install()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._interrupts.defer()
        try:
            self._snapshot.restore()
        finally:
            self._interrupts.remove()
        if self._interrupts.received and not isinstance(error, KeyboardInterrupt):
            raise KeyboardInterrupt

    def run(self, run: Run, progress: Progress) -> Curve:
        """Make one run from the start; returns its record, the same on every rank."""
        every = max(1, run.steps // run.validations) if run.validations and self.validation else 0
        if every:
            self.validate_initial(progress, fits=run.fits)
        engine = self.engine
        self._snapshot.restore()
        if engine.scaler is not None and self.scale is not None:
            engine.scaler.load_state_dict(self.scale)
        _reseed(run.seed, self._data)
        if run.train_batch_size is not None:
            engine.set_train_batch_size(run.train_batch_size)
        _set_settings(self._optimizer, run.settings)
        engine.lr_scheduler = run.schedule(self._optimizer)
        recorder = Recorder(engine.world, engine.global_steps)
        engine.callbacks = [recorder]
        engine.allow_divergence()
        self._recent.clear()
        fitted = self._train(run, recorder, progress, every)
        settings = tuple(sorted((name, float(value)) for name, value in run.settings.items()))
        curve = recorder.curve(run.name, run.rate, kind=run.kind)
        return replace(
            curve, seed=run.seed, train_batch_size=run.train_batch_size, settings=settings, fitted=fitted,
            part=run.part,
        )  # fmt: skip

    def validate_initial(self, progress: Progress, *, fits: bool = False) -> None:
        """Measure the weights that each run starts from, once; `fits` as of a `Run`."""
        if self._initial is None:
            self._snapshot.restore()
            self._recent.clear()
            if fits and self.validation.loader is not None:
                count = min(MOST_FITTED, FITTED_STEPS * self.engine.gradient_accumulation_steps())
                self._first = list(islice(batches(self._data, self.engine.device), count))
            self._initial = self._validate(progress, fits=fits)

    def _train(self, run: Run, recorder: Recorder, progress: Progress, every: int) -> tuple[float, float] | None:
        """All steps of a run, with a validation after each `every` of them; returns its curve's `fitted`."""
        engine, data = self.engine, batches(self._data, self.engine.device)
        if run.part is not None:
            data = repeated(self._data, run.part * engine.gradient_accumulation_steps(), engine.device)
        fits, fitted = run.fits and not run.seed, None  # another seed has other batches
        initial, own_initial = self._initial or (math.nan, math.nan)
        if every:
            engine.record_validation(initial)
        outcome = _Outcome(engine, is_test=run.kind in ("linear", "exponential"))
        for step in range(run.steps):
            lr = float(engine.get_lr()[0])
            before, at_minimum = engine.skipped_steps, False
            try:
                self._step(data)
            except LossScaleError:  # the scale is at its minimum: all further steps would be skipped
                at_minimum = True
            loss = recorder.last_loss()
            progress.update(run.name, step, lr, loss)
            if self._interrupts.requested(engine.world):
                raise KeyboardInterrupt
            if every and (step + 1) % every == 0:
                validated, own = self._validate(progress, fits=fits)
                engine.record_validation(validated)
                fitted = None if math.isnan(own) else (own_initial, own)
            outcome.update(loss, skipped=at_minimum or engine.skipped_steps > before)
            outcome.diverged |= at_minimum
            if at_minimum or (outcome.diverged and run.stops):
                recorder.count_last()
                progress.write(f"{run.name}: diverged at step {step}, learning rate {lr:.3g}")
                progress.skip(run.steps - step - 1)
                break
        self.scale = outcome.scale or self.scale
        return fitted

    def _step(self, data: Iterator[Any]) -> None:
        """One optimizer step."""
        engine = self.engine
        micro_batches = engine.gradient_accumulation_steps()
        for index, batch in enumerate(islice(data, micro_batches), 1):
            if self.validation.norms:
                self._recent.append(batch)
            engine.backward(self._loss(engine, batch))
            if engine.config.managed_gradient_accumulation or index == micro_batches:
                engine.step()

    def _validate(self, progress: Progress, *, fits: bool) -> tuple[float, float]:
        """The loss on the validation data, and that on the batches that the run started with; nan without any."""
        loss, own, samples = self.validation.measure(self._recent, self._first if fits else ())
        progress.validated(samples)
        return loss, own


class _Outcome:
    """Whether a run has diverged, skipped steps included, and the loss scale that it leaves to later runs.

    Many skipped steps in a row are normal while fp16 looks for its loss scale. But the scale is not the cause of a loss
    that is not finite. Where a run diverged, it leaves the scale of its lowest loss: what halves it from there on are
    the gradients of a broken model, not of the one that all runs start from.

    A loss that rises while the learning rate grows will not fall again. Elsewhere it may: such a run has diverged only
    where its loss is not finite, and else counts by where it ends.
    """

    def __init__(self, engine: Engine, *, is_test: bool) -> None:
        self.diverged = False
        self._detector = DivergenceDetector() if is_test else None
        self._scaler = engine.scaler
        self._skipped = self._bad = 0  # in a row
        self._lowest = math.inf
        self._best_scale: dict[str, Any] | None = None

    @property
    def scale(self) -> dict[str, Any] | None:
        """State for the scaler; None without one, or where all steps were skipped before a divergence."""
        return self._best_scale if self._scaler is None or self.diverged else self._scaler.state_dict()

    def update(self, loss: float, *, skipped: bool) -> None:
        """Take the next step."""
        if skipped:
            self._skipped += 1
            self._bad = 0 if math.isfinite(loss) else self._bad + 1
            self.diverged |= self._bad >= MAX_BAD or self._skipped >= MAX_SKIPPED
            return
        self._skipped = self._bad = 0
        self.diverged |= self._detector.update(loss) if self._detector else not math.isfinite(loss)
        if self._scaler is not None and loss < self._lowest:
            self._lowest, self._best_scale = loss, self._scaler.state_dict()


# -- what differs between runs -------------------------------------------------------------------------


def check_run(engine: Engine, train_batch_size: int | None, settings: Mapping[str, float]) -> None:
    """Raise a `RangeTestError` if the engine cannot have that batch size, or its optimizer those settings."""
    own = engine.train_batch_size()
    try:
        engine.set_train_batch_size(own if train_batch_size is None else train_batch_size)
    except EngineError as error:
        raise RangeTestError(f"range test: {error}") from None
    engine.set_train_batch_size(own)
    for name, value in settings.items():
        if name not in SETTINGS:
            raise RangeTestError(f'settings: got "{name}"; expected {" or ".join(SETTINGS)}')
        if not _values(engine, name):
            optimizer = type(engine.optimizer).__name__
            raise RangeTestError(f"settings: {name}: the optimizer, {optimizer}, has none; leave it out")
        if not 0 <= value < (1 if name == "momentum" else math.inf):
            limits = "a number from 0 to below 1" if name == "momentum" else "a number >= 0"
            raise RangeTestError(f"settings: {name}: got {value!r}; expected {limits}")


def setting_of(engine: Engine, name: str) -> float | None:
    """The engine's own value of a setting: the one that its parameter groups share; None where they differ.

    Groups that are exempt from weight decay, as biases often are, do not count.
    """
    values = _values(engine, name)
    if name == "weight_decay" and len(values) > 1:
        values.discard(0.0)
    return values.pop() if len(values) == 1 else None


def _values(engine: Engine, name: str) -> set[float]:
    assert engine.optimizer is not None
    values = (_setting(group, name) for group in engine.optimizer.param_groups)
    return {float(value) for value in values if value is not None}


def _setting(group: Mapping[str, Any], name: str) -> Any:
    return group["betas"][0] if name == "momentum" and "betas" in group else group.get(name)


def _set_settings(optimizer: Optimizer, settings: Mapping[str, float]) -> None:
    for name, value in settings.items():
        groups = [group for group in optimizer.param_groups if _setting(group, name) is not None]
        if name == "weight_decay":
            groups = [group for group in groups if group[name] != 0] or groups
        for group in groups:
            if name == "momentum" and "betas" in group:
                group["betas"] = (value, *group["betas"][1:])
            else:
                group[name] = value


def _reseed(seed: int, data: Any) -> None:
    """Other random numbers for this rank and another order for the data; seed 0 changes nothing.

    Both are derived from their present state and the seed, so ranks that had the same still have the same.
    """
    if seed == 0:
        return
    reseed(random_state(), seed)
    parts = parts_of(data)
    generators = [part.generator for part in parts if isinstance(getattr(part, "generator", None), torch.Generator)]
    for generator in {id(each): each for each in generators}.values():  # a loader and its sampler may share one
        generator.manual_seed(_mix(generator.get_state().numpy().tobytes(), seed))
    for part in parts:
        has_order = isinstance(part, Loader) or hasattr(part, "set_epoch")
        if has_order and isinstance(own := getattr(part, "seed", None), int):
            part.seed = _mix(str(own).encode(), seed)


def _mix(state: bytes, seed: int) -> int:
    """A new seed from a state and a number; a hash, so that those of neighboring seeds are unrelated."""
    return int.from_bytes(hashlib.blake2b(state + seed.to_bytes(8, "big"), digest_size=8).digest(), "big") >> 2
